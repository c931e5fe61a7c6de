"""Checks of the fields of a config.json before they size anything, and the fields of older versions renewed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from genssd.engine.common.errors import CheckpointError
from genssd.engine.common.quoting import quote
from genssd.kernels.rotary import ROPE_TYPES

REQUIRED = {
    "vocab_size": 1 << 24,
    "hidden_size": 1 << 20,
    "intermediate_size": 1 << 22,
    "num_hidden_layers": 10_000,
    "num_attention_heads": 1 << 16,
    "max_position_embeddings": (1 << 31) - 1,
}
"""Fields that a config must have, and the largest value of each."""
MAX_INTEGER = (1 << 31) - 1
"""Largest value of any other integer."""
OPTIONAL = {
    "num_key_value_heads": 1 << 16,
    "head_dim": 1 << 16,
    "sliding_window": (1 << 31) - 1,
    "num_experts": 1 << 16,
    "num_local_experts": 1 << 16,
    "num_experts_per_tok": 1 << 16,
    "moe_intermediate_size": 1 << 22,
    "decoder_sparse_step": 10_000,
}
"""Fields that a config may leave out or set to null, and the largest value of each."""
ROPE_NUMBERS = (
    "rope_theta",
    "factor",
    "original_max_position_embeddings",
    "low_freq_factor",
    "high_freq_factor",
    "beta_fast",
    "beta_slow",
    "attention_factor",
    "partial_rotary_factor",
    "llama_4_scaling_beta",
)
"""Fields of the RoPE parameters that must be positive numbers where they are given."""
POSITIVE_NUMBERS = (
    "partial_rotary_factor",
    "query_pre_attn_scalar",
    "final_logit_softcapping",
    "attn_logit_softcapping",
    "embedding_multiplier",
    "residual_multiplier",
    "attention_multiplier",
    "logits_scaling",
    "swiglu_alpha",
    "swiglu_limit",
    "rope_local_base_freq",
)
"""Other fields that must be positive numbers where they are given."""
SPECIAL_NUMBERS = ("Infinity", "-Infinity", "NaN")
"""Numbers that JSON has no notation for, as transformers names them."""
LAYER_KINDS = ("full_attention", "sliding_attention")
QUANTIZATIONS = {
    "awq": "use the checkpoint that it was made from, usually the same name without -AWQ",
    "gptq": "use the checkpoint that it was made from, usually the same name without -GPTQ",
    "fp8": "use the checkpoint that it was made from, usually the same name without -FP8",
    "fbgemm_fp8": "use the checkpoint that it was made from, usually the same name without -FP8",
    "compressed-tensors": "use the checkpoint that it was made from, usually the same name without -FP8 or -W4A16",
    "bitsandbytes": "use the checkpoint that it was made from, or save it after model.dequantize()",
}
"""What helps with each kind of quantized weights, by its quant_method."""
FOREIGN_FIELDS = frozenset(
    (
        "auto_map",
        "attn_implementation",
        "_attn_implementation",
        "base_model_pp_plan",
        "base_model_tp_plan",
        "distributed_config",
        "experts_implementation",
        "fusion_config",
        "id2label",
        "label2id",
        "num_labels",
        "output_attentions",
        "output_hidden_states",
        "problem_type",
        "return_dict",
        "use_return_dict",
    )
)
"""Fields that a language model does without: options of a run, labels, and in `auto_map` Python files."""


def check_fields(fields: Mapping[str, object], path: Path, *, is_part: bool = False) -> None:
    """Check the types and the ranges of all fields that size a model. Raises CheckpointError naming the field.

    is_part: the fields are the text part of a multimodal config, which leaves out what its class has as defaults.
    """
    kind = fields.get("model_type")
    for name in REQUIRED | OPTIONAL:
        value = fields.get(name)
        if name in fields if name in REQUIRED else value is not None:
            _check_integer(name, value, path)
        elif name in REQUIRED and not is_part:
            raise CheckpointError(f"{path} has no field {name!r}")
    heads, kv_heads = fields.get("num_attention_heads"), fields.get("num_key_value_heads")
    if isinstance(kv_heads, int) and isinstance(heads, int) and heads % kv_heads:
        raise CheckpointError(f"{path}: num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}")
    pad, vocabulary = fields.get("pad_token_id"), fields.get("vocab_size")
    if isinstance(pad, int) and isinstance(vocabulary, int) and not -vocabulary <= pad < vocabulary:
        raise CheckpointError(f"{path}: pad_token_id {quote(pad)} is outside the vocabulary of {vocabulary} tokens")
    if fields.get("text_config") is not None:
        raise CheckpointError(f"{path}: text_config is not supported in a config of model_type {quote(kind)}")
    full = fields.get("max_window_layers")
    if full is not None and (not isinstance(full, int) or isinstance(full, bool) or full < 0):
        raise CheckpointError(f"{path}: max_window_layers must be an integer, not {quote(full)}")
    eps = fields.get("rms_norm_eps", 1e-6)
    if not _is_number(eps) or not 0 < float(eps) <= 1:  # type: ignore[arg-type]
        raise CheckpointError(f"{path}: rms_norm_eps must be a number above 0 and up to 1, not {quote(eps)}")
    for name in ("rope_parameters", "rope_scaling"):
        _check_rope(fields.get(name), name, path)
    _check_rope({name: fields.get(name) for name in ROPE_NUMBERS if name != "factor"}, "config", path)
    for name in POSITIVE_NUMBERS:
        value = fields.get(name)
        if value is not None and not (_is_number(value) and float(value) > 0):  # type: ignore[arg-type]
            raise CheckpointError(f"{path}: {name} must be a positive number, not {quote(value)}")


def check_sizes(fields: Mapping[str, object], path: Path) -> None:
    """Check that no size in a config of any class is beyond all models. Raises CheckpointError naming the field."""
    limits = REQUIRED | OPTIONAL
    for name, value in fields.items():
        largest = limits.get(name, MAX_INTEGER)
        if isinstance(value, int) and value > largest and name not in FOREIGN_FIELDS:
            raise CheckpointError(f"{path}: {quote(name)[1:-1]} must be at most {largest}, not {quote(value)}")


def refuse_quantized(fields: Mapping[str, object], path: Path) -> None:
    """Check that a config names no quantization but MXFP4. Raises CheckpointError that names it and what helps."""
    config = fields.get("quantization_config") or fields.get("compression_config")
    method = config.get("quant_method") if isinstance(config, Mapping) else config
    if not config or method == "mxfp4":
        return
    known = isinstance(method, str) and method.lower() in QUANTIZATIONS
    advice = QUANTIZATIONS[method.lower()] if known else "use the checkpoint that it was made from"  # type: ignore[union-attr]
    named = "" if method is None else f" ({quote(method)[1:-1]})"
    raise CheckpointError(f"{path}: quantized weights{named} are not supported; {advice}")


def modernize(fields: Mapping[str, object]) -> dict[str, object]:
    """Return the fields as transformers 5 takes them, whose types are strict: a float field is not an integer.

    FOREIGN_FIELDS are left out.
    """
    current = {
        name: _decode(value)
        for name, value in fields.items()
        if name not in FOREIGN_FIELDS and not (name in ("quantization_config", "compression_config") and not value)
    }
    for name in ("rms_norm_eps", "initializer_range"):
        value = current.get(name)
        if isinstance(value, int) and not isinstance(value, bool):
            current[name] = float(value)
    # null stands for the default; Qwen2's config class has no field head_dim, and its model takes null for a number
    for name in ("initializer_range", *(("head_dim",) if fields.get("model_type") == "qwen2" else ())):
        if current.get(name, 0) is None:
            del current[name]
    dtype = current.pop("torch_dtype", None)
    dtype = current.pop("dtype", None) or dtype
    if dtype is not None and dtype != "auto":
        current["dtype"] = dtype.removeprefix("torch.") if isinstance(dtype, str) else dtype
    return current


def _decode(value: object) -> Any:
    """Return a value of a config as transformers reads it: {"__float__": "Infinity"} stands for a number."""
    if isinstance(value, Mapping):
        if value.keys() == {"__float__"} and value["__float__"] in SPECIAL_NUMBERS:
            return float(str(value["__float__"]))
        return {name: _decode(part) for name, part in value.items()}
    return [_decode(part) for part in value] if isinstance(value, list) else value


def _check_integer(name: str, value: object, path: Path) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise CheckpointError(f"{path}: {name} must be a positive integer, not {quote(value)}")


def _check_rope(scaling: object, field: str, path: Path) -> None:
    """Check RoPE parameters: `rope_parameters` of transformers 5, or `rope_scaling` of earlier versions."""
    if scaling is None:
        return
    if not isinstance(scaling, Mapping):
        raise CheckpointError(f"{path}: {field} must be an object, not {quote(scaling)}")
    nested = {name: value for name, value in scaling.items() if isinstance(value, Mapping)}
    if nested:
        unknown = [name for name in scaling if name not in LAYER_KINDS]
        if unknown:
            raise CheckpointError(
                f"{path}: {field} that differ by layer must have a layer type each, not {quote(unknown[0])}"
            )
        for name, part in nested.items():
            _check_rope(part, f"{field}.{name}", path)
        return
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if not isinstance(kind, str) or kind not in ROPE_TYPES:
        raise CheckpointError(f"{path}: rope_type {quote(kind)} is not supported; supported: {', '.join(ROPE_TYPES)}")
    for name in ROPE_NUMBERS:
        value = scaling.get(name)
        if value is not None and not (_is_number(value) and float(value) > 0):
            raise CheckpointError(f"{path}: {name} of {field} must be a positive number, not {quote(value)}")


def _is_number(value: object) -> bool:
    """Return whether a value is a finite number; a boolean is none."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False
