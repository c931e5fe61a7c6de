"""OLMo-2 and OLMo-3: norms after each block instead of before it, and of all queries and keys of a token together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from genssd.engine.families.family import Family
from genssd.engine.families.shape import LayerNames

NAMES = LayerNames(
    attention_norm=None,
    attention_post_norm="post_attention_layernorm",
    mlp_norm=None,
    mlp_post_norm="post_feedforward_layernorm",
)


def _olmo(config: Any) -> Mapping[str, Any]:
    return {"norm_offset": 0.0, "qk_norm": "width"}


FAMILIES = {
    "olmo2": Family(architecture="Olmo2ForCausalLM", names=NAMES, differences=_olmo),
    "olmo3": Family(architecture="Olmo3ForCausalLM", names=NAMES, differences=_olmo),
}
