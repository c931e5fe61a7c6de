"""Llama 2 and 3, and families that differ from them by windows, biases or scales."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from genssd.engine.common.amounts import format_count
from genssd.engine.families.family import Family, scaled


def _llama(config: Any) -> Mapping[str, Any]:
    # Llama models see everything, whatever windows a config lists
    return {"mlp_bias": bool(config.mlp_bias), "windows": (0,) * config.num_hidden_layers}


def _ministral3(config: Any) -> Mapping[str, Any]:
    rope = config.rope_parameters
    if rope.get("llama_4_scaling_beta"):
        if rope.get("original_max_position_embeddings") is None:
            raise ValueError("rope_parameters has llama_4_scaling_beta, but no original_max_position_embeddings")
        return {"query_growth": (float(rope["llama_4_scaling_beta"]), int(rope["original_max_position_embeddings"]))}
    return {}


def _smollm3(config: Any) -> Mapping[str, Any]:
    if len(config.no_rope_layers) != config.num_hidden_layers:
        listed = format_count(len(config.no_rope_layers), "layer")
        raise ValueError(f"no_rope_layers names {listed} of {config.num_hidden_layers}")
    # a 1 stands for a layer with rotary positions, a 0 for one without
    layer_ropes = tuple(0 if has_rope else None for has_rope in config.no_rope_layers)
    return {"mlp_bias": bool(config.mlp_bias), "layer_ropes": layer_ropes}


def _granite(config: Any) -> Mapping[str, Any]:
    return {
        "mlp_bias": bool(config.mlp_bias),
        "attention_scale": float(config.attention_multiplier),
        "windows": (0,) * config.num_hidden_layers,
        **scaled(
            embedding_multiplier=config.embedding_multiplier,
            residual_multiplier=config.residual_multiplier,
            logits_divisor=config.logits_scaling,
        ),
    }


FAMILIES = {
    "llama": Family(architecture="LlamaForCausalLM", differences=_llama),
    "mistral": Family(architecture="MistralForCausalLM"),
    "ministral": Family(architecture="MinistralForCausalLM"),
    "ministral3": Family(architecture="Ministral3ForCausalLM", differences=_ministral3),
    "smollm3": Family(architecture="SmolLM3ForCausalLM", differences=_smollm3),
    "granite": Family(architecture="GraniteForCausalLM", differences=_granite),
}
