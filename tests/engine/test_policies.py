"""What the search does where nothing is learnable, and what ends it: policies and budgets."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from support.small_pages import small_pages
from support.toys import Pair

from genssd.engine.common.errors import InputError
from genssd.engine.criteria.likelihood import Perplexity
from genssd.engine.decoding.chunk import Chunk
from genssd.engine.engine import Engine
from genssd.engine.models.sampling import Sampling
from genssd.engine.search import budget as budgets
from genssd.engine.search.budget import Budget
from genssd.engine.search.search_options import SearchOptions
from genssd.engine.search.selection import Selection

Prompts = Callable[[int, int], list[list[int]]]
EIGHT = Chunk(tokens=8, until=None)


def outcomes(selections: Sequence[Selection]) -> list[object]:
    """Everything that must not depend on how a search is run."""
    return [
        (
            s.prompt_ids,
            [(t.token_ids, t.status, t.trace, [(c.tokens, c.is_forced) for c in t.chunks]) for t in s.trajectories],
            [(r.trace, r.token_ids, r.verdict, r.ended, r.attempt, r.probability) for r in s.tree],
            s.rounds,
            s.ended_by,
        )
        for s in selections
    ]


def hard_options(engine: Engine, prompts: list[list[int]], easy: float, **changes: Any) -> dict[str, Any]:
    """Options with a threshold that about this fraction of the best candidates reach."""
    options = {"candidates": 2, "chunk": EIGHT, "max_tokens": 40, **changes}
    scores = sorted(c.score for s in engine.select_expand(prompts, **options) for c in s.best.chunks)
    return {**options, "threshold": scores[int(easy * len(scores))]}


def test_further_candidates_are_those_of_a_second_expansion(engine: Engine, random_prompts: Prompts) -> None:
    prompts = random_prompts(6, 31)
    options = hard_options(engine, prompts, 0.25)
    stopped = engine.select_expand(prompts, **options)
    again = engine.select_expand(prompts, **options, on_unlearnable="resample", max_resamples=2)
    seen = set()
    for before, after in zip(stopped, again, strict=True):
        first = {r.trace: r.token_ids for r in after.tree}
        # what the policy does comes after what the search without it has done
        assert [r.token_ids for r in before.tree] == [r.token_ids for r in after.tree][: len(before.tree)]
        for record in after.tree:
            assert record.attempt == record.trace[-1] // 2
        for decided in after.rounds:
            siblings = [r for r in after.tree if r.round == decided.round and r.attempt == decided.attempt]
            assert len(siblings) == 2
            has_kept = any(r.verdict == "kept" for r in siblings)
            assert has_kept == (decided.decision == "selected")
            seen.add((decided.decision, decided.attempt))
        assert (after.best.status == "pruned") == (after.rounds[-1].decision == "pruned")
        with engine.branch(list(after.prompt_ids)) as root:
            root.expand(2, EIGHT)
            further = {child.trace: tuple(child.chunk) for child in root.expand(2, EIGHT)}
        if len([r for r in after.tree if r.round == 0]) > 2:
            assert further == {trace: first[trace] for trace in further}
        del further
    assert {("selected", 0), ("resampled", 0), ("resampled", 1), ("pruned", 2)} <= seen
    assert {attempt for decision, attempt in seen if decision == "selected"} > {0}, "no attempt succeeded"


def test_chunks_are_halved_down_to_a_minimum(engine: Engine, random_prompts: Prompts) -> None:
    prompts = random_prompts(6, 32)
    options = hard_options(engine, prompts, 0.5)
    lengths: set[tuple[str, int]] = set()
    for s in engine.select_expand(prompts, **options, on_unlearnable="shorten", min_chunk_tokens=3):
        for decided in s.rounds:
            assert decided.chunk_tokens == decided.chunk_limit == (8, 4, 3)[decided.attempt]
            siblings = [r for r in s.tree if r.round == decided.round and r.attempt == decided.attempt]
            assert all(len(r.token_ids) == decided.chunk_tokens or r.ended != "chunk" for r in siblings)
            lengths.add((decided.decision, decided.chunk_tokens))
        assert sum(c.tokens for c in s.best.chunks) == len(s.best.token_ids)
    assert {("selected", 8), ("shortened", 8), ("shortened", 4), ("pruned", 3)} <= lengths
    assert {("selected", 4), ("selected", 3)} & lengths


def test_halving_keeps_the_delimiter_and_halves_the_limit() -> None:
    chunk = Chunk(tokens=100, until="\n", limit=130)
    assert chunk.halved(16) == Chunk(tokens=50, until="\n", limit=65)
    assert Chunk(tokens=20, limit=25).halved(16) == Chunk(tokens=16, limit=16)
    assert Chunk(tokens=40).halved(16) == Chunk(tokens=20)
    assert Chunk(tokens=16).halved(16) is None


def test_the_best_candidate_is_kept_and_marked(engine: Engine, random_prompts: Prompts) -> None:
    prompts = random_prompts(4, 33)
    options = {"candidates": 3, "chunk": EIGHT, "max_tokens": 24}
    free = engine.select_expand(prompts, **options)
    forced = engine.select_expand(prompts, **options, threshold=0.0, on_unlearnable="accept_best")
    assert [s.best.token_ids for s in forced] == [s.best.token_ids for s in free]
    for s in forced:
        assert all(c.is_forced for c in s.best.chunks)
        assert {r.verdict for r in s.tree} == {"forced", "threshold"}
        assert {r.decision for r in s.rounds} == {"forced"}
        assert s.best.status != "pruned"
    assert not any(c.is_forced for s in free for c in s.best.chunks)
    # of several branches one goes on
    wide = engine.select_expand(prompts, **options, beam=2, threshold=0.0, on_unlearnable="accept_best")
    assert [s.best.token_ids for s in wide] == [s.best.token_ids for s in free]


@pytest.mark.parametrize(
    ("changes", "num_pages"),
    [
        ({"on_unlearnable": "resample", "max_resamples": 3}, 38),
        ({"on_unlearnable": "resample", "beam": 2, "criterion": Perplexity(scope="trajectory")}, 68),
        ({"on_unlearnable": "shorten", "min_chunk_tokens": 2}, 38),
        ({"on_unlearnable": "accept_best", "beam": 2, "criterion": Perplexity(scope="trajectory")}, 68),
        ({"on_unlearnable": "resample", "selection_temperature": 40.0, "candidates": 3, "beam": 2}, 50),
        ({"on_unlearnable": "accept_best", "prompt_budget": Budget(tokens=70)}, 38),
    ],
    ids=str,
)
def test_batching_suspension_and_skipping_change_nothing(
    pair: Pair, engine: Engine, random_prompts: Prompts, changes: dict[str, Any], num_pages: int
) -> None:
    prompts = [p[:5] for p in random_prompts(6, 34)]
    prompts.append(prompts[0])
    plain = {name: value for name, value in changes.items() if name in ("candidates", "beam", "criterion")}
    options = {
        **hard_options(engine, prompts, 0.7, max_tokens=28, chunk=Chunk(tokens=4, until=None), **plain),
        **changes,
    }
    base = outcomes(engine.select_expand(prompts, **options))
    assert len({repr(outcome) for outcome in base}) == len(prompts)
    assert outcomes(pair.engine(max_num_seqs=1).select_expand(prompts, **options)) == base
    order = [4, 6, 2, 0, 1, 3, 5]  # equal prompts in another order are other draws
    permuted = outcomes(engine.select_expand([prompts[i] for i in order], **options))
    assert [permuted[order.index(i)] for i in range(1, 6)] == base[1:6]
    tight = small_pages(pair, num_pages)
    assert outcomes(tight.select_expand(prompts, **options)) == base
    assert tight.usage.prefill_tokens > 2 * sum(map(len, prompts)), "no prompt was suspended"
    assert tight.pages_in_use[0] == 0
    rest = list(engine.iter_select_expand(prompts, **options, skip=frozenset({1, 4})))
    assert outcomes(sorted(rest, key=lambda s: s.index)) == [base[i] for i in (0, 2, 3, 5, 6)]


@pytest.mark.parametrize("policy", ["stop", "resample", "shorten", "accept_best"])
def test_no_prompt_samples_more_than_was_planned(engine: Engine, random_prompts: Prompts, policy: str) -> None:
    prompts = random_prompts(3, 35)
    before = replace(engine.usage)
    options = {"candidates": 2, "chunk": EIGHT, "max_tokens": 20, "threshold": 0.0, "min_chunk_tokens": 2}
    iterator = engine.iter_select_expand(prompts, **options, on_unlearnable=policy)
    selections = [next(iterator)]
    planned = engine.usage.planned_tokens - before.planned_tokens
    assert planned >= engine.usage.sampled_tokens - before.sampled_tokens
    selections += iterator
    assert engine.usage.planned_tokens - before.planned_tokens == sum(s.tokens_sampled for s in selections)


def test_a_prompts_budget_of_tokens_is_never_passed(engine: Engine, random_prompts: Prompts) -> None:
    prompts = random_prompts(6, 36)
    options = {"candidates": 3, "chunk": EIGHT, "max_tokens": 40, "beam": 2}
    free = engine.select_expand(prompts, **options)
    for tokens in (24, 71, 72, 120, 10_000):
        limited = engine.select_expand(prompts, **options, prompt_budget=Budget(tokens=tokens))
        for before, after in zip(free, limited, strict=True):
            assert after.tokens_sampled <= tokens
            assert [r.trace for r in after.tree] == [r.trace for r in before.tree][: len(after.tree)]
            if after.ended_by is None:
                assert outcomes([after]) == outcomes([before])
                continue
            assert after.ended_by == "prompt_budget.tokens"
            assert "budget" in {t.status for t in after.trajectories}
            assert "ended by prompt_budget.tokens" in repr(after)
            live = [t for t in after.trajectories if t.status == "budget"]
            assert tokens - after.tokens_sampled < len(live) * 3 * 8
            assert all(t.token_ids for t in live)
        assert (tokens == 10_000) == all(s.ended_by is None for s in limited)


class Clock:
    """A clock that goes on by a second with every look at it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(budgets, "monotonic", self)

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


