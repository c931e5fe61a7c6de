"""What the engine reads in the config.json of every causal language model, whoever computes the model.

The defaults of fields that a config leaves out are those of transformers' config classes, which also read older names
of the fields. The shape of the models that the engine's own decoder computes is in config.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

from genssd.engine.checkpoints.config_fields import check_fields, check_sizes, modernize
from genssd.engine.checkpoints.config_files import read_fields
from genssd.engine.checkpoints.wrappers import text_part
from genssd.engine.common.errors import CheckpointError
from genssd.engine.common.quoting import one_line, quote
from genssd.engine.families.registry import FAMILIES, is_family

MAX_POSITIONS = (1 << 31) - 1
"""Largest context length, in tokens: positions are 32-bit integers."""
POSITION_FIELDS = ("max_position_embeddings", "max_sequence_length", "max_seq_len", "seq_length")
"""Fields of config classes that hold the context length, the usual one first. A model without any has no limit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BasicConfig:
    """What every model has; names that config.json has as well mean the same there."""

    model_type: str
    vocab_size: int
    max_position_embeddings: int  # the context length in tokens, after RoPE scaling
    eos_token_ids: tuple[int, ...]
    dtype: str | None

    @staticmethod
    def from_transformers(config: Any, fields: Mapping[str, object], path: Path) -> BasicConfig:
        """Read transformers' config object. fields: of config.json, or of its text part. path: named in messages.

        Raises CheckpointError where transformers has no causal language model of that class, and on a field that is no
        size.
        """
        kind = str(fields.get("model_type"))
        if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or config.is_encoder_decoder:
            raise CheckpointError(
                f"{path}: model_type {quote(kind)} is no causal language model: transformers has no such class for it"
            )
        positions = next(
            (p for name in POSITION_FIELDS if (p := getattr(config, name, None)) is not None), MAX_POSITIONS
        )
        sizes = {"vocab_size": getattr(config, "vocab_size", None), "max_position_embeddings": positions}
        for name, value in sizes.items():
            if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= MAX_POSITIONS:
                raise CheckpointError(f"{path}: {name} must be a positive integer, not {quote(value)}")
        return BasicConfig(
            model_type=kind,
            vocab_size=config.vocab_size,
            max_position_embeddings=positions,
            eos_token_ids=read_end_tokens(fields, path),
            dtype=name_dtype(config),
        )


def is_known_to_transformers(fields: Mapping[str, object]) -> bool:
    """Return whether transformers has a config class for the model_type of a config.json."""
    kind = fields.get("model_type")
    return isinstance(kind, str) and kind in CONFIG_MAPPING


def is_supported(fields: Mapping[str, object]) -> bool:
    """Return whether the engine's decoder computes the model of a config.json, or its text part."""
    return is_family((text_part(fields) or fields).get("model_type"))


def make_transformers_config(fields: Mapping[str, object], path: Path) -> Any:
    """Return transformers' config object for the fields of a config.json, without running any Python of a checkpoint.

    Of a multimodal model whose text part is supported, it is that of the text part. path: named in messages. Raises
    CheckpointError when transformers does not know the model_type or refuses a field.
    """
    part = text_part(fields)
    check_sizes(fields, path)
    fields, is_part = (fields, False) if part is None else (part, True)
    kind = str(fields.get("model_type"))
    if not is_known_to_transformers(fields):
        code = "; the Python files of a checkpoint are never run" if "auto_map" in fields else ""
        raise CheckpointError(f"{path}: transformers has no model_type {quote(fields.get('model_type'))}{code}")
    check_sizes(fields, path)
    if kind in FAMILIES:
        check_fields(fields, path, is_part=is_part)
    try:
        return CONFIG_MAPPING[kind].from_dict(modernize(fields))
    except Exception as error:  # a config class raises what its checks and its arithmetic do
        raise CheckpointError(f"{path}: {one_line(error)}") from None


def name_dtype(config: Any) -> str | None:
    """Return the name of the data type in transformers' config object, such as "bfloat16"; None where it has none."""
    return None if config.dtype is None else str(config.dtype).removeprefix("torch.")


def read_end_tokens(fields: Mapping[str, object], path: Path) -> tuple[int, ...]:
    """Return the tokens that end a sequence. generation_config.json overrides config.json: chat models list several ids
    there."""
    generation = path.with_name("generation_config.json")
    value = read_fields(generation).get("eos_token_id") if generation.is_file() else None
    value = fields.get("eos_token_id") if value is None else value
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise CheckpointError(f"{path}: eos_token_id must be an integer or a list of them, not {quote(value)}")
    return tuple(ids)
