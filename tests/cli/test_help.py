"""Every flag of every command has a help text, the docstring of its field, and stands in a group of the help."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import textwrap
import typing
from collections.abc import Iterator

import pytest

from genssd.configs import CONFIGS
from genssd.engine.criteria.criterion_names import registered_criteria, resolve
from genssd.flag_groups import MAIN, find_group, group_flags
from genssd.flag_list import list_flags
from genssd.help_text import render_help


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


@pytest.mark.parametrize("command", CONFIGS)
def test_the_help_lists_every_flag_once_in_its_group(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    flags = list_flags(CONFIGS[command])
    for flag in flags:
        find_group(flag)  # raises KeyError on a flag without a group
    groups = group_flags(command, flags)
    assert sorted(flag.name for members in groups.values() for flag in members) == sorted(flag.name for flag in flags)
    text = render_help(command, CONFIGS[command])
    assert max(map(len, text.splitlines())) <= 100
    words = re.findall(r"^  (--[\w.-]+)", text, re.MULTILINE)
    assert [word for word in words if word not in ("--config", "--print-config")] == [
        flag.names[0] for members in groups.values() for flag in members if flag.names[0] != "--config"
    ]


@pytest.mark.parametrize("command", CONFIGS)
def test_required_flags_come_first_then_those_that_matter(command: str) -> None:
    flags = {flag.name: flag for flag in list_flags(CONFIGS[command])}
    assert set(MAIN[command]) <= flags.keys()
    assert len(MAIN[command]) <= 10
    required = [name for name, flag in flags.items() if flag.is_required]
    assert set(required) <= set(MAIN[command])
    titles = list(group_flags(command, list(flags.values())))
    first = ["required"] * bool(required) + ["main options"] * (len(MAIN[command]) > len(required))
    assert titles[: len(first)] == first


def test_the_help_names_registered_criteria_with_the_options_that_they_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    text = " ".join(render_help("select", CONFIGS["select"]).split())
    for name in registered_criteria():
        parameters = list(inspect.signature(type(resolve(name))).parameters)
        usage = f"{name}({', '.join(parameters)})" if parameters else name
        assert re.search(rf"Registered: .*{re.escape(usage)}[,.]", text), usage
    for policy in ("stop", "resample", "shorten", "accept_best"):
        assert policy in text
    losses = "".join(render_help("train", CONFIGS["train"]).split())
    assert (
        "{forward_kl,reverse_kl,jsd,skew_forward_kl,skew_reverse_kl,sampled_reverse_kl,distillm2,span_kl,uld}" in losses
    )


DIFFERENCES = {
    "batch_size": "the demo is longer than an arm of a comparison",
    "criteria": "score computes what is asked for, report what needs no model",
    "criterion": "reselect takes that of the run",
    "data": "some commands read several files, and the doctor need not have any",
    "eval_problems": "of a comparison they depend on the task",
    "train_tokens": "of a comparison they depend on the task",
    "model": "of a comparison only one task is made of a model",
    "eval_data": "train measures the loss on files, distill the accuracy on one",
    "learning_rate": "the demo's models are tiny",
    "model_name_or_path": "tune may have a teacher instead",
    "output_dir": "one for each command",
    "prompts": "of the demo the problems, of a report those that it shows",
    "require_correct": "rows that others made need not have a verdict",
    "run": "the doctor need not have one",
    "sampling": "as the papers sample; evaluation and diagnosis sample without filters",
    "student": "some commands work without one",
    "teacher": "some commands work without one",
    "verify": "score judges answers, the doctor compares engines",
}
"""Flags that have several defaults, and why."""


def test_a_flag_has_the_same_default_in_all_commands() -> None:
    defaults: dict[str, set[str]] = {}
    for command, config_class in CONFIGS.items():
        for flag in list_flags(config_class):
            parts = flag.name.removeprefix("select.").removeprefix("train.") if command == "distill" else flag.name
            defaults.setdefault(parts, set()).add(repr(flag.default))
    differing = {name.split(".")[0] for name, values in defaults.items() if len(values) > 1}
    assert differing == DIFFERENCES.keys()
