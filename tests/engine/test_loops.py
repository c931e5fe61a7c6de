"""The repetition guard against brute force."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genssd.engine.common.errors import InputError
from genssd.engine.texts.loops import LoopGuard


def brute_force(guard: LoopGuard, tokens: list[int]) -> int:
    """The smallest period whose repetition covers the required span at the end."""
    for period in range(1, guard.max_period + 1):
        span = max(guard.min_tokens, period * guard.min_repeats)
        if span <= len(tokens) and all(tokens[-i] == tokens[-i - period] for i in range(1, span - period + 1)):
            return period
    return 0


@settings(max_examples=400, deadline=None)
@given(
    prefix=st.lists(st.integers(0, 3), max_size=12),
    unit=st.lists(st.integers(0, 3), min_size=1, max_size=5),
    repeats=st.integers(0, 8),
    suffix=st.lists(st.integers(0, 3), max_size=3),
    max_period=st.integers(1, 6),
    min_repeats=st.integers(2, 4),
    min_tokens=st.integers(2, 12),
)
def test_equals_brute_force(
    prefix: list[int],
    unit: list[int],
    repeats: int,
    suffix: list[int],
    max_period: int,
    min_repeats: int,
    min_tokens: int,
) -> None:
    guard = LoopGuard(max_period=max_period, min_repeats=min_repeats, min_tokens=min_tokens)
    tokens = prefix + unit * repeats + suffix
    assert guard.period(tokens) == brute_force(guard, tokens)


def test_the_defaults_find_a_long_loop_and_no_other() -> None:
    guard = LoopGuard()
    assert guard.period(list(range(1000))) == 0
    assert guard.period([*range(500), *([7] * 48)]) == 1
    assert guard.period([*range(500), *([7] * 47)]) == 0
    sentence = list(range(100, 164))
    assert guard.period(sentence * 4) == 64
    assert guard.period((sentence * 4)[1:]) == 0
    assert guard.period([*sentence, 1] * 4) == 0  # a period of 65
    assert guard.period([5, 6] * 24) == 2
    assert guard.period([*[5, 6] * 30, 9]) == 0
    assert guard.period([]) == 0


@pytest.mark.parametrize("options", [{"max_period": 0}, {"min_repeats": 1}, {"min_tokens": 1}], ids=str)
def test_a_bad_option_is_named(options: dict[str, int]) -> None:
    with pytest.raises(InputError, match="loop guard needs"):
        LoopGuard(**options)
