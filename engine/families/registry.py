"""The model families that the engine's own decoder computes, by the `model_type` of config.json."""

from __future__ import annotations

from genssd.engine.families import experts, gemma, llama, olmo, phi, qwen

FAMILIES = llama.FAMILIES | qwen.FAMILIES | gemma.FAMILIES | phi.FAMILIES | olmo.FAMILIES | experts.FAMILIES
