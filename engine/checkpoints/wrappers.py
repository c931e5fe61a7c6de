"""The text part of multimodal checkpoints, such as those of Gemma 3 and Mistral 3, in whose config.json it is
`text_config`. Only the text part is loaded; the tensors of the encoders are left in their files.

A text part counts where the engine's decoder computes it, or transformers has a causal language model for it alone."""

from __future__ import annotations

import re
from collections.abc import Mapping

from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

from genssd.engine.families.registry import FAMILIES, is_family

INHERITED = ("eos_token_id", "bos_token_id", "pad_token_id", "dtype", "torch_dtype", "tie_word_embeddings")
"""Fields that a text part takes from the config around it where it does not have them itself."""
KEY_MAPPING = {r"^(model\.)?language_model\.(model\.)?(?!lm_head)": "model.", r"^language_model\.lm_head\.": "lm_head."}
"""Regular expressions of the beginnings of tensor names in a multimodal checkpoint, and what takes their place."""


def text_part(fields: Mapping[str, object]) -> Mapping[str, object] | None:
    """Return the fields of the text part of a config.json; None where there is none that is a model by itself."""
    part, kind = fields.get("text_config"), fields.get("model_type")
    if not isinstance(part, Mapping) or is_family(kind) or not _is_language_model(part.get("model_type")):
        return None
    inherited = {name: fields[name] for name in INHERITED if part.get(name) is None and fields.get(name) is not None}
    return {**part, **inherited}


def _is_language_model(kind: object) -> bool:
    return isinstance(kind, str) and (
        kind in FAMILIES or (kind in CONFIG_MAPPING and CONFIG_MAPPING[kind] in MODEL_FOR_CAUSAL_LM_MAPPING)
    )


def text_name(name: str) -> str:
    """Return the name that a tensor of a multimodal checkpoint has in its text part."""
    for pattern, replacement in KEY_MAPPING.items():
        name, count = re.subn(pattern, replacement, name)
        if count:
            break
    return name
