"""The teacher's most likely tokens as DistillKit reads them (`LogprobCompressor` of its version of March 2026).

A row has `input_ids` [T], and for each of these positions the teacher's distribution of the next token:
`compressed_logprobs`, uint8 [T, 2 K], float16, most likely first, and `bytepacked_indices`, uint8 [T, ceil(K B / 8)],
the ids with B bits each, highest bit first, where B is the number of bits of the largest id. The last token of the
trajectory has no distribution after it and is left out. Positions before the last one of the prompt have none, either;
they hold a uniform one over the first ids, and `labels` masks them (-100).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from genssd.distill.data.examples import Example
from genssd.engine.common.errors import InputError

IGNORED = -100
"""Label of a token that no loss is computed for."""
NO_PROBABILITY = np.finfo(np.float16).min
"""Log-probability that stands for a probability of 0: a divergence with minus infinity is no number."""


def make_compression(vocabulary: int, k: int) -> dict[str, Any]:
    """Return the settings of DistillKit's `logprob_compressor` for rows of `make_row`."""
    return {
        "d": vocabulary, "k": k, "exact_k": k, "exact_dtype": "float16", "polynomial_terms": None,
        "term_dtype": "float32", "residual_bins": [], "delta_encoding": False, "error_diffusion": False,
        "normalize_t": False,
    }  # fmt: skip


def make_row(example: Example, vocabulary: int, k: int) -> dict[str, npt.NDArray[Any]]:
    """Return the row of one trajectory with its stored top k. vocabulary: number of ids that the student has.

    Ids that it does not have, of unused rows of the teacher's head, are replaced by unlikely ones of probability 0.
    Raises InputError naming the example's row where it has no top k, or another k.
    """
    if example.topk is None or example.topk.k != k:
        found = "no teacher_topk" if example.topk is None else f"teacher_topk with k={example.topk.k}"
        raise InputError(f"{example.where}: {found}, where other rows have k={k}")
    top = example.topk.read()
    ids_TK, logprob_TK = top.ids.numpy(), np.maximum(top.logprob.numpy(), NO_PROBABILITY)
    if (ids_TK >= vocabulary).any():
        _replace_unused(ids_TK, logprob_TK, vocabulary)
    prompt = len(example.input_ids) - len(ids_TK) - 1
    ids_TK = np.concatenate([np.tile(np.arange(k), (prompt, 1)), ids_TK])
    logprob_TK = np.concatenate([np.full((prompt, k), -math.log(k)), logprob_TK])
    tokens = np.array(example.input_ids[:-1], dtype=np.uint64)
    return {
        "input_ids": tokens,
        "labels": np.concatenate([np.full(prompt, IGNORED), tokens[prompt:].astype(np.int64)]),
        "compressed_logprobs": np.ascontiguousarray(logprob_TK.astype("<f2")).view(np.uint8),
        "bytepacked_indices": pack_bits(ids_TK, count_bits(vocabulary)),
    }


def count_bits(vocabulary: int) -> int:
    """Return the number of bits of an id, at least 1."""
    return max(1, (vocabulary - 1).bit_length())


def pack_bits(ids_TK: npt.NDArray[np.int64], bits: int) -> npt.NDArray[np.uint8]:
    """Return every row's ids with `bits` bits each, highest bit first, padded with zeros to whole bytes."""
    is_set_TKB = (ids_TK[:, :, None] >> np.arange(bits - 1, -1, -1)) & 1
    return np.packbits(is_set_TKB.reshape(len(ids_TK), -1).astype(np.uint8), axis=1)


def _replace_unused(ids_TK: npt.NDArray[np.int64], logprob_TK: npt.NDArray[np.float32], vocabulary: int) -> None:
    """Replace ids that the student does not have, in place, by the lowest ids that their token's top k lacks."""
    for t in np.flatnonzero((ids_TK >= vocabulary).any(axis=1)):
        is_unused_K = ids_TK[t] >= vocabulary
        free = np.setdiff1d(np.arange(min(vocabulary, 2 * ids_TK.shape[1])), ids_TK[t])
        ids_TK[t, is_unused_K] = free[: is_unused_K.sum()]
        logprob_TK[t, is_unused_K] = NO_PROBABILITY
