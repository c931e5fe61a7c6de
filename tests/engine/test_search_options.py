"""The options of the search as one value, and as keywords."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, get_type_hints

import pytest

import genssd
from genssd.distill.select.config import SelectSettings
from genssd.engine.common.errors import InputError
from genssd.engine.decoding.chunk import Chunk
from genssd.engine.engine import Engine
from genssd.engine.search.judging import Judge
from genssd.engine.search.search_options import SearchChanges, SearchOptions
from genssd.engine.search.selection import Selection
from genssd.engine.texts.loops import LoopGuard

Prompts = Callable[[int, int], list[list[int]]]


def outcomes(selections: list[Selection]) -> list[tuple[object, ...]]:
    return [(r.trace, r.token_ids, r.score, r.verdict) for s in selections for r in s.tree]


def test_the_keywords_are_the_fields() -> None:
    hints = get_type_hints(SearchOptions)
    expected = {field.name: hints[field.name] for field in dataclasses.fields(SearchOptions)}
    assert get_type_hints(SearchChanges) == {**expected, "chunk": Chunk | int}
    assert genssd.SearchOptions is SearchOptions


def test_options_and_keywords_mean_the_same(engine: Engine, random_prompts: Prompts) -> None:
    prompts, chunk = random_prompts(3, 7), Chunk(tokens=4, until=None)
    options = SearchOptions(candidates=3, beam=2, chunk=chunk, max_tokens=12, criterion="rsr", seed=5)
    by_options = outcomes(engine.select_expand(prompts, options))
    assert by_options == outcomes(
        engine.select_expand(prompts, candidates=3, beam=2, chunk=chunk, max_tokens=12, criterion="rsr", seed=5)
    )
    assert by_options == outcomes(engine.select_expand(prompts, dataclasses.replace(options, seed=1), seed=5))
    assert by_options != outcomes(engine.select_expand(prompts, options, seed=6))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"criterium": "rsr"}, r"unknown search option 'criterium'; did you mean 'criterion'\?"),
        ({"zzzz": 1}, "unknown search option 'zzzz'; known: candidates, chunk, beam"),
        ({"teacher_topk": -1}, "teacher_topk must be at least 0, not -1"),
        ({"teacher_topk": 1 << 30}, r"teacher_topk must be in 0\.\."),
        ({"threshold": math.nan}, "threshold must be a number or None, not nan"),
        ({"criterion": "aslec_casl"}, "fitted over all of the data"),
        ({"candidates": 0}, "candidates must be at least 1, not 0"),
    ],
    ids=str,
)
def test_a_bad_keyword_is_named_before_anything_runs(engine: Engine, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        engine.iter_select_expand(["abc"], **options)
    with pytest.raises(InputError, match=message):
        engine.select_expand(["abc"], SearchOptions(max_tokens=8), **options)


@pytest.mark.parametrize("value", [0, -1])
def test_options_check_themselves(value: int) -> None:
    for name in ("candidates", "beam", "max_tokens"):
        with pytest.raises(InputError, match=f"{name} must be at least 1, not {value}"):
            SearchOptions(**{name: value})  # type: ignore[arg-type]


def test_a_derived_class_gives_plain_options() -> None:
    """Rules of the derived class, which hold for its own use, do not get in the way of the search."""

    @dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
    class Picky(SearchOptions):
        own: int = 3

        def __post_init__(self) -> None:
            assert self.threshold is None

    changed = Picky(beam=2).with_changes(threshold=1.0)
    assert changed == SearchOptions(beam=2, threshold=1.0)
    assert type(changed) is SearchOptions


@pytest.mark.parametrize(
    ("guard", "limits"), [(True, LoopGuard()), (LoopGuard(max_period=3),) * 2, (False, None), (None, None)], ids=str
)
def test_what_a_loop_guard_may_be(guard: LoopGuard | bool | None, limits: LoopGuard | None) -> None:
    assert Judge.from_options(SearchOptions(loop_guard=guard)).loop_guard == limits


def test_select_settings_are_search_options() -> None:
    settings = SelectSettings(candidates=2, loop_guard=False)
    assert settings.with_changes() == SearchOptions(candidates=2, loop_guard=False)
    with pytest.raises(InputError, match="beam must be at least 1, not 0"):
        SelectSettings(beam=0).with_changes()
