"""Phi-3, Phi-3.5 and Phi-4, mini ones included: joined projections, rotary positions on a part of each head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from genssd.engine.families.family import Family
from genssd.engine.families.shape import LayerNames


def _phi3(config: Any) -> Mapping[str, Any]:
    return {"qkv_bias": False, "output_bias": False}


FAMILIES = {
    "phi3": Family(
        architecture="Phi3ForCausalLM",
        names=LayerNames(qkv=("self_attn.qkv_proj",), gate_up=("mlp.gate_up_proj",)),
        differences=_phi3,
    )
}
