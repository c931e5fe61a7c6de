"""The public names: whatever a public class takes or returns can be imported from genssd as well."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import typing
from collections.abc import Iterator
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import genssd

INTERNAL = {
    "Branch": {"session", "teacher", "student", "chunk_states", "state", "root", "from_prefix"},
    "Tokenizer": {"chat"},
}
"""Members of public classes that the engine's own code uses, beside those whose names begin with an underscore."""

PUBLIC = {name: getattr(genssd, name) for name in genssd.__all__ if name != "__version__"}
CLASSES = {name: value for name, value in PUBLIC.items() if inspect.isclass(value)}


def own_types(hint: Any) -> Iterator[type]:
    """The classes of genssd in a type, those inside of unions, lists and functions included."""
    for part in (hint, typing.get_origin(hint)):
        if inspect.isclass(part) and part.__module__.startswith("genssd."):
            yield part
    for part in typing.get_args(hint):
        for inner in part if isinstance(part, list) else [part]:
            yield from own_types(inner)


def members(public: type) -> Iterator[tuple[str, Any]]:
    """The public members of a class, by name, with the functions behind properties and class methods."""
    for name, member in inspect.getmembers_static(public):
        if name.startswith("_") or name in INTERNAL.get(public.__name__, ()):
            continue
        if isinstance(member, property):
            yield name, member.fget
        elif isinstance(member, cached_property):
            yield name, member.func
        elif isinstance(member, classmethod | staticmethod):
            yield name, member.__func__
        elif inspect.isfunction(member):
            yield name, member


def signature_types(name: str, public: Any) -> Iterator[tuple[str, type]]:
    """The place and type of everything that a public name takes and returns."""
    if not inspect.isclass(public):
        hints = typing.get_type_hints(public) if inspect.isfunction(public) else {"alias": public}
        yield from ((f"{name}, {where}", part) for where, hint in hints.items() for part in own_types(hint))
        return
    if dataclasses.is_dataclass(public) or typing.is_typeddict(public):
        for field, hint in typing.get_type_hints(public).items():
            if field not in INTERNAL.get(name, ()) and not field.startswith("_"):
                yield from ((f"{name}.{field}", part) for part in own_types(hint))
    for member, function in members(public):
        for where, hint in typing.get_type_hints(function, localns=CLASSES).items():
            yield from ((f"{name}.{member}, {where}", part) for part in own_types(hint))


def test_every_type_in_a_public_signature_is_public() -> None:
    exported = list(PUBLIC.values())
    missing = {
        (where, part.__qualname__)
        for name, public in PUBLIC.items()
        for where, part in signature_types(name, public)
        if part not in exported
    }
    assert not missing
    seen = {part for name, public in PUBLIC.items() for _, part in signature_types(name, public)}
    assert len(seen) > 25, "the walk finds no types"


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_public_classes_methods_and_attributes_are_documented(name: str) -> None:
    public = CLASSES[name]
    assert public.__doc__
    # what the protocols of criteria ask for is described there
    asked = {member for protocol in (genssd.Criterion, genssd.PoolCriterion) for member, _ in members(protocol)}
    assert not [member for member, function in members(public) if not function.__doc__ and member not in asked]
    if dataclasses.is_dataclass(public):
        described = set()
        for base in (base for base in public.__mro__ if dataclasses.is_dataclass(base)):
            source = ast.parse(inspect.getsource(inspect.getmodule(base)))  # type: ignore[arg-type]
            (body,) = (
                node.body for node in ast.walk(source) if isinstance(node, ast.ClassDef) and node.name == base.__name__
            )
            described |= {
                field.target.id
                for field, after in pairwise(body)
                if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
                if isinstance(after, ast.Expr)
            }
        assert {field.name for field in dataclasses.fields(public)} <= described


def test_type_checkers_see_the_names_that_the_package_has() -> None:
    tree = ast.parse(Path(genssd.__file__).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.asname: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert seen == genssd._HOME
    assert {*seen, "__version__"} == set(genssd.__all__)
