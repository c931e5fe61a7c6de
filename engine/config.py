"""The shape of a decoder, read from a checkpoint's config.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from genssd.engine.errors import CheckpointError
from genssd.kernels.rotary import ROPE_TYPES

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The shape of a dense decoder of the Llama, Qwen2 or Qwen3 class; the names are those of config.json."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    rope_parameters: Mapping[str, object]
    qkv_bias: bool
    output_bias: bool  # of the attention's output projection
    mlp_bias: bool
    qk_norm: bool
    windows: tuple[int, ...]  # per layer: how many positions a token sees, itself included; 0: all
    eos_token_ids: tuple[int, ...]
    dtype: str | None

    @staticmethod
    def load(directory: Path) -> ModelConfig:
        """Read DIRECTORY/config.json. Raises CheckpointError naming the field that is missing or unsupported."""
        path = directory / "config.json"
        if not path.exists():
            raise CheckpointError(f"{directory} has no config.json: not a Hugging Face model directory")
        try:
            return _parse(read_fields(path), path)
        except KeyError as missing:
            raise CheckpointError(f"{path} has no field {missing}") from None


def read_fields(path: Path) -> Mapping[str, object]:
    """Return the fields of a checkpoint's JSON file. Raises CheckpointError when it holds no object."""
    try:
        fields = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(fields, Mapping):
        raise CheckpointError(f"{path} must hold a JSON object, not {fields!r}")
    return fields


def _parse(fields: Mapping[str, object], path: Path) -> ModelConfig:
    kind = fields.get("model_type")
    if kind not in ARCHITECTURES:
        raise CheckpointError(f"{path}: model_type {kind!r} is not supported; supported: {', '.join(ARCHITECTURES)}")
    if fields.get("hidden_act", "silu") != "silu":
        raise CheckpointError(f"{path}: hidden_act {fields['hidden_act']!r} is not supported; supported: silu")
    if fields.get("quantization_config"):
        raise CheckpointError(f"{path}: quantized weights are not supported; use the original checkpoint")

    def integer(name: str, default: int | None = None) -> int:
        value = fields[name] if default is None else fields.get(name)
        value = default if value is None else value
        if not isinstance(value, int) or value <= 0:
            raise CheckpointError(f"{path}: {name} must be a positive integer, not {value!r}")
        return value

    heads = integer("num_attention_heads")
    kv_heads = integer("num_key_value_heads", heads)
    if heads % kv_heads:
        raise CheckpointError(f"{path}: num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}")
    eps = fields.get("rms_norm_eps", 1e-6)
    if not isinstance(eps, int | float):
        raise CheckpointError(f"{path}: rms_norm_eps must be a number, not {eps!r}")
    attention_bias = bool(fields.get("attention_bias", False))
    return ModelConfig(
        model_type=str(kind),
        vocab_size=integer("vocab_size"),
        hidden_size=integer("hidden_size"),
        intermediate_size=integer("intermediate_size"),
        num_hidden_layers=integer("num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=integer("head_dim", integer("hidden_size") // heads),
        max_position_embeddings=integer("max_position_embeddings"),
        rms_norm_eps=float(eps),
        tie_word_embeddings=bool(fields.get("tie_word_embeddings", False)),
        rope_parameters=_rope(fields, path),
        qkv_bias=kind == "qwen2" or attention_bias,
        output_bias=kind != "qwen2" and attention_bias,
        mlp_bias=bool(fields.get("mlp_bias", False)) and kind == "llama",
        qk_norm=kind == "qwen3",
        windows=_windows(fields, integer("num_hidden_layers"), path),
        eos_token_ids=_eos(fields, path),
        dtype=str(fields.get("dtype") or fields.get("torch_dtype") or "") or None,
    )


def _rope(fields: Mapping[str, object], path: Path) -> Mapping[str, object]:
    """Return the RoPE parameters: `rope_parameters` of transformers 5, or `rope_scaling` and `rope_theta` of earlier
    versions."""
    scaling = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    if not isinstance(scaling, Mapping):
        raise CheckpointError(f"{path}: rope_parameters must be an object, not {scaling!r}")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in ROPE_TYPES:
        raise CheckpointError(f"{path}: rope_type {kind!r} is not supported; supported: {', '.join(ROPE_TYPES)}")
    if scaling.get("partial_rotary_factor", fields.get("partial_rotary_factor", 1.0)) != 1.0:
        raise CheckpointError(f"{path}: partial_rotary_factor is not supported")
    theta = scaling.get("rope_theta") or fields.get("rope_theta") or 10000.0
    original = scaling.get("original_max_position_embeddings") or fields.get("original_max_position_embeddings")
    return {**scaling, "rope_type": kind, "rope_theta": theta, "original_max_position_embeddings": original}


def _windows(fields: Mapping[str, object], layers: int, path: Path) -> tuple[int, ...]:
    """Return the attention window of each layer; 0 for full attention."""
    window = fields.get("sliding_window")
    if not fields.get("use_sliding_window") or not isinstance(window, int):
        return (0,) * layers
    kinds = fields.get("layer_types")
    if not isinstance(kinds, list):
        full = fields.get("max_window_layers", layers)
        if not isinstance(full, int):
            raise CheckpointError(f"{path}: max_window_layers must be an integer, not {full!r}")
        kinds = ["full_attention"] * full + ["sliding_attention"] * max(0, layers - full)
    return tuple(window if kind == "sliding_attention" else 0 for kind in kinds[:layers])


def _eos(fields: Mapping[str, object], path: Path) -> tuple[int, ...]:
    """Return the tokens that end a sequence. generation_config.json overrides config.json: chat models list several ids
    there."""
    generation = path.with_name("generation_config.json")
    value = read_fields(generation).get("eos_token_id") if generation.exists() else None
    value = fields.get("eos_token_id") if value is None else value
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(i, int) for i in ids):
        raise CheckpointError(f"{path}: eos_token_id must be an integer or a list of them, not {value!r}")
    return tuple(ids)
