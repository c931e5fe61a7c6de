"""The model under training: transformers' own, with gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM

from genssd.engine.checkpoint import weight_files
from genssd.engine.errors import CheckpointError, InputError
from genssd.engine.text import Tokenizer


def load_model(directory: Path, tokenizer: Tokenizer, device: torch.device) -> Any:
    """A transformers model with float32 weights. Raises CheckpointError when a weight is missing or misshapen, the
    tokenizer does not fit, or the head is more than a matrix product."""
    weight_files(directory)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            str(directory), dtype=torch.float32, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{directory} cannot be loaded by transformers: {error}") from None
    absent = sorted(str(name) for kind in ("missing_keys", "mismatched_keys") for name in info[kind])
    if absent:
        raise CheckpointError(f"{directory}: weights are missing or misshapen: {', '.join(absent[:5])}")
    rows = model.get_input_embeddings().weight.shape[0]
    if tokenizer.largest_id >= rows:
        raise CheckpointError(
            f"{directory}: the tokenizer's largest id is {tokenizer.largest_id}, but the embedding has {rows} rows"
        )
    _check_head(model, directory)
    return model.to(device)


@torch.no_grad()
def _check_head(model: Any, directory: Path) -> None:
    """The loss takes hidden @ weight for the logits; a bias, a softcap or a scale would be left out silently."""
    ids = torch.arange(8)[None]
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    logits = hidden @ model.get_output_embeddings().weight.T
    if not torch.allclose(logits, model(input_ids=ids, use_cache=False).logits, atol=1e-3, rtol=1e-3):
        raise CheckpointError(
            f"{directory}: the head of {model.config.model_type} is more than a matrix product (a bias, a softcap or a "
            "scale), which training does not support yet"
        )


def save_model(model: Any, tokenizer: Tokenizer, directory: Path) -> None:
    """A save_pretrained directory with tokenizer and chat template. Raises InputError when it cannot be written."""
    try:
        model.save_pretrained(directory)
        tokenizer.hf.save_pretrained(directory)
    except OSError as error:
        raise InputError(f"{directory} cannot be written: {error.strerror}") from None
