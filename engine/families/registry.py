"""The model families that the engine's own decoder computes, by the `model_type` of config.json."""

from __future__ import annotations

from genssd.engine.families import experts, gemma, llama, olmo, phi, qwen

FAMILIES = llama.FAMILIES | qwen.FAMILIES | gemma.FAMILIES | phi.FAMILIES | olmo.FAMILIES | experts.FAMILIES


def is_family(model_type: object) -> bool:
    """Return whether a value of the field model_type, which may be anything in JSON, names one of the families."""
    return isinstance(model_type, str) and model_type in FAMILIES
