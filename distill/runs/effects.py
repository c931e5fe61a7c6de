"""Settings without an effect: one that was changed although another one turns it off is an error, and no silence.

A config class says in its table NEEDS what a field needs to have an effect, in one line each:

    NEEDS: ClassVar[Needs] = {"beta": Need(lambda o: o.kd_loss == "jsd", "kd_loss jsd")}

Fields that are in no table always have an effect. The tables of classes of the engine, which knows nothing of configs,
are here. A value equal to the default cannot be told from one that was not given.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from genssd.engine.common.errors import InputError
from genssd.engine.decoding.chunk import Chunk
from genssd.engine.models.sampling import Sampling
from genssd.engine.search.search_options import SearchOptions


@dataclass(frozen=True, slots=True)
class Need:
    """What the other fields of a config must be for a field to have an effect."""

    is_met: Callable[[Any], bool]
    """Function that takes the config of the field."""
    text: str
    """The need in words, for the message: "it needs" this."""


Needs = Mapping[str, Need]
"""The needs of fields by name. The field may be a nested config, or a field of it: "templates.hint"."""

_HAS_TEMPERATURE = Need(lambda o: o.temperature > 0.0, "a temperature above 0")
ENGINE_NEEDS: Mapping[type, Needs] = {
    Sampling: {name: _HAS_TEMPERATURE for name in ("top_p", "top_k", "min_p")},
    Chunk: {"limit": Need(lambda o: o.until is not None, "a delimiter (until)")},
    SearchOptions: {
        **{
            name: Need(lambda o: o.candidates > 1, "at least 2 candidates")
            for name in ("beam", "selection_temperature")
        },
        "max_resamples": Need(lambda o: o.on_unlearnable == "resample", "on_unlearnable resample"),
        "min_chunk_tokens": Need(lambda o: o.on_unlearnable == "shorten", "on_unlearnable shorten"),
    },
}


def check_effects(config: Any) -> None:
    """Raise InputError naming the first field that differs from its default and has no effect, and what it needs."""
    for name, value, default, unmet in _walk(config, type(config), {}, ""):
        if unmet is not None and value != default:
            raise InputError(f"{name}={value!r} has no effect: it needs {unmet}")


def list_fields(config: Any) -> Iterator[tuple[str, str | None]]:
    """Yield the dotted name of every field of a config, nested ones included, and the need that is not met, if any."""
    for name, _, _, unmet in _walk(config, type(config), {}, ""):
        yield name, unmet


def _walk(
    config: Any, defaults: Any, outer: Mapping[str, str], prefix: str
) -> Iterator[tuple[str, Any, Any, str | None]]:
    """Yield name, value, default and unmet need of every field.

    defaults: the class of the config, or the instance that a config without changes has in its place. outer: needs that
    the configs around this one do not meet, by field; "" stands for all fields.
    """
    unmet = {name: need.text for name, need in _find_needs(type(config)).items() if not need.is_met(config)} | dict(
        outer
    )
    for field in dataclasses.fields(config):
        value, default = getattr(config, field.name), _find_default(defaults, field)
        need = unmet.get(field.name, unmet.get(""))
        if dataclasses.is_dataclass(value) and dataclasses.is_dataclass(default):
            below = {name.removeprefix(f"{field.name}."): text for name, text in unmet.items() if "." in name}
            below |= {} if need is None else {"": need}
            yield from _walk(value, default, below, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", value, default, need


def _find_needs(config_class: type) -> dict[str, Need]:
    """Return the needs of a class and of those that it derives from."""
    needs: dict[str, Need] = {}
    for base in reversed(config_class.__mro__):
        needs |= vars(base).get("NEEDS", {})
        needs |= ENGINE_NEEDS.get(base, {})
    return needs


def _find_default(defaults: Any, field: dataclasses.Field[Any]) -> Any:
    """Return the value of a field in a config without changes; MISSING where it has to be given."""
    if not isinstance(defaults, type):
        return getattr(defaults, field.name)
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
