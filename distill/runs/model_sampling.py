"""The sampling that a model's generation_config.json recommends: taken where it is asked for, else named."""

from __future__ import annotations

import dataclasses
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from genssd.distill.runs.sampling_options import ModelSampling
from genssd.engine.checkpoints.address import is_url
from genssd.engine.checkpoints.checkpoint import locate
from genssd.engine.checkpoints.config_files import read_fields
from genssd.engine.common.errors import CheckpointError, InputError
from genssd.engine.common.model_choices import Role
from genssd.engine.common.quoting import quote
from genssd.engine.engine import Engine
from genssd.engine.models.sampling import Sampling
from genssd.engine.served.teacher import locate_tokenizer

logger = logging.getLogger(__name__)

FIELDS = ("temperature", "top_p", "top_k", "min_p")
"""Fields of generation_config.json that are options of `Sampling`."""
NEUTRAL = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "no_repeat_ngram_size": 0}
"""Other fields that change what is drawn, which are not implemented, each with the value that changes nothing."""


C = TypeVar("C", bound=ModelSampling)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recommendation:
    """What a model's generation_config.json says about sampling."""

    sampling: Sampling
    ignored: tuple[str, ...]
    """Settings that are not implemented, as name and value."""


def read_recommendation(directory: Path) -> Recommendation | None:
    """Return the recommended sampling of a checkpoint; None where its generation_config.json names none.

    Raises CheckpointError naming the file and the field that has no usable value.
    """
    path = directory / "generation_config.json"
    fields = read_fields(path) if path.is_file() else {}
    values: dict[str, Any] = {}
    for name in FIELDS:
        value: Any = fields.get(name)
        if value is None:
            continue
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not is_number or (name == "top_k" and value != int(value)):
            raise CheckpointError(f"{path}: {name} must be a number, not {quote(value)}")
        values[name] = int(value) if name == "top_k" else float(value)
    if not values:
        return None
    if values.get("temperature") == 0.0:
        values = {"temperature": 0.0}  # of which no filter changes anything
    try:
        sampling = Sampling(**values)
    except InputError as error:
        raise CheckpointError(f"{path}: {error}") from None
    unused = {name: fields[name] for name, neutral in NEUTRAL.items() if fields.get(name) not in (None, neutral)}
    return Recommendation(sampling=sampling, ignored=tuple(f"{name} {value}" for name, value in unused.items()))


def choose_sampling(config: C, model: str, role: Role, engine: Engine | None = None) -> C:
    """Return the config with the sampling of this run, and log what the model recommends.

    model: the one that writes, by the field of the config with the name or the directory. engine: loaded already.
    Raises InputError as `find_sampling` does.
    """
    directory = None if engine is None else engine.tokenizer(role).directory
    recommendation = find_sampling(config, model, directory)
    if recommendation is None:
        return config
    values: Any = config  # a config class with the field `sampling`
    if not config.generation_config:
        chosen, default = values.sampling, _find_default(config)
        if chosen == default and recommendation.sampling != default:
            logger.info(
                "the %s's generation_config.json recommends %s; this run samples with %s; take the model's own with "
                "--generation-config",
                role, describe_sampling(recommendation.sampling), describe_sampling(chosen),
            )  # fmt: skip
        return config
    ignored = f"; not implemented: {', '.join(recommendation.ignored)}" if recommendation.ignored else ""
    logger.info(
        "the %s samples with %s, by its generation_config.json%s",
        role, describe_sampling(recommendation.sampling), ignored,
    )  # fmt: skip
    changed: C = dataclasses.replace(values, sampling=recommendation.sampling)
    return changed


def find_sampling(config: ModelSampling, model: str, directory: Path | None = None) -> Recommendation | None:
    """Return what the generation_config.json of the model that writes recommends; None where it says nothing.

    model: its name, or the URL of a server. directory: that of the model where it is loaded. Raises InputError where
    both the file and options of `sampling` are asked for, or the file is asked for and names nothing.
    """
    if directory is None and is_url(model):
        tokenizer = getattr(config, "teacher_tokenizer", None)
        if not config.generation_config:
            return None
        if tokenizer is None:
            raise InputError("generation_config: the teacher is a server; give teacher_tokenizer, which has the file")
        directory = locate_tokenizer(tokenizer)
    directory = directory or locate(model)
    recommendation = read_recommendation(directory)
    if not config.generation_config:
        return recommendation
    if recommendation is None:
        raise InputError(
            f"generation_config: {directory / 'generation_config.json'} names none of {', '.join(FIELDS)}; give "
            "options of sampling instead"
        )
    values: Any = config  # a config class with the field `sampling`
    if values.sampling not in (_find_default(config), recommendation.sampling):
        raise InputError("give generation_config or options of sampling, not both")
    return recommendation


def describe_sampling(sampling: Sampling) -> str:
    """Return the temperature and the filters in words, without those that keep all tokens."""
    neutral = Sampling()
    filters = [name for name in FIELDS[1:] if getattr(sampling, name) != getattr(neutral, name)]
    return ", ".join(f"{name} {getattr(sampling, name):g}" for name in ("temperature", *filters))


def _find_default(config: ModelSampling) -> Sampling:
    """Return the sampling of a config that was given no option of it."""
    field: Any = next(field for field in dataclasses.fields(config) if field.name == "sampling")
    default: Sampling = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    return default
