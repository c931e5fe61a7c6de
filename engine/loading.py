"""Loading of models: from hub ids or directories to runners whose caches share one budget."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import torch

from genssd.engine.checkpoint import locate
from genssd.engine.errors import InputError
from genssd.engine.launches import describe_launches
from genssd.engine.memory import choose_dtype
from genssd.engine.model import Decoder
from genssd.engine.pages import PagePool, pages_within
from genssd.engine.requests import check_vocabulary
from genssd.engine.runner import ModelRunner, Role
from genssd.engine.text import Tokenizer

log = logging.getLogger(__name__)


def load_models(
    teacher: str | Path | None, student: str | Path | None, dtype: str, device: torch.device, *, deterministic: bool
) -> tuple[dict[Role, Path], dict[Role, Decoder], dict[Role, Tokenizer]]:
    """Load models and tokenizers from hub ids or local directories; return directories, decoders and tokenizers.

    deterministic: whether kernels over the heads must give a row the same bits for every number of rows.
    Raises CheckpointError on a directory that cannot be used, InputError on models whose tokenizers differ.
    """
    names: dict[Role, str | Path | None] = {"teacher": teacher, "student": student}
    directories = {role: locate(name) for role, name in names.items() if name is not None}
    decoders = {
        role: Decoder.load(path, choose_dtype(path, dtype, device), device, deterministic=deterministic)
        for role, path in directories.items()
    }
    tokenizers = {role: Tokenizer(path) for role, path in directories.items()}
    for role, decoder in decoders.items():
        check_vocabulary(tokenizers[role], decoder)
    if len({tokenizer.fingerprint for tokenizer in tokenizers.values()}) > 1:
        raise InputError(
            f"teacher {teacher} and student {student} have different vocabularies; the student "
            "scores the teacher's token ids, so both need the same tokenizer"
        )
    if (launches := describe_launches(list(decoders.values()))) is not None:
        log.info("kernel configurations: %s", launches.description)
    return directories, decoders, tokenizers


def make_runners(
    directories: Mapping[Role, Path], decoders: Mapping[Role, Decoder], budget_bytes: int
) -> dict[Role, ModelRunner]:
    """Give every decoder a cache; together the caches take the budget, and hold the same number of tokens each."""
    num_pages = pages_within(budget_bytes, list(decoders.values()))
    return {
        role: ModelRunner(role, directories[role], decoder, PagePool.for_model(decoder, num_pages))
        for role, decoder in decoders.items()
    }
