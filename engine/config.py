"""The shape of a decoder, read from a checkpoint's config.json.

The defaults of fields that a config leaves out are those of transformers' config classes, which also read older names
of the fields; so the engine and the training, whose models are transformers', understand one config alike.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING

from genssd.engine.amounts import format_count
from genssd.engine.config_fields import check_fields, check_sizes, modernize, refuse_quantized
from genssd.engine.errors import CheckpointError
from genssd.engine.quoting import one_line, quote

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
MAX_POSITIONS = (1 << 31) - 1
"""Largest context length, in tokens: positions are 32-bit integers."""
LFS_POINTER = b"version https://git-lfs"
"""First bytes of the small text file that Git stores in place of a large one."""


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
    max_position_embeddings: int  # the context length in tokens, after RoPE scaling
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
        fields = read_config(directory)
        kind = fields.get("model_type")
        if not isinstance(kind, str) or kind not in ARCHITECTURES:
            supported = ", ".join(ARCHITECTURES)
            raise CheckpointError(f"{path}: model_type {quote(kind)} is not supported; supported: {supported}")
        return _from_transformers(kind, make_transformers_config(fields, path), fields, path)


def read_config(directory: Path) -> Mapping[str, object]:
    """Return the fields of DIRECTORY/config.json.

    Raises CheckpointError when it is missing, holds no JSON object or names a quantization.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{directory} has no config.json: not a Hugging Face model directory")
    fields = read_fields(path)
    refuse_quantized(fields, path)
    return fields


def read_fields(path: Path) -> Mapping[str, object]:
    """Return the fields of a checkpoint's JSON file. Raises CheckpointError when it holds no object."""
    refuse_pointer(path)
    try:
        fields = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {one_line(error)}") from None
    if not isinstance(fields, Mapping):
        raise CheckpointError(f"{path} must hold a JSON object, not {quote(fields)}")
    return fields


def refuse_pointer(path: Path) -> None:
    """Check that a file is not the pointer that Git LFS leaves in its place. Raises CheckpointError if it is."""
    if not path.is_file():
        return
    try:
        with path.open("rb") as stream:
            start = stream.read(len(LFS_POINTER))
    except OSError:
        return
    if start == LFS_POINTER:
        raise CheckpointError(f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull` in {path.parent}")


def is_known_to_transformers(fields: Mapping[str, object]) -> bool:
    """Return whether transformers has a config class for the model_type of a config.json."""
    kind = fields.get("model_type")
    return isinstance(kind, str) and kind in CONFIG_MAPPING


def make_transformers_config(fields: Mapping[str, object], path: Path) -> Any:
    """Return transformers' config object for the fields of a config.json, without running any Python of a checkpoint.

    path: named in messages. Raises CheckpointError when transformers does not know the model_type or refuses a field.
    """
    kind = str(fields.get("model_type"))
    if not is_known_to_transformers(fields):
        code = "; the Python files of a checkpoint are never run" if "auto_map" in fields else ""
        raise CheckpointError(f"{path}: transformers has no model_type {quote(fields.get('model_type'))}{code}")
    check_sizes(fields, path)
    if kind in ARCHITECTURES:
        check_fields(fields, path)
    try:
        return CONFIG_MAPPING[kind].from_dict(modernize(fields))
    except Exception as error:  # a config class raises what its checks and its arithmetic do
        raise CheckpointError(f"{path}: {one_line(error)}") from None


def _from_transformers(kind: str, config: Any, fields: Mapping[str, object], path: Path) -> ModelConfig:
    """Return the shape that transformers' config object describes. fields: those of config.json."""
    heads, kv_heads = int(config.num_attention_heads), int(config.num_key_value_heads)
    if heads % kv_heads:
        raise CheckpointError(f"{path}: num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}")
    head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    if head_dim < 2 or head_dim % 2:
        raise CheckpointError(f"{path}: head_dim must be an even number, not {head_dim}: RoPE turns pairs of numbers")
    rope, positions = _rope(config, path)
    attention_bias = bool(getattr(config, "attention_bias", False))
    return ModelConfig(
        model_type=kind,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=positions,
        rms_norm_eps=float(config.rms_norm_eps),
        tie_word_embeddings=bool(config.tie_word_embeddings),
        rope_parameters=rope,
        qkv_bias=kind == "qwen2" or attention_bias,
        output_bias=kind != "qwen2" and attention_bias,
        mlp_bias=kind == "llama" and bool(config.mlp_bias),
        qk_norm=kind == "qwen3",
        windows=_windows(config, path),
        eos_token_ids=_eos(fields, path),
        dtype=None if config.dtype is None else str(config.dtype).removeprefix("torch."),
    )


def _rope(config: Any, path: Path) -> tuple[Mapping[str, object], int]:
    """Return the RoPE parameters and the context length in tokens, which vLLM counts alike.

    Linear scaling multiplies max_position_embeddings, YaRN original_max_position_embeddings; with the other types
    max_position_embeddings is the context after scaling.
    """
    rope: dict[str, Any] = dict(config.rope_parameters)
    positions = config.max_position_embeddings
    if rope["rope_type"] == "linear" and rope.get("factor") is None:
        raise CheckpointError(f"{path}: rope_type linear needs the field 'factor'")
    if rope["rope_type"] == "yarn":
        original = rope["original_max_position_embeddings"]
        rope["factor"] = rope.get("factor") or positions / original
        positions = original * rope["factor"]
    elif rope["rope_type"] == "linear":
        positions *= rope["factor"]
    if not 1 <= positions <= MAX_POSITIONS:
        raise CheckpointError(f"{path}: RoPE scaling gives a context of {positions:g} tokens: check its factor")
    return rope, int(positions)


def _windows(config: Any, path: Path) -> tuple[int, ...]:
    """Return the attention window of each layer; 0 for full attention. Llama models have none, whatever is listed."""
    layers: int = config.num_hidden_layers
    window: int | None = getattr(config, "sliding_window", None)
    kinds: list[str] | None = getattr(config, "layer_types", None)
    if config.model_type == "llama":
        return (0,) * layers
    if kinds is None:
        return (window or 0,) * layers
    unknown = [kind for kind in kinds if kind not in ("full_attention", "sliding_attention")]
    if unknown:
        raise CheckpointError(f"{path}: layer_types {quote(unknown[0])} is not supported")
    if len(kinds) != layers:
        raise CheckpointError(f"{path}: layer_types names {format_count(len(kinds), 'layer')} of {layers}")
    if not window and "sliding_attention" in kinds:
        raise CheckpointError(
            f"{path}: layer_types has sliding_attention, but use_sliding_window and sliding_window give no window"
        )
    return tuple(window or 0 if kind == "sliding_attention" else 0 for kind in kinds)


def _eos(fields: Mapping[str, object], path: Path) -> tuple[int, ...]:
    """Return the tokens that end a sequence. generation_config.json overrides config.json: chat models list several ids
    there."""
    generation = path.with_name("generation_config.json")
    value = read_fields(generation).get("eos_token_id") if generation.is_file() else None
    value = fields.get("eos_token_id") if value is None else value
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise CheckpointError(f"{path}: eos_token_id must be an integer or a list of them, not {quote(value)}")
    return tuple(ids)
