"""Writing a trained model as a directory that transformers, and everything that reads its directories, loads.

Training keeps its weights in float32. What it hands over, OUTPUT_DIR and OUTPUT_DIR/best, is rounded once to the data
type of the checkpoint that the training began from; the checkpoints to resume from keep float32.
"""

from __future__ import annotations

import copy
import logging
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from genssd.distill.train.adapters import collect_adapters, find_plain_name, has_adapters, iter_merged, save_adapters
from genssd.distill.train.directories import move_into
from genssd.distill.train.distributed import gather_shards
from genssd.engine.checkpoints.weights import WeightFiles
from genssd.engine.common.errors import InputError
from genssd.engine.common.quoting import one_line

STORED_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Data types of weights by their names in safetensors."""


def find_stored_dtype(directory: Path) -> torch.dtype:
    """Return the data type that most weights of a checkpoint have in its files."""
    sizes: Counter[str] = Counter()
    for stored in WeightFiles.open(directory).tensors.values():
        sizes[stored.dtype] += math.prod(stored.shape)
    (most_common, _), *_ = sizes.most_common() or [("F32", 0)]
    return STORED_DTYPES.get(most_common, torch.float32)


def save_model(
    model: Any, tokenizer: Any, directory: Path, *, dtype: torch.dtype = torch.float32, write: bool = True
) -> None:
    """Write a save_pretrained directory with tokenizer and chat template. Raises InputError when it cannot be written.

    Adapters are merged into the weights, and also written on their own, in float32, into adapter/. dtype: of the
    weights in the files and in config.json; float32 is taken where a weight exceeds its range. Every process of a
    training has to call this, because sharded weights are gathered from all; only one of them with write.
    """
    state: dict[str, Tensor] = {}
    for name, value in iter_weights(model):
        if write:  # the other processes hold one gathered weight at a time
            state[name] = _copy_to_cpu(value)
    adapters = collect_adapters(model) if has_adapters(model) else {}
    if not write:
        return
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    dtype = _check_range(state, dtype)
    for name, value in state.items():
        state[name] = value.to(dtype) if value.is_floating_point() else value
    with name_save_failure(directory):
        if adapters:
            save_adapters(model, adapters, directory / "adapter")
        model.save_pretrained(directory, state_dict=state)
        config = copy.deepcopy(model.config)
        config.dtype = str(dtype).removeprefix("torch.")  # transformers has written that of the model in memory
        config.save_pretrained(directory)
        tokenizer.hf.save_pretrained(directory)


def iter_weights(model: Any, *, trained: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Yield the full weights, adapters merged into them, by the names of the model without adapters.

    A tied head is left out, which is the embedding. trained: leave those out that no step of the training changes.
    Every process of a training has to iterate, because sharded weights are gathered from all.
    """
    is_tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    if has_adapters(model):
        yield from iter_merged(model)
    for name, value in model.state_dict(keep_vars=True).items():
        if (is_tied and name == "lm_head.weight") or (trained and not value.requires_grad):
            continue
        plain = find_plain_name(name) if has_adapters(model) else name
        if plain is not None:
            yield plain, gather_shards(value.detach())


def save_final_model(model: Any, tokenizer: Any, output_dir: Path, *, dtype: torch.dtype, write: bool = True) -> None:
    """Write the trained model into a directory that holds other files as well; arguments are those of `save_model`.

    config.json comes last: a directory that has none holds no complete model.
    """
    temporary = output_dir / "final.tmp"
    save_model(model, tokenizer, temporary, dtype=dtype, write=write)
    if write:
        for stale in (output_dir / "config.json", *output_dir.glob("model*.safetensors*")):
            stale.unlink(missing_ok=True)
        with name_save_failure(output_dir):
            move_into(temporary, output_dir, last="config.json")


@contextmanager
def name_save_failure(path: Path) -> Iterator[None]:
    """Turn what the writers of weights, configs and tokenizers raise on a full disk into an InputError for a path."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        # the writer of tokenizers raises plain Exceptions, that of safetensors its own
        is_refused = isinstance(error, OSError | SafetensorError) or "os error" in str(error)
        if not is_refused:
            raise
        reason = (os.strerror(error.errno) if isinstance(error, OSError) and error.errno else None) or one_line(error)
        room = "; make room on the disk" if any(word in reason.lower() for word in ("space", "quota", "large")) else ""
        raise InputError(f"{path} cannot be written: {reason}{room}") from None


def _check_range(state: Mapping[str, Tensor], dtype: torch.dtype) -> torch.dtype:
    """Return the dtype, or float32 where it cannot hold the largest weight."""
    if dtype != torch.float16:
        return dtype  # the range of bfloat16 is that of float32
    largest = max((float(value.abs().max()) for value in state.values() if value.numel()), default=0.0)
    if largest <= torch.finfo(dtype).max:
        return dtype
    logging.getLogger("genssd.train").warning("a weight is %g, beyond float16: the model is saved in float32", largest)
    return torch.float32


def _copy_to_cpu(value: Tensor) -> Tensor:
    """Return the tensor on the CPU, as a copy if its memory holds more than this tensor."""
    value = value.cpu()
    return value if value.untyped_storage().nbytes() == value.nbytes else value.clone()
