"""Checks of the values that Python code sets: every option and argument against the type that it declares.

The command line converts text by the same types, so what it refuses is refused here. Numbers of numpy become Python's,
lists become the tuples that a field declares.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import functools
import inspect
import math
import numbers
import types
import typing
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, Literal, ParamSpec, TypeVar, get_args, get_origin, get_type_hints

import numpy as np

from genssd.engine.common.errors import InputError
from genssd.engine.common.quoting import quote

P = ParamSpec("P")
R = TypeVar("R")

NAMES: dict[Any, str] = {
    int: "an integer",
    float: "a finite number",
    bool: "True or False",
    str: "text",
    type(None): "None",
}
"""What a value of a type is called in messages."""


class _MismatchError(Exception):
    """A value that is not of its type."""


def check_types(options: Any, *, infinite: Collection[str] = ()) -> None:
    """Check every field of a dataclass against its type; call it first in `__post_init__`.

    infinite: names of fields that may be infinite. Raises InputError naming the field and its value.
    """
    for name, hint in _field_hints(options).items():
        value = getattr(options, name)
        checked = check_value(name, value, hint, infinite=name in infinite)
        if checked is not value:
            object.__setattr__(options, name, checked)


def check_value(name: str, value: Any, hint: Any, *, infinite: bool = False) -> Any:
    """Return a value as the type that it must have. Raises InputError naming it where it has another one."""
    if infinite and isinstance(value, float) and math.isinf(value):
        return value
    try:
        return _convert(value, hint)
    except _MismatchError:
        kind = describe(hint).replace(NAMES[float], "a number") if infinite else describe(hint)
        raise InputError(f"{name} must be {kind}, not {quote(value)}") from None


def check_count(name: str, value: Any, least: int = 1) -> int:
    """Return an integer that is at least `least`. Raises InputError naming it."""
    count: int = check_value(name, value, int)
    if count < least:
        raise InputError(f"{name} must be at least {least}, not {count}")
    return count


def check_arguments(*, but: Collection[str] = ()) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorate a function whose arguments are checked against their types at every call.

    but: names of parameters that the function checks itself, with messages of its own. Keywords that the function
    collects (**changes) are its own as well.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)
        kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
        names = [
            name
            for name, parameter in signature.parameters.items()
            if name not in ("self", "cls", *but) and parameter.kind not in kinds
        ]

        @functools.wraps(function)
        def checked(*args: P.args, **kwargs: P.kwargs) -> R:
            bound = signature.bind(*args, **kwargs)
            hints = _argument_hints(function)
            for name in names:
                if name in bound.arguments:
                    bound.arguments[name] = check_value(name, bound.arguments[name], hints[name])
            return function(*bound.args, **bound.kwargs)

        return checked

    return decorate


def describe(hint: Any) -> str:
    """Return what a value of a type is called in messages."""
    if hint in NAMES:
        return NAMES[hint]
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is typing.Annotated:
        return describe(arguments[0])
    if origin is Literal:
        return f"one of {', '.join(map(repr, arguments))}"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(describe(part) for part in arguments))
    if origin is not None and origin in _SEQUENCES:
        return f"a list of {describe(arguments[0]).removeprefix('an ').removeprefix('a ')} values"
    name = getattr(origin or hint, "__name__", str(hint))
    return f"a {name}"


_HINTS_OF_CLASSES: dict[type, dict[str, Any]] = {}


def _field_hints(options: Any) -> dict[str, Any]:
    """Return the types of a dataclass's fields, resolved once for each class."""
    options_class = type(options)
    if options_class not in _HINTS_OF_CLASSES:
        hints = get_type_hints(options_class)
        _HINTS_OF_CLASSES[options_class] = {field.name: hints[field.name] for field in dataclasses.fields(options)}
    return _HINTS_OF_CLASSES[options_class]


@functools.cache
def _argument_hints(function: Callable[..., Any]) -> dict[str, Any]:
    return get_type_hints(function)


_SEQUENCES = (tuple, list, collections.abc.Sequence, frozenset)


def _convert(value: Any, hint: Any) -> Any:
    """Return a value as a type. Raises _MismatchError where it has another one."""
    if hint is Any or isinstance(hint, TypeVar):
        return value
    if hint in _SCALARS:
        return _SCALARS[hint](value)
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is typing.Annotated:
        return _convert(value, arguments[0])
    if origin is Literal:
        if any(type(value) is type(choice) and value == choice for choice in arguments):
            return value
        raise _MismatchError
    if origin in (typing.Union, types.UnionType):
        return _convert_to_any(value, arguments)
    if origin is not None and origin in _SEQUENCES:
        return _convert_sequence(value, origin, arguments)
    if origin is collections.abc.Mapping:
        return _require(value, isinstance(value, collections.abc.Mapping) and all(isinstance(k, str) for k in value))
    if origin is collections.abc.Callable:
        return _require(value, callable(value))
    return _require(value, isinstance(value, origin or hint))


def _convert_to_any(value: Any, hints: tuple[Any, ...]) -> Any:
    for hint in hints:
        try:
            return _convert(value, hint)
        except _MismatchError:
            continue
    raise _MismatchError


def _convert_sequence(value: Any, origin: Any, arguments: tuple[Any, ...]) -> Any:
    """Return a list, tuple, set or array as the collection that a type asks for, with checked elements."""
    kinds = (set, frozenset) if origin is frozenset else (list, tuple, np.ndarray)
    if not isinstance(value, kinds):
        raise _MismatchError
    if origin is tuple and arguments[-1:] != (...,):
        _require(value, len(value) == len(arguments))
        return tuple(_convert(part, hint) for part, hint in zip(value, arguments, strict=True))
    parts = [_convert(part, arguments[0]) for part in value]
    if all(part is before for part, before in zip(parts, value, strict=True)) and isinstance(value, origin):
        return value
    return tuple(parts) if origin is collections.abc.Sequence else origin(parts)


def _as_integer(value: Any) -> int:
    _require(value, isinstance(value, numbers.Integral) and not isinstance(value, bool))
    return value if type(value) is int else int(value)


def _as_number(value: Any) -> float:
    """Return a finite number; an integer stays one."""
    _require(value, isinstance(value, numbers.Real) and not isinstance(value, bool | np.bool_))
    try:
        _require(value, math.isfinite(value))
    except OverflowError:
        raise _MismatchError from None
    return value if type(value) in (int, float) else float(value)


def _as_bool(value: Any) -> bool:
    _require(value, isinstance(value, bool | np.bool_))
    return bool(value)


def _as_text(value: Any) -> str:
    """Return a text, or the name that a Path stands for; half of a surrogate pair, which no file can hold, is none."""
    if isinstance(value, PurePath):
        value = str(value)
    _require(value, isinstance(value, str))
    try:
        value.encode()
    except UnicodeEncodeError:
        raise _MismatchError from None
    return str(value)


def _as_none(value: Any) -> None:
    _require(value, value is None)


_SCALARS: dict[Any, Callable[[Any], Any]] = {
    int: _as_integer,
    float: _as_number,
    bool: _as_bool,
    str: _as_text,
    type(None): _as_none,
}
"""Conversions to the types of numbers and texts."""


def _require(value: Any, is_right: bool) -> Any:
    if not is_right:
        raise _MismatchError
    return value


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedOptions:
    """Base of a criterion whose options are checked against their types when it is made."""

    def __post_init__(self) -> None:
        check_types(self)
