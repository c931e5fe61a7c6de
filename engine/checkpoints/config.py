"""The shape of a decoder, read from a checkpoint's config.json.

The defaults of fields that a config leaves out are those of transformers' config classes, which also read older names
of the fields; so the engine and the training, whose models are transformers', understand one config alike. What differs
between the model families is in families/.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from genssd.engine.checkpoints.basic_config import (
    MAX_POSITIONS,
    BasicConfig,
    is_supported,
    make_transformers_config,
    name_dtype,
    read_end_tokens,
)
from genssd.engine.checkpoints.config_files import read_config
from genssd.engine.checkpoints.wrappers import text_part
from genssd.engine.common.amounts import format_count
from genssd.engine.common.errors import CheckpointError
from genssd.engine.common.quoting import quote
from genssd.engine.families.family import Family
from genssd.engine.families.registry import FAMILIES
from genssd.engine.families.shape import LLAMA_NAMES, ActivationName, Experts, LayerNames, QkNorm, Rope


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig(BasicConfig):
    """The shape of a decoder; names that config.json has as well mean the same there.

    A multiplier, softcap or offset of None is not applied.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    ropes: tuple[Rope, ...]
    layer_ropes: tuple[int | None, ...]  # per layer: index into ropes; None: queries and keys are not rotated
    qkv_bias: bool
    output_bias: bool  # of the attention's output projection
    mlp_bias: bool
    windows: tuple[int, ...]  # per layer: how many positions a token sees, itself included; 0: all
    attention_scale: float
    activation: ActivationName = "silu"
    names: LayerNames = LLAMA_NAMES
    is_wrapped: bool = False  # whether the weights are the text part of a multimodal checkpoint
    norm_offset: float | None = None  # see kernels/norm.rms_norm
    qk_norm: QkNorm | None = None
    attention_softcap: float | None = None
    sinks: bool = False  # whether every head has a score that counts in the softmax and has no value
    query_growth: tuple[float, int] | None = None  # (b, n): queries are multiplied by 1 + b log(1 + position // n)
    embedding_multiplier: float | None = None
    residual_multiplier: float | None = None  # of what attention and feed-forward add to the residual stream
    logits_divisor: float | None = None
    logits_softcap: float | None = None
    experts: Experts | None = None

    @staticmethod
    def load(directory: Path) -> ModelConfig:
        """Read DIRECTORY/config.json. Raises CheckpointError naming the field that is missing or unsupported."""
        path = directory / "config.json"
        fields = read_config(directory)
        part = text_part(fields)
        kind = (part or fields).get("model_type")
        family = FAMILIES.get(kind) if isinstance(kind, str) else None
        if family is None:
            supported = ", ".join(sorted(FAMILIES))
            raise CheckpointError(
                f"{path}: model_type {quote(kind)} is not supported by the engine's own decoder (backend genssd); "
                f"supported: {supported}"
            )
        config = make_transformers_config(fields, path)
        return _from_transformers(family, config, part or fields, path, is_wrapped=part is not None)


def load_config(directory: Path) -> BasicConfig:
    """Read DIRECTORY/config.json of any causal language model; return a ModelConfig where the own decoder computes it.

    Raises CheckpointError naming the field at fault, and on a model that transformers has no causal class for.
    """
    fields = read_config(directory)
    if is_supported(fields):
        return ModelConfig.load(directory)
    path = directory / "config.json"
    return BasicConfig.from_transformers(make_transformers_config(fields, path), text_part(fields) or fields, path)


