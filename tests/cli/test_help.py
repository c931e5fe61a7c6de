"""Every flag of every command has a help text: the docstring of its field."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
import typing
from collections.abc import Iterator

import pytest

from genssd.configs import CONFIGS


def dataclasses_of(config_class: type) -> Iterator[type]:
    """The config's class, its bases, and the classes of nested options."""
    for base in config_class.__mro__:
        if dataclasses.is_dataclass(base):
            yield base
    for hint in typing.get_type_hints(config_class).values():
        for nested in (hint, *typing.get_args(hint)):
            if isinstance(nested, type) and dataclasses.is_dataclass(nested):
                yield from dataclasses_of(nested)


@pytest.mark.parametrize("command", sorted(CONFIGS))
def test_every_flag_has_a_help_text(command: str) -> None:
    for config_class in dict.fromkeys(dataclasses_of(CONFIGS[command])):
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(config_class))).body
        assert isinstance(tree, ast.ClassDef)
        for node, following in zip(tree.body, [*tree.body[1:], None], strict=True):
            if isinstance(node, ast.AnnAssign) and not ast.unparse(node.annotation).startswith("ClassVar"):
                described = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
                assert described, f"{config_class.__name__}.{ast.unparse(node.target)} has no help text"
