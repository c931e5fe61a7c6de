"""Qwen2 and 2.5 (biases of queries, keys and values), Qwen3 (norms of queries and keys), and Qwen3's experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from genssd.engine.families.family import Family
from genssd.engine.families.shape import Experts


def _qwen2(config: Any) -> Mapping[str, Any]:
    return {"qkv_bias": True, "output_bias": False}


def _qwen3(config: Any) -> Mapping[str, Any]:
    return {"qk_norm": "head"}


def _qwen3_moe(config: Any) -> Mapping[str, Any]:
    step, dense = config.decoder_sparse_step, config.mlp_only_layers or []
    experts = Experts(
        layers=tuple((i + 1) % step == 0 and i not in dense for i in range(config.num_hidden_layers)),
        count=config.num_experts,
        per_token=config.num_experts_per_tok,
        intermediate_size=config.moe_intermediate_size,
        normalize=bool(config.norm_topk_prob),
    )
    return {"qk_norm": "head", "experts": experts}


FAMILIES = {
    "qwen2": Family(architecture="Qwen2ForCausalLM", differences=_qwen2),
    "qwen3": Family(architecture="Qwen3ForCausalLM", differences=_qwen3),
    "qwen3_moe": Family(architecture="Qwen3MoeForCausalLM", differences=_qwen3_moe),
}
