"""A config as the command that has it: what to type to get the same result again."""

from __future__ import annotations

import dataclasses
import shlex
import types
import typing
from collections.abc import Collection, Iterator
from typing import Any

from genssd.distill.runs.field_kinds import fields_of


def render_command(command: str, config: Any, *, without: Collection[str] = ()) -> str:
    """Return `genssd COMMAND` with a flag for every field of a config that has not its default, quoted for a shell.

    without: names of fields that are left out.
    """
    flags = [flag for flag in iter_flags(config) if flag.name not in without]
    return " ".join(["genssd", command, *(shlex.join(flag.words) for flag in flags)])


@dataclasses.dataclass(frozen=True, slots=True)
class SetFlag:
    """A field of a config that has not its default."""

    name: str
    """Dotted name of the field, with underscores."""
    value: Any
    words: tuple[str, ...]
    """The flag and its values as they are typed."""


def iter_flags(config: Any) -> Iterator[SetFlag]:
    """Yield the fields of a config that must be given, and those that have not their default."""
    hints = dict(_iter_hints(type(config), ""))
    defaults = {setting.name: setting.value for setting in fields_of(_make_default(config))}
    required = {field.name for field in dataclasses.fields(config) if _is_required(field)}
    for setting in fields_of(config):
        if setting.name in required or setting.value != defaults[setting.name]:
            yield SetFlag(setting.name, setting.value, _write_flag(setting.name, setting.value, hints[setting.name]))


def _make_default(config: Any) -> Any:
    """Return a config with the required fields of another one, and defaults."""
    required = {field.name: getattr(config, field.name) for field in dataclasses.fields(config) if _is_required(field)}
    return type(config)(**required)


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _iter_hints(config_class: type, prefix: str) -> Iterator[tuple[str, Any]]:
    """Yield the dotted name and the type of every field, nested ones included."""
    for name, hint in typing.get_type_hints(config_class).items():
        yield f"{prefix}{name}", hint
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            yield from _iter_hints(hint, f"{prefix}{name}.")


def _write_flag(name: str, value: Any, hint: Any) -> tuple[str, ...]:
    flag = name.replace("_", "-")
    if isinstance(value, bool) and not isinstance(hint, types.UnionType):
        head, dot, last = flag.rpartition(".")
        return (f"--{flag}" if value else f"--{head}{dot}no-{last}",)
    if isinstance(value, tuple):
        return (f"--{flag}", *map(str, value))
    return (f"--{flag}", str(value))
