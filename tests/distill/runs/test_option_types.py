"""Every field of every options class refuses values of other types, and names itself."""

from __future__ import annotations

import dataclasses
import datetime
import inspect
import math
import re
import typing
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import genssd
from genssd.configs import CONFIGS
from genssd.distill.train.key_attention_options import KeyAttentionOptions
from genssd.distill.train.loss_options import LossOptions
from genssd.engine.common.errors import InputError

NAN, INF, HALF = math.nan, math.inf, "half \ud800 of a pair"
NO_INTEGER = (1.5, True, "3", NAN, INF, 1 + 0j, [1])
NO_NUMBER = ("3", True, NAN, INF, -INF, 10**400, np.float32("nan"), [1.0])
NO_TEXT = (3, b"text", HALF, ["text"], True)
BAD: dict[Any, tuple[Any, ...]] = {
    int: (*NO_INTEGER, None),
    int | None: NO_INTEGER,
    float: (*NO_NUMBER, None),
    float | None: NO_NUMBER,
    bool: (1, 0, "yes", None),
    bool | None: (1, "yes"),
    str: (*NO_TEXT, None),
    str | None: NO_TEXT,
    tuple[str, ...]: ("text", 3, None, [3], ("a", HALF), {"a": 1}),
    tuple[float, ...]: (0.5, "0.5", None, ("0.5",), [True], [NAN]),
    datetime.date | None: ("2026-11-26", 20261126),
    genssd.LoopGuard | bool | None: (1, "yes", {}),
    str | genssd.Criterion | genssd.PoolCriterion: (3, None, ["ppl"], HALF),
    str | tuple[str, ...]: (3, None, [3], HALF),
}
"""Values that are not of a type. A field of another type needs a line here."""

INFINITE = {"threshold"}
"""Fields that may be infinite."""


def plain(hint: Any) -> Any:
    """A type without the declarations of what a field means for a run, however deep they are."""
    while typing.get_origin(hint) is typing.Annotated:
        hint = typing.get_args(hint)[0]
    return hint


def bad_values(hint: Any) -> tuple[Any, ...]:
    hint = plain(hint)
    if hint in BAD:
        return BAD[hint]
    if typing.get_origin(hint) is typing.Literal:
        return ("nonsense", 3, None, ["x"])
    if typing.get_origin(hint) is tuple:
        return ("nonsense", 3, None, ("nonsense",), [3])
    if typing.get_origin(hint) is typing.Union or "|" in str(hint):
        parts = [part for part in typing.get_args(hint) if part is not type(None)]
        assert len(parts) == 1, f"give bad values for {hint}"
        return tuple(value for value in bad_values(parts[0]) if value is not None)
    if "Mapping" in str(hint):
        return ("a=1", 3, None, ["a"], {1: 2})
    assert dataclasses.is_dataclass(hint), f"give bad values for {hint}"
    return ("text", 3.5, None, {})


def instance_of(options_class: Any) -> Any:
    given: dict[str, Any] = {"model": "m", "model_name_or_path": "m", "student": "s", "task": "small"}
    given["run"] = ("r",) if "tuple" in str(typing.get_type_hints(options_class).get("run", "")) else "r"
    teacher_is_many = "tuple" in str(typing.get_type_hints(options_class).get("teacher", ""))
    given["teacher"] = ("t",) if teacher_is_many else "t"
    given["data"] = ("d",) if "tuple" in str(typing.get_type_hints(options_class).get("data", "")) else "d"
    required = {
        field.name
        for field in dataclasses.fields(options_class)
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    }
    if options_class.__name__ == "DiagnoseConfig":
        required.add("teacher")  # a teacher or contexts
    return options_class(**{name: value for name, value in given.items() if name in required})


def nested(options_class: Any) -> Iterator[Any]:
    yield options_class
    for hint in typing.get_type_hints(options_class).values():
        for part in (hint, *typing.get_args(hint)):
            if inspect.isclass(part) and dataclasses.is_dataclass(part):
                yield from nested(part)


ENGINE = ("SearchOptions", "Sampling", "Chunk", "LoopGuard", "ChatOptions", "ReverseSpeculation")
CRITERIA = [
    value
    for value in (getattr(genssd, name) for name in genssd.__all__)
    if inspect.isclass(value) and dataclasses.is_dataclass(value) and hasattr(value, "higher_is_better")
]
OPTIONS = {
    options.__name__: options
    for outer in (*CONFIGS.values(), *(getattr(genssd, name) for name in ENGINE), *CRITERIA)
    for options in nested(outer)
    if options.__name__ != "WeightedRank"  # made from a text, whose parts are checked
}


def test_all_options_are_looked_at() -> None:
    assert {"TrainConfig", "RolloutOptions", "KeyAttentionOptions", "Sampling", "Calibrate", "Perplexity"} <= set(
        OPTIONS
    )
    assert len(OPTIONS) > 30


@pytest.mark.parametrize("name", sorted(OPTIONS))
def test_a_value_of_another_type_is_refused_with_the_name_of_its_field(name: str) -> None:
    made = instance_of(OPTIONS[name])
    hints = typing.get_type_hints(OPTIONS[name], include_extras=True)
    for field in dataclasses.fields(made):
        for value in bad_values(hints[field.name]):
            if field.name in INFINITE and isinstance(value, float) and math.isinf(value):
                continue
            if field.name == "chunk" and value == 3.5:
                continue  # a test of its own: chunks may be numbers
            with pytest.raises(InputError) as error:
                dataclasses.replace(made, **{field.name: value})
            assert re.match(rf"{field.name} must be ", str(error.value)), (value, str(error.value))
            assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", sorted(OPTIONS))
def test_numbers_of_numpy_and_lists_become_pythons(name: str) -> None:
    made = instance_of(OPTIONS[name])
    for field in dataclasses.fields(made):
        value = getattr(made, field.name)
        if type(value) is int:
            other = getattr(dataclasses.replace(made, **{field.name: np.int64(value)}), field.name)
            assert (other, type(other)) == (value, int)
        if type(value) is float and math.isfinite(value):
            other = getattr(dataclasses.replace(made, **{field.name: np.float64(value)}), field.name)
            assert (other, type(other)) == (value, float)
        if type(value) is tuple and field.name != "statuses":
            assert dataclasses.replace(made, **{field.name: list(value)}) == made


@pytest.mark.parametrize("value", [1e-38, 1e-37, 1e-40, 5e-324, -1.0])
def test_a_temperature_that_makes_logits_infinite_is_refused(value: float) -> None:
    with pytest.raises(InputError, match="temperature must be"):
        genssd.Sampling(temperature=value)
    for options in (LossOptions, KeyAttentionOptions):
        (name, *_) = [field.name for field in dataclasses.fields(options) if "temperature" in field.name]
        with pytest.raises(InputError, match=r"temperatures? must be at least 1e-30"):
            options(**{name: value})
        options(**{name: 1e-30})
    assert genssd.Sampling(temperature=1e-30).temperature == 1e-30


def test_a_number_is_a_chunk() -> None:
    options = genssd.SearchOptions(chunk=64)  # type: ignore[arg-type]
    assert options.chunk == genssd.Chunk(tokens=64)
    assert options.with_changes(chunk=8).chunk == genssd.Chunk(tokens=8)
    assert instance_of(CONFIGS["select"]).chunk == genssd.Chunk()
    for value in (0, -1):
        with pytest.raises(InputError, match=f"chunk tokens must be at least 1, not {value}"):
            genssd.SearchOptions(chunk=value)  # type: ignore[arg-type]
