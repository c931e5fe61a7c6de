"""The flags of a command in one list: name, type, default and help text of every field of its config."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from genssd.distill.runs.field_kinds import Kind, Marker

REQUIRED = dataclasses.MISSING
"""Default of a flag that must be given."""
SCALARS: dict[Any, str] = {int: "INT", float: "FLOAT", str: "TEXT", type(None): "None", bool: "{True,False}"}
"""What stands for a value of a type."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Flag:
    """One field of a config; of a nested config, its fields are flags and it is none."""

    name: str
    """Dotted name, with underscores, such as "sampling.top_p"."""
    hint: Any
    """Type, with the marks that say whether it names a file or a model."""
    default: Any
    """Value where the flag is not given; REQUIRED where it must be."""
    help: str
    """Docstring of the field, as one line."""
    section: str = ""
    """Docstring of the nested config's field that this one is part of, as one line; empty for the command's own."""

    @property
    def is_required(self) -> bool:
        return self.default is REQUIRED

    @property
    def top(self) -> str:
        """Name of the field of the command's config that the flag is, or is part of."""
        return self.name.split(".")[0]

    @property
    def names(self) -> list[str]:
        """The flag as it is typed, and the one that turns an option off."""
        name = self.name.replace("_", "-")
        head, dot, last = name.rpartition(".")
        return [f"--{name}", f"--{head}{dot}no-{last}"] if _strip_marks(self.hint) is bool else [f"--{name}"]

    def spell(self) -> str:
        """Return the flag as it is typed, with what stands for its values."""
        names = self.names
        return ", ".join(names) if len(names) > 1 else f"{names[0]} {describe_values(self.hint)}"


def list_flags(config_class: type) -> list[Flag]:
    """Return the flags of a command, those of nested configs included, in the order of their declaration."""
    return list(_iter_flags(config_class, config_class, "", ""))


def _iter_flags(config_class: type, defaults: Any, prefix: str, section: str) -> Iterator[Flag]:
    """Yield the flags of a config. defaults: its class, or the instance that stands in its place by default."""
    hints = typing.get_type_hints(config_class, include_extras=True)
    texts = read_help(config_class)
    for field in dataclasses.fields(config_class):
        default = _find_default(field) if isinstance(defaults, type) else getattr(defaults, field.name)
        name = f"{prefix}{field.name}"
        if dataclasses.is_dataclass(default) and not isinstance(default, type):
            yield from _iter_flags(type(default), default, f"{name}.", texts[field.name])
        else:
            yield Flag(name=name, hint=hints[field.name], default=default, help=texts[field.name], section=section)


def _find_default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def read_help(config_class: type) -> dict[str, str]:
    """Return the docstring of every field of a config, those that it inherits included, each as one line."""
    texts: dict[str, str] = {}
    for base in reversed(config_class.__mro__):
        if dataclasses.is_dataclass(base):
            texts |= _read_own_help(base)
    return texts


@cache
def _read_own_help(config_class: type) -> dict[str, str]:
    """Return the docstrings of the fields that stand in the body of a class."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(config_class))).body
    assert isinstance(tree, ast.ClassDef)
    texts: dict[str, str] = {}
    for node, following in zip(tree.body, tree.body[1:], strict=False):
        text = following.value if isinstance(following, ast.Expr) else None
        if isinstance(node, ast.AnnAssign) and isinstance(text, ast.Constant) and isinstance(text.value, str):
            texts[ast.unparse(node.target)] = " ".join(text.value.split())
    return texts


def describe_values(hint: Any) -> str:
    """Return what stands for the values of a type in help texts: INT, {a,b}, PATH ..."""
    marks: set[Any] = set()
    while typing.get_origin(hint) is typing.Annotated:
        marks |= set(hint.__metadata__)
        hint = typing.get_args(hint)[0]
    text = {Kind.MODEL: "MODEL", Kind.NAMED_MODEL: "MODEL", Kind.DATA_FILE: "FILE", Marker.FILE_NAME: "PATH"}
    word = next((text[mark] for mark in text if mark in marks), None)
    return _describe(hint, word)


def _describe(hint: Any, word: str | None) -> str:
    """Return what stands for a type. word: what stands for text in it; None: TEXT."""
    if hint is str and word is not None:
        return word
    if hint in SCALARS:
        return SCALARS[hint]
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        return f"{{{','.join(map(str, arguments))}}}"
    if typing.get_origin(hint) is tuple:
        return f"{_describe(arguments[0], word)} ..."
    if _is_union(hint):
        parts = [_describe(part, word) for part in arguments if part is not type(None)]
        parts = [part for part in parts if f"{part} ..." not in parts]  # one value or several
        return "|".join([*parts, *(["None"] if type(None) in arguments else [])])
    return describe_values(hint)


def _strip_marks(hint: Any) -> Any:
    """Return a type without the marks of its declaration."""
    while typing.get_origin(hint) is typing.Annotated:
        hint = typing.get_args(hint)[0]
    return hint


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (types.UnionType, typing.Union)
