"""Coding of the teacher's K most likely tokens along T tokens of a trajectory: four bytes an entry, in most cases.

A token's entries are in the order of their ids. First come all log-probabilities, float16 [T, K], then the ids as
differences, uint16 [at least T * K], then a CRC-32 of both, uint32. All are little-endian. A difference is the number
of ids that lie between an entry's id and that of the entry before it (for the first entry of a token: the number of
lower ids). SKIP stands for SKIP ids that are passed over, and is followed by the rest of the difference.

Rounding to float16 changes a log-probability by at most 1/2048 of its value. The divergence KL(q|p) of the stored q
changes by at most 1/2048 of the sum of q |log q| (1 + |log q - log p|), to first order.
"""

from __future__ import annotations

import zlib

import numpy as np
import numpy.typing as npt
import torch

from genssd.kernels.logprob import TopK

SKIP = 0xFFFF
"""Code of a difference of at least this many ids."""
BYTES_PER_ENTRY = 4
"""Bytes of an id together with its log-probability, where fewer than SKIP ids lie between it and the one before."""
SUM_TOLERANCE = 5e-3
"""By how much the rounded probabilities of a token may sum to more than 1."""


def encode_topk(topk: TopK) -> bytes:
    """Return the code of a trajectory's top k. The ids of a token must differ, and be at least 0."""
    ids_TK, logprob_TK = topk.ids.cpu().numpy(), topk.logprob.float().cpu().numpy()
    order_TK = np.argsort(ids_TK, axis=1)
    sorted_TK = np.take_along_axis(ids_TK, order_TK, axis=1).astype(np.int64)
    between = np.diff(sorted_TK, axis=1, prepend=-1).ravel() - 1
    skips = between // SKIP
    codes = np.full(between.size + int(skips.sum()), SKIP, dtype="<u2")
    codes[np.cumsum(skips + 1) - 1] = between % SKIP
    with np.errstate(over="ignore"):  # what float16 cannot hold has the probability 0
        rounded_TK = np.take_along_axis(logprob_TK, order_TK, axis=1).astype("<f2")
    code = rounded_TK.tobytes() + codes.tobytes()
    return code + zlib.crc32(code).to_bytes(4, "little")


def decode_topk(code: bytes, tokens: int, k: int) -> TopK | None:
    """Return ids, int64, and log-probabilities, float32, both [tokens, k], most likely first (lower ids before higher
    ones that are equally likely); None where the bytes are not such a code.
    """
    half = 2 * tokens * k
    code, checksum = code[:-4], code[-4:]
    if len(code) < 2 * half or len(code) % 2 or zlib.crc32(code).to_bytes(4, "little") != checksum:
        return None
    logprob_TK = np.frombuffer(code[:half], dtype="<f2").astype(np.float32).reshape(tokens, k)
    codes = np.frombuffer(code[half:], dtype="<u2").astype(np.int64)
    ends = np.flatnonzero(codes != SKIP)
    if ends.size != tokens * k or (codes.size and ends[-1] != codes.size - 1) or not _is_distribution(logprob_TK):
        return None
    passed_TK = (np.cumsum(codes)[ends] + np.arange(1, ends.size + 1)).reshape(tokens, k)
    ids_TK = passed_TK - 1 - np.concatenate([[0], passed_TK[:-1, -1]])[:, None]
    order_TK = np.argsort(-logprob_TK, axis=1, kind="stable")
    return TopK(_gather(ids_TK, order_TK), _gather(logprob_TK, order_TK))


def _is_distribution(logprob_TK: npt.NDArray[np.float32]) -> bool:
    """Tell whether every token's probabilities can be the largest ones of a distribution."""
    if np.isnan(logprob_TK).any() or (logprob_TK > SUM_TOLERANCE).any():
        return False
    return float(np.exp(logprob_TK.astype(np.float64)).sum(1).max(initial=0.0)) <= 1.0 + SUM_TOLERANCE


def _gather(values_TK: npt.NDArray[np.generic], order_TK: npt.NDArray[np.intp]) -> torch.Tensor:
    return torch.from_numpy(np.take_along_axis(values_TK, order_TK, axis=1))
