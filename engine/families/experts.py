"""Mixtral and GPT-OSS: mixtures of experts in every layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from genssd.engine.families.family import Family
from genssd.engine.families.shape import ExpertNames, Experts, LayerNames


def _mixtral(config: Any) -> Mapping[str, Any]:
    experts = Experts(
        layers=(True,) * config.num_hidden_layers,
        count=config.num_local_experts,
        per_token=config.num_experts_per_tok,
        intermediate_size=config.intermediate_size,
        normalize=True,
    )
    return {"experts": experts}


def _gpt_oss(config: Any) -> Mapping[str, Any]:
    experts = Experts(
        layers=(True,) * config.num_hidden_layers,
        count=config.num_local_experts,
        per_token=config.num_experts_per_tok,
        intermediate_size=config.intermediate_size,
        normalize=False,
        select_first=True,
        biased=True,
        alpha=float(config.swiglu_alpha),
        limit=float(config.swiglu_limit),
    )
    return {"experts": experts, "activation": "clamped", "norm_offset": 0.0, "sinks": True}


FAMILIES = {
    "mixtral": Family(
        architecture="MixtralForCausalLM",
        names=LayerNames(
            experts=ExpertNames(
                router="block_sparse_moe.gate",
                parts=(
                    "block_sparse_moe.experts.{}.w1",
                    "block_sparse_moe.experts.{}.w3",
                    "block_sparse_moe.experts.{}.w2",
                ),
            )
        ),
        differences=_mixtral,
    ),
    "gpt_oss": Family(
        architecture="GptOssForCausalLM",
        names=LayerNames(experts=ExpertNames(router="mlp.router", parts=None)),
        differences=_gpt_oss,
    ),
}
