"""A prompt that cannot be run is an outcome of its own; the others run as if it were not there."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from support.toys import Pair

from genssd.engine.common.errors import CapacityError
from genssd.engine.decoding.chunk import Chunk
from genssd.engine.engine import Engine

Prompts = Callable[[int, int], list[list[int]]]
FIVE = Chunk(tokens=5, until=None)
PAGE_BYTES = 16 * 1024  # of both models' pages of 16 tokens
LONG = [7] * 600  # the models have 512 positions


def test_a_search_reports_a_prompt_without_positions_first_and_runs_the_others(
    engine: Engine, random_prompts: Prompts
) -> None:
    a, b = random_prompts(2, 30)
    options = {"candidates": 2, "chunk": FIVE, "max_tokens": 10}
    outcomes = list(engine.iter_select_expand([a, LONG, b, LONG], **options, labels=["w", "x", "y", "z"]))
    assert [s.index for s in outcomes[:2]] == [1, 3]
    for selection in outcomes[:2]:
        assert selection.error is not None
        assert selection.error.startswith("the prompt has 600 tokens; the teacher ")
        assert selection.error.endswith(" has 512 positions")
        assert (selection.trajectories, selection.tree) == ((), ())
        assert selection.prompt_ids == selection.student_prompt_ids == tuple(LONG)
    assert [s.occurrence for s in outcomes[:2]] == [0, 1]
    found = {s.index: s.best.token_ids for s in outcomes[2:]}
    alone = engine.select_expand([a, b], **options)
    assert found == {0: alone[0].best.token_ids, 2: alone[1].best.token_ids}
    with pytest.raises(CapacityError, match=r"^x: the prompt has 600 tokens"):
        engine.select_expand([a, LONG, b], **options, labels=["w", "x", "y"])


def test_a_prompt_without_positions_for_its_answer_is_reported(engine: Engine) -> None:
    options = {"candidates": 2, "chunk": FIVE, "max_tokens": 5, "criterion": "rationale_difficulty"}
    long, short = engine.iter_select_expand(["ab", "cd"], **options, answers=["5", "6" * 500])
    assert (long.index, long.error) == (1, "prompt and reference answer leave no position for a response")
    assert (short.index, short.error) == (0, None)


@pytest.mark.parametrize("n", [1, 3])
def test_generate_reports_a_prompt_that_an_empty_cache_does_not_hold(pair: Pair, n: int) -> None:
    """20 pages of 16 tokens: one response of 64 tokens fits after a prompt of 200, three do not."""
    tight = pair.engine(memory_bytes=20 * PAGE_BYTES)
    prompts = ["a", [9] * 400, "b", [9] * 200]
    expected = pair.engine().generate(prompts, n=n, max_tokens=64)
    outcomes = {g.index: g for g in tight.iter_generate(prompts, n=n, max_tokens=64, labels=list("abcd"))}
    failed = {index: g.error for index, g in outcomes.items() if g.error is not None}
    assert failed.keys() == ({1} if n == 1 else {1, 3})
    assert "the prompt has 400 tokens; the teacher's key-value cache holds 320" in str(failed[1])
    for index, outcome in outcomes.items():
        if index in failed:
            assert outcome.sampled == ()
            with pytest.raises(CapacityError, match=rf"^{'abcd'[index]}: "):
                _ = outcome.completions
        else:
            assert outcome.completions == expected[index]
    before = tight.usage.sampled_tokens
    with pytest.raises(CapacityError, match="prompt 1: the prompt has 400 tokens"):
        tight.generate(prompts, n=n, max_tokens=64)
    assert tight.usage.sampled_tokens == before, "something ran before the prompt was refused"
    assert tight.pages_in_use[0] == 0


def test_generate_goes_on_past_a_prompt_that_does_not_fit_beside_held_branches(pair: Pair) -> None:
    tight = pair.engine(memory_bytes=20 * PAGE_BYTES)
    holder = tight.branch("x" * 30)
    held = holder.expand(5, Chunk(tokens=20, until=None))
    long, short = tight.iter_generate([[9] * 200, "b"], max_tokens=8)
    assert long.index == 0
    assert "beside the branches that others hold" in str(long.error)
    assert short.completions == pair.engine().generate(["b"], max_tokens=8)[0]
    for branch in (holder, *held):
        branch.drop()
    assert tight.pages_in_use[0] == 0
