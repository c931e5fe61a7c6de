"""Loading transformers' own model classes, for training and for models that the engine's decoder does not compute."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from genssd.engine.checkpoints.basic_config import is_supported, make_transformers_config
from genssd.engine.checkpoints.config import ModelConfig, load_config
from genssd.engine.checkpoints.config_files import read_config
from genssd.engine.checkpoints.parameters import match_parameters
from genssd.engine.checkpoints.weights import UNUSED, WeightFiles
from genssd.engine.checkpoints.wrappers import KEY_MAPPING, text_part
from genssd.engine.common.amounts import format_count
from genssd.engine.common.errors import CheckpointError
from genssd.engine.common.quoting import one_line
from genssd.engine.texts.text import Tokenizer
from genssd.kernels.head import squash


def load_model(
    directory: Path,
    tokenizer: Tokenizer,
    device: torch.device,
    *,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str | None = None,
) -> Any:
    """Load a causal language model with transformers.

    The weights are checked as those of the engine's decoder are, so both read the same tensors. Raises CheckpointError
    when a weight is missing, misshapen or none of the model's, the tokenizer does not fit, or the head is more than a
    matrix product.
    """
    fields = read_config(directory)
    if fields.get("quantization_config"):
        raise CheckpointError(
            f"{directory / 'config.json'}: transformers' models here do not read weights in MXFP4, and none is trained "
            "from them: load them in transformers with Mxfp4Config(dequantize=True), and save them with save_pretrained"
        )
    config = make_transformers_config(fields, directory / "config.json")
    weights = WeightFiles.open(directory)
    if is_supported(fields):
        match_parameters(weights, ModelConfig.load(directory))
    else:
        load_config(directory)  # refuses what is no causal language model
    attn_implementation = _choose_attention(config, attn_implementation)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            str(directory),
            config=config,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            attn_implementation=attn_implementation,
            key_mapping=KEY_MAPPING if text_part(fields) else None,
            trust_remote_code=False,
            local_files_only=True,
        )
    except Exception as error:  # model classes raise what their construction does
        raise CheckpointError(f"{directory} cannot be loaded by transformers: {one_line(error)}") from None
    _check_weights(model, info, weights)
    rows = model.get_input_embeddings().weight.shape[0]
    if tokenizer.largest_id >= rows:
        raise CheckpointError(
            f"{directory}: the tokenizer's largest id is {tokenizer.largest_id}, but the embedding has "
            f"{format_count(rows, 'row')}"
        )
    try:
        _check_head(model, directory)
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"{directory}: a forward pass with transformers fails: {one_line(error)}") from None
    return model.to(device)


def make_empty_model(directory: Path, *, attn_implementation: str | None = None) -> Any:
    """Return the transformers model of a checkpoint in float32 on the device "meta": shapes, and no memory for weights.

    Raises CheckpointError on a config that cannot be used.
    """
    config = make_transformers_config(read_config(directory), directory / "config.json")
    attn_implementation = _choose_attention(config, attn_implementation)
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, attn_implementation=attn_implementation, trust_remote_code=False
            )
    except Exception as error:  # model classes raise what their construction does
        raise CheckpointError(f"{directory}: transformers cannot make this model: {one_line(error)}") from None


def _choose_attention(config: Any, attn_implementation: str | None) -> str | None:
    """Return the attention implementation that is asked for, or the only one in transformers that caps the scores."""
    has_softcap = attn_implementation is None and getattr(config, "attn_logit_softcapping", None)
    return "eager" if has_softcap else attn_implementation


def _check_weights(model: Any, info: Mapping[str, Any], weights: WeightFiles) -> None:
    """Check what transformers reports on loading a model, and separate a head that only the config ties.

    Raises CheckpointError when a weight is missing or misshapen, holds no plain floats, or has the model's own prefix
    and is unknown to the model.
    """
    absent = sorted(str(name) for kind in ("missing_keys", "mismatched_keys") for name in info[kind])
    if absent:
        raise CheckpointError(f"{weights.directory}: weights are missing or misshapen: {', '.join(absent[:5])}")
    own = (f"{model.base_model_prefix}.", "lm_head.")
    unknown = sorted(name for name in info["unexpected_keys"] if name.startswith(own) and not UNUSED.search(name))
    if unknown:
        file = weights.tensors[unknown[0]].file if unknown[0] in weights.tensors else weights.directory
        raise CheckpointError(f"{file} has a tensor {unknown[0]} that {type(model).__name__} does not have")
    for name in weights.tensors:
        if name not in info["unexpected_keys"] and not UNUSED.search(name):
            weights.check_dtype(name)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None and head.weight is not embedding.weight:
        # the checkpoint has two different tables: a config that ties them would lose the head at the next loading
        model.config.tie_word_embeddings = False


@torch.no_grad()
def _check_head(model: Any, directory: Path) -> None:
    """Check that the logits are what `scale_states` and `logits_softcap` say, and nothing more.

    The operators over the head would silently leave out a bias or another scale.
    """
    ids = torch.arange(8)[None]
    hidden = scale_states(model, base_of(model)(input_ids=ids, use_cache=False).last_hidden_state)
    logits = squash(hidden @ model.get_output_embeddings().weight.T, 1.0, logits_softcap(model))
    if not torch.isfinite(logits).all():
        raise CheckpointError(f"{directory}: the model gives NaN or infinite logits; check the weights")
    if not torch.allclose(logits, model(input_ids=ids, use_cache=False).logits, atol=1e-3, rtol=1e-3):
        raise CheckpointError(
            f"{directory}: the head of {model.config.model_type} is more than a matrix product with a softcap or a "
            "divisor (a bias or another scale), which is not supported"
        )


def base_of(model: Any) -> Any:
    """Return the part of a model that computes the hidden states before the head."""
    return model.model if model.base_model is model else model.base_model


def layers_of(model: Any) -> nn.ModuleList:
    """Return the layers of a model: its list of modules that has most of the weights."""
    lists = (module for module in base_of(model).modules() if isinstance(module, nn.ModuleList))
    return max(lists, key=lambda layers: sum(p.numel() for p in layers.parameters()))


def logits_softcap(model: Any) -> float | None:
    """Return the bound of a model's logits, softcap * tanh(logits / softcap), as Gemma 2 has one; None without."""
    return getattr(model.config, "final_logit_softcapping", None) or getattr(model.config, "logits_soft_cap", None)


def logits_divisor(model: Any) -> float | None:
    """Return the number that a model divides its logits by, as Granite does; None without."""
    divisor = getattr(model.config, "logits_scaling", None)
    return None if divisor in (None, 1) else float(divisor)


def scale_states(model: Any, states: Tensor) -> Tensor:
    """Return hidden states whose product with the head are the model's logits: those over the divisor."""
    divisor = logits_divisor(model)
    return states if divisor is None else states / divisor