def _from_transformers(
    family: Family, config: Any, fields: Mapping[str, object], path: Path, *, is_wrapped: bool
) -> ModelConfig:
    """Return the shape that transformers' config object describes. fields: of config.json, or of its text part."""
    heads, kv_heads = int(config.num_attention_heads), int(config.num_key_value_heads)
    if heads % kv_heads:
        raise CheckpointError(f"{path}: num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}")
    head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    if head_dim < 2 or head_dim % 2:
        raise CheckpointError(f"{path}: head_dim must be an even number, not {head_dim}: RoPE turns pairs of numbers")
    activation = getattr(config, family.activation_field)
    if activation not in family.activations:
        supported = ", ".join(family.activations)
        raise CheckpointError(
            f"{path}: {family.activation_field} {quote(activation)} is not supported; supported: {supported}"
        )
    kinds = _layer_kinds(config, path)
    ropes, layer_ropes, positions = _ropes(config, kinds, head_dim, path)
    attention_bias = bool(getattr(config, "attention_bias", False))
    shape: dict[str, Any] = {
        "model_type": str(fields["model_type"]),
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": positions,
        "rms_norm_eps": float(config.rms_norm_eps),
        "tie_word_embeddings": bool(config.tie_word_embeddings),
        "ropes": ropes,
        "layer_ropes": layer_ropes,
        "qkv_bias": attention_bias,
        "output_bias": attention_bias,
        "mlp_bias": False,
        "eos_token_ids": read_end_tokens(fields, path),
        "dtype": name_dtype(config),
        "attention_scale": head_dim**-0.5,
        "activation": family.activations[activation],
        "names": family.names,
        "is_wrapped": is_wrapped,
    }
    try:
        shape |= family.differences(config)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None
    experts = shape.get("experts")
    if experts is not None and experts.per_token > experts.count:
        raise CheckpointError(
            f"{path}: num_experts_per_tok {experts.per_token} is more than the {experts.count} experts of the model"
        )
    if "windows" not in shape:
        shape["windows"] = _windows(config, kinds, path)
    return ModelConfig(**shape)


def _layer_kinds(config: Any, path: Path) -> Sequence[str] | None:
    """Return the layer_types of a config; None where it has none."""
    kinds: list[str] | None = getattr(config, "layer_types", None)
    if kinds is None:
        return None
    unknown = [kind for kind in kinds if kind not in ("full_attention", "sliding_attention")]
    if unknown:
        raise CheckpointError(f"{path}: layer_types {quote(unknown[0])} is not supported")
    if len(kinds) != config.num_hidden_layers:
        raise CheckpointError(
            f"{path}: layer_types names {format_count(len(kinds), 'layer')} of {config.num_hidden_layers}"
        )
    return kinds


def _windows(config: Any, kinds: Sequence[str] | None, path: Path) -> tuple[int, ...]:
    """Return the attention window of each layer; 0 for full attention."""
    window: int | None = getattr(config, "sliding_window", None)
    if kinds is None:
        return tuple([window or 0] * config.num_hidden_layers)
    if not window and "sliding_attention" in kinds:
        raise CheckpointError(
            f"{path}: layer_types has sliding_attention, but use_sliding_window and sliding_window give no window"
        )
    return tuple(window or 0 if kind == "sliding_attention" else 0 for kind in kinds)


def _ropes(
    config: Any, kinds: Sequence[str] | None, head_dim: int, path: Path
) -> tuple[tuple[Rope, ...], tuple[int, ...], int]:
    """Return the rotary embeddings, which of them each layer has, and the context length in tokens.

    RoPE parameters may be one object, or one for each of the layer_types.
    """
    parameters, layers = config.rope_parameters, config.num_hidden_layers
    if "rope_type" in parameters:
        rope, positions = _rope(parameters, config, head_dim, path)
        return (rope,), (0,) * layers, positions
    used = sorted(set(kinds or ()))
    absent = [kind for kind in used if not isinstance(parameters.get(kind), Mapping)]
    if absent or not used:
        raise CheckpointError(
            f"{path}: rope_parameters has no object for {quote(absent[0] if absent else 'rope_type')}"
        )
    pairs = [_rope(parameters[kind], config, head_dim, path) for kind in used]
    ropes, layer_ropes = tuple(rope for rope, _ in pairs), tuple(used.index(kind) for kind in kinds or ())
    return ropes, layer_ropes, max(positions for _, positions in pairs)


def _rope(parameters: Mapping[str, Any], config: Any, head_dim: int, path: Path) -> tuple[Rope, int]:
    """Return a rotary embedding, and the context length in tokens, which vLLM counts alike.

    Linear scaling multiplies max_position_embeddings, YaRN original_max_position_embeddings; with the other types
    max_position_embeddings is the context after scaling.
    """
    rope: dict[str, Any] = dict(parameters)
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
    width = int(head_dim * (rope.pop("partial_rotary_factor", None) or 1))
    if width < 2 or width % 2 or width > head_dim:
        raise CheckpointError(
            f"{path}: partial_rotary_factor must leave an even number of rotated values, at most the {head_dim} of a "
            f"head, not {width}"
        )
    return Rope(parameters=rope, width=width), int(positions)
