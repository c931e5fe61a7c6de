"""Gemma 2 and Gemma 3: norms before and after each block, scaled embedding, windows in most layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from genssd.engine.families.family import GELU_TANH, Family, scaled
from genssd.engine.families.shape import LayerNames

NAMES = LayerNames(
    attention_post_norm="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    mlp_post_norm="post_feedforward_layernorm",
)


def _gemma2(config: Any) -> Mapping[str, Any]:
    if config.use_bidirectional_attention:
        raise ValueError("use_bidirectional_attention is not supported: the model must not see later tokens")
    return {
        "norm_offset": 1.0,
        "attention_scale": float(config.query_pre_attn_scalar) ** -0.5,
        "attention_softcap": config.attn_logit_softcapping,
        "logits_softcap": config.final_logit_softcapping,
        **scaled(embedding_multiplier=config.hidden_size**0.5),
    }


def _gemma3(config: Any) -> Mapping[str, Any]:
    # transformers' Gemma3ForCausalLM caps no scores of the attention, whatever the config says
    return {**_gemma2(config), "qk_norm": "head", "attention_softcap": None}


FAMILIES = {
    "gemma2": Family(
        architecture="Gemma2ForCausalLM",
        activation_field="hidden_activation",
        activations=GELU_TANH,
        names=NAMES,
        differences=_gemma2,
    ),
    "gemma3_text": Family(
        architecture="Gemma3ForCausalLM",
        activation_field="hidden_activation",
        activations=GELU_TANH,
        names=NAMES,
        differences=_gemma3,
    ),
}