def test_a_prompts_budget_of_seconds_ends_it_after_a_round(
    engine: Engine, random_prompts: Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    Clock(monkeypatch)
    options = {"candidates": 2, "chunk": Chunk(tokens=2, until=None), "max_tokens": 60}
    (s,) = engine.select_expand(random_prompts(1, 37), **options, prompt_budget=Budget(seconds=3.0))
    # the first look starts the clock, and there is one after every round
    assert (s.ended_by, s.best.status, len(s.rounds)) == ("prompt_budget.seconds", "budget", 3)
    assert len(s.best.token_ids) == 6
    (s,) = engine.select_expand(random_prompts(1, 37), **options, prompt_budget=Budget(seconds=1e-9))
    assert len(s.rounds) == 1


@pytest.mark.parametrize("limit", [{"tokens": 1}, {"tokens": 150}, {"seconds": 1.0}, {"seconds": 40.0}], ids=str)
def test_the_budget_of_all_ends_the_search_and_leaves_finished_prompts_alone(
    pair: Pair, random_prompts: Prompts, limit: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = random_prompts(8, 38)
    options = {"candidates": 2, "chunk": Chunk(tokens=4, until=None), "max_tokens": 12}
    free = pair.engine(max_num_seqs=4).select_expand(prompts, **options)
    Clock(monkeypatch)
    engine = pair.engine(max_num_seqs=4)
    limited = engine.select_expand(prompts, **options, total_budget=Budget(**limit))
    assert engine.pages_in_use[0] == 0
    assert [s.index for s in limited] == list(range(8))
    ended = [s for s in limited if s.ended_by is not None]
    assert {s.ended_by for s in ended} == {f"total_budget.{name}" for name in limit}
    assert all(t.status == "budget" for s in ended for t in s.trajectories)
    finished = [s for s in limited if s.ended_by is None]
    assert outcomes(finished) == outcomes([free[s.index] for s in finished])
    assert bool(finished) == (limit in ({"tokens": 150}, {"seconds": 40.0}))
    assert ended
    if "tokens" in limit:
        assert limit["tokens"] <= engine.usage.sampled_tokens < limit["tokens"] + 4 + 2
    assert engine.usage.finished_prompts == 8


def test_a_budget_that_is_not_reached_changes_nothing(engine: Engine, random_prompts: Prompts) -> None:
    prompts = random_prompts(3, 39)
    options = {"candidates": 2, "chunk": EIGHT, "max_tokens": 16}
    ample = Budget(tokens=1 << 40, seconds=1e9)
    limited = engine.select_expand(prompts, **options, prompt_budget=ample, total_budget=ample)
    assert outcomes(limited) == outcomes(engine.select_expand(prompts, **options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_resamples": 0}, "max_resamples must be at least 1, not 0"),
        ({"min_chunk_tokens": 0}, "min_chunk_tokens must be at least 1, not 0"),
        ({"selection_temperature": -0.5}, r"selection_temperature must be 0 or at least 1e-30, not -0\.5"),
        ({"selection_temperature": 1e-40}, "selection_temperature must be 0 or at least 1e-30, not 1e-40"),
        ({"on_unlearnable": "resample", "sampling": Sampling(temperature=0.0)}, "resample draws the same candidates"),
        ({"on_unlearnable": "shorten", "chunk": 16}, "chunk tokens 16 must be above min_chunk_tokens 16"),
        ({"prompt_budget": Budget(tokens=9), "chunk": 4, "max_tokens": 5}, "tokens 9 must be at least 20, which"),
    ],
    ids=str,
)
def test_options_that_cannot_do_anything_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        SearchOptions(**options)


def test_a_budget_of_nothing_is_refused() -> None:
    with pytest.raises(InputError, match="budget tokens must be at least 1, not 0"):
        Budget(tokens=0)
    for seconds in (0.0, -1.0):
        with pytest.raises(InputError, match=f"budget seconds must be above 0, not {seconds}"):
            Budget(seconds=seconds)


def test_what_a_selection_and_its_records_say(engine: Engine, random_prompts: Prompts) -> None:
    options = {"candidates": 2, "chunk": EIGHT, "max_tokens": 8, "selection_temperature": 2.0}
    (s,) = engine.select_expand(random_prompts(1, 40), **options, threshold=math.inf)
    assert ", probability " in repr(s.tree[0])
    (s,) = engine.select_expand(random_prompts(1, 40), **options, threshold=0.0, on_unlearnable="resample")
    assert "2 rounds resampled" in repr(s)
    assert ", attempt 2, threshold" in repr(s.tree[-1])
    assert s.count_rounds("resampled") == 2
