"""The options of a criterion, which also come from the command line: each is checked against its type."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

from genssd.engine.errors import InputError


def check_option_types(criterion: Any) -> None:
    """Raise InputError on an option of a criterion that is not of its field's type."""
    hints = get_type_hints(type(criterion))
    for option in dataclasses.fields(criterion):
        value, hint = getattr(criterion, option.name), hints[option.name]
        choices = get_args(hint) if get_origin(hint) is Literal else ()
        if choices and value not in choices:
            raise InputError(f"{option.name} must be one of {', '.join(map(repr, choices))}, not {value!r}")
        if not choices and not _has_type(value, hint):
            type_name = getattr(hint, "__name__", str(hint))
            raise InputError(f"{option.name} must be of type {type_name}, not {value!r}")


def _has_type(value: object, hint: Any) -> bool:
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint in (bool, str):
        return isinstance(value, hint)
    return any(_has_type(value, part) for part in get_args(hint)) or (value is None and type(None) in get_args(hint))


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedOptions:
    """Base of a criterion whose options are checked against their types when it is made."""

    def __post_init__(self) -> None:
        check_option_types(self)
