"""The search against independent re-implementations: sampling alone, best-of-N, a replay of every verdict."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from support.small_pages import small_pages
from support.toys import ENDINGS, Pair

from genssd.engine.common.errors import InputError
from genssd.engine.criteria.candidate import Candidate
from genssd.engine.criteria.likelihood import Perplexity
from genssd.engine.decoding.chunk import Chunk
from genssd.engine.decoding.expansion import Expansion
from genssd.engine.engine import Engine
from genssd.engine.models.sampling import Sampling
from genssd.engine.search.selection import CandidateRecord, Selection
from genssd.engine.texts.loops import LoopGuard

Prompts = Callable[[int, int], list[list[int]]]
EIGHT = Chunk(tokens=8, until=None)


def outcome(selection: Selection) -> tuple[object, ...]:
    """The part of a selection that must not depend on how a search is run; scores may differ in the last bits."""
    return (
        selection.prompt_ids,
        selection.occurrence,
        selection.error,
        [(t.token_ids, t.status, t.trace, [c.tokens for c in t.chunks]) for t in selection.trajectories],
        [(r.trace, r.token_ids, r.verdict, r.ended) for r in selection.tree],
    )


def outcomes(selections: Sequence[Selection]) -> list[tuple[object, ...]]:
    return [outcome(s) for s in selections]


@dataclass(frozen=True, kw_only=True)
class Rules:
    """The options of a search that its replay needs."""

    candidates: int
    beam: int = 1
    threshold: float = math.inf
    trajectory: bool = False
    shortest: int = 8
    guard: LoopGuard | None = None


def loops(tokens: list[int], guard: LoopGuard | None) -> bool:
    if guard is None:
        return False
    for period in range(1, guard.max_period + 1):
        span = max(guard.min_tokens, period * guard.min_repeats)
        tail = tokens[-span:]
        if len(tail) == span and all(tail[i] == tail[i - period] for i in range(period, span)):
            return True
    return False


def replay(pair: Pair, selection: Selection, rules: Rules) -> None:
    """Judge the recorded candidates again, on transformers' log-probabilities alone, and compare every verdict."""
    prompt, records = list(selection.prompt_ids), {r.trace: r for r in selection.tree}
    live: list[tuple[int, ...]] = [()]
    history: dict[tuple[int, ...], list[int]] = {(): []}
    logprobs: dict[tuple[int, ...], list[float]] = {(): []}
    final: dict[tuple[int, ...], str] = {}
    judged = 0
    while live:
        ranked: list[tuple[float, int, CandidateRecord]] = []
        verdicts: dict[tuple[int, ...], str] = {}
        for parent in live:
            seen: list[tuple[int, ...]] = []
            acceptable = 0
            for index in range(rules.candidates):
                record = records[(*parent, index)]
                full = history[parent] + list(record.token_ids)
                history[record.trace] = full
                logprobs[record.trace] = pair.logprobs("student", prompt, full).tolist()
                chunk = len(record.token_ids)
                borrowing = rules.shortest if record.ended != "chunk" else 0
                span = len(full) if rules.trajectory else min(len(full), max(chunk, borrowing))
                score = math.exp(-sum(logprobs[record.trace][-span:]) / span)
                assert record.score == pytest.approx(score, rel=1e-3)
                if record.token_ids in seen:
                    verdicts[record.trace] = "duplicate"
                elif loops(full, rules.guard):
                    verdicts[record.trace] = "loop"
                elif score > rules.threshold:
                    verdicts[record.trace] = "threshold"
                else:
                    ranked.append((score, len(ranked), record))
                    acceptable += 1
                seen.append(record.token_ids)
            if not acceptable:
                final[parent] = "pruned"
        ranked.sort(key=lambda entry: entry[:2])
        slots = rules.beam - sum(status != "pruned" for status in final.values())
        live = []
        for place, (_, _, record) in enumerate(ranked):
            verdicts[record.trace] = "kept" if place < slots else "beaten"
            if place >= slots:
                continue
            if record.ended == "chunk":
                live.append(record.trace)
            else:
                final[record.trace] = record.ended
        judged += len(verdicts)
        assert verdicts == {trace: records[trace].verdict for trace in verdicts}
    assert judged == len(selection.tree) == len(records)
    assert {t.trace: t.status for t in selection.trajectories} == final
    for t in selection.trajectories:
        assert list(t.token_ids) == history[t.trace]
        torch.testing.assert_close(
            t.stats.logprob.double(), torch.tensor(logprobs[t.trace]).double(), atol=1e-4, rtol=0
        )
        assert [c.score for c in t.chunks] == [records[t.trace[: i + 1]].score for i in range(len(t.trace))]


@pytest.mark.parametrize(
    "chunk",
    [
        EIGHT,
        Chunk(tokens=1, until=None),
        Chunk(tokens=5, until="e", limit=11),
        Chunk(tokens=100, until=None),
        Chunk(tokens=3, until=None),
    ],
    ids=str,
)
def test_one_candidate_without_a_threshold_is_plain_sampling(
    engine: Engine, random_prompts: Prompts, chunk: Chunk
) -> None:
    prompts = random_prompts(6, 1)
    sampling = Sampling(temperature=0.9, top_p=0.95)
    plain = engine.generate(prompts, max_tokens=29, seed=5, sampling=sampling)
    searched = engine.select_expand(prompts, candidates=1, chunk=chunk, max_tokens=29, seed=5, sampling=sampling)
    assert [(s.best.token_ids, s.best.status) for s in searched] == [(c.token_ids, c.status) for (c,) in plain]
    assert len({c.token_ids for (c,) in plain}) == 6
    assert any(len(c.token_ids) == 29 for (c,) in plain)


def test_a_chunk_of_everything_is_best_of_n(engine: Engine, pair: Pair, random_prompts: Prompts) -> None:
    prompts = random_prompts(5, 2)
    samples = engine.generate(prompts, n=4, max_tokens=20, seed=3)
    searched = engine.select_expand(
        prompts, candidates=4, chunk=Chunk(tokens=20, until=None), max_tokens=20, seed=3, criterion=Perplexity()
    )
    winners = []
    for prompt, completions, selection in zip(prompts, samples, searched, strict=True):
        nll = [-float(pair.logprobs("student", prompt, list(c.token_ids)).mean()) for c in completions]
        winner = min(range(4), key=nll.__getitem__)
        winners.append(winner)
        assert selection.best.token_ids == completions[winner].token_ids
        assert selection.best.score == pytest.approx(math.exp(nll[winner]), rel=1e-4)
        assert [r.token_ids for r in selection.tree] == [c.token_ids for c in completions]
    assert any(winners)


GUARD = LoopGuard(max_period=3, min_repeats=2, min_tokens=2)


@pytest.mark.parametrize(
    ("rules", "sampling", "chunk"),
    [
        pytest.param(Rules(candidates=3), Sampling(), Chunk(tokens=7, until=None), id="greedy"),
        pytest.param(
            Rules(candidates=4, shortest=1), Sampling(), Chunk(tokens=2, until=None, shortest=1), id="short-chunks"
        ),
        pytest.param(Rules(candidates=3, beam=2, trajectory=True), Sampling(), EIGHT, id="beam-2"),
        pytest.param(
            Rules(candidates=2, beam=5, trajectory=True), Sampling(), Chunk(tokens=4, until=None), id="beam-5"
        ),
        pytest.param(
            Rules(candidates=3, beam=3, trajectory=True, threshold=900.0),
            Sampling(),
            Chunk(tokens=4, until=None),
            id="beam-3-threshold",
        ),
        pytest.param(
            Rules(candidates=4, beam=2, trajectory=True, guard=GUARD),
            Sampling(temperature=0.35),
            Chunk(tokens=2, until=None),
            id="cold-with-duplicates-and-loops",
        ),
    ],
)
def test_every_verdict_can_be_derived_again(
    engine: Engine, pair: Pair, random_prompts: Prompts, rules: Rules, sampling: Sampling, chunk: Chunk
) -> None:
    selections = engine.select_expand(
        random_prompts(4, 4),
        candidates=rules.candidates,
        chunk=chunk,
        beam=rules.beam,
        criterion=Perplexity(scope="trajectory" if rules.trajectory else "chunk"),
        threshold=None if math.isinf(rules.threshold) else rules.threshold,
        max_tokens=14,
        sampling=sampling,
        loop_guard=rules.guard,
        seed=1,
    )
    for selection in selections:
        replay(pair, selection, rules)
        assert sum(t.status != "pruned" for t in selection.trajectories) <= rules.beam
    verdicts = {r.verdict for s in selections for r in s.tree}
    statuses = {t.status for s in selections for t in s.trajectories}
    assert {"kept", "beaten"} <= verdicts
    if not math.isinf(rules.threshold):
        assert "threshold" in verdicts
        assert "pruned" in statuses
        assert statuses - {"pruned"}
    if rules.guard is not None:
        assert {"loop", "duplicate"} <= verdicts


def test_trajectories_are_sorted_and_chunks_tell_the_runner_up(engine: Engine, random_prompts: Prompts) -> None:
    criterion = Perplexity(scope="trajectory")
    for selection in engine.select_expand(
        random_prompts(6, 5), candidates=3, beam=3, chunk=EIGHT, max_tokens=40, criterion=criterion
    ):
        order = [(("finished", "length", "pruned").index(t.status), t.score) for t in selection.trajectories]
        assert order == sorted(order)
        assert selection.best is selection.trajectories[0]
        first_round = [r for r in selection.tree if r.round == 0]
        for t in selection.trajectories:
            chosen = t.chunks[0]
            others = [r.score for r in first_round if r.trace != t.trace[:1]]
            assert chosen.runner_up == min(others)
            assert sum(c.tokens for c in t.chunks) == len(t.token_ids)
        assert selection.tokens_sampled == sum(len(r.token_ids) for r in selection.tree)


def test_threshold_zero_prunes_at_once_and_infinity_never(engine: Engine, random_prompts: Prompts) -> None:
    prompts = random_prompts(4, 6)
    pruned = engine.select_expand(prompts, candidates=3, chunk=EIGHT, max_tokens=24, threshold=0.0)
    for selection in pruned:
        assert [t.status for t in selection.trajectories] == ["pruned"]
        assert selection.best.token_ids == ()
        assert math.isnan(selection.best.score)
        assert [r.verdict for r in selection.tree] == ["threshold"] * 3
    free = engine.select_expand(prompts, candidates=3, chunk=EIGHT, max_tokens=24)
    endless = engine.select_expand(prompts, candidates=3, chunk=EIGHT, max_tokens=24, threshold=math.inf)
    assert outcomes(free) == outcomes(endless)
    assert all(t.status != "pruned" for s in free for t in s.trajectories)


def test_a_threshold_keeps_what_was_accepted_before_it(engine: Engine, random_prompts: Prompts) -> None:
    prompts = random_prompts(8, 7)
    free = engine.select_expand(prompts, candidates=2, chunk=EIGHT, max_tokens=40)
    # between the values that the second and third rounds reach, so that some prompts are pruned on the way
    scores = sorted(c.score for s in free for c in s.best.chunks)
    threshold = scores[3 * len(scores) // 4]
    cut = engine.select_expand(prompts, candidates=2, chunk=EIGHT, max_tokens=40, threshold=threshold)
    lengths = set()
    for before, after in zip(free, cut, strict=True):
        accepted = next((i for i, c in enumerate(before.best.chunks) if c.score > threshold), None)
        if accepted is None:
            assert after.best.token_ids == before.best.token_ids
            continue
        kept = sum(c.tokens for c in before.best.chunks[:accepted])
        assert after.best.status == "pruned"
        assert after.best.token_ids == before.best.token_ids[:kept]
        lengths.add(kept)
    assert len(lengths) > 1


def test_more_candidates_never_worsen_the_first_chunk(engine: Engine, random_prompts: Prompts) -> None:
    prompts = random_prompts(6, 8)
    best: list[list[float]] = []
    first: list[list[tuple[int, ...]]] = [[] for _ in prompts]
    for n in (1, 2, 3, 5):
        selections = engine.select_expand(prompts, candidates=n, chunk=EIGHT, max_tokens=8)
        for before, s in zip(first, selections, strict=True):
            now = [r.token_ids for r in s.tree]
            assert now[: len(before)] == before, "the candidates are not nested"
            before[:] = now
        best.append([s.best.score for s in selections])
    for fewer, more in pairwise(best):
        assert all(b <= a * (1 + 1e-5) for a, b in zip(fewer, more, strict=True))
    assert best[0] != best[-1]


def test_a_student_equal_to_the_teacher_picks_the_likeliest_candidate(pair: Pair, random_prompts: Prompts) -> None:
    twin = replace(pair, student=pair.teacher).engine()
    picks = set()
    for selection in twin.select_expand(random_prompts(5, 9), candidates=4, chunk=EIGHT, max_tokens=24, seed=9):
        for r in range(max(record.round for record in selection.tree) + 1):
            candidates = [record for record in selection.tree if record.round == r]
            for record in candidates:
                torch.testing.assert_close(record.stats.logprob, record.teacher_logprob, atol=1e-4, rtol=0)
            likeliest = max(candidates, key=lambda record: float(record.teacher_logprob.mean()))
            assert likeliest.verdict == "kept"
            picks.add(likeliest.trace[-1])
    assert picks == {0, 1, 2, 3}


def test_batching_order_and_company_change_no_trajectory(pair: Pair, random_prompts: Prompts) -> None:
    prompts = random_prompts(6, 10)
    options = {"candidates": 3, "chunk": EIGHT, "max_tokens": 18, "beam": 2, "seed": 2}
    base = outcomes(pair.engine().select_expand(prompts, **options))
    for max_num_seqs in (1, 5):
        assert outcomes(pair.engine(max_num_seqs=max_num_seqs).select_expand(prompts, **options)) == base
    order = [4, 0, 2, 1, 3, 5]
    permuted = outcomes(pair.engine().select_expand([prompts[i] for i in order], **options))
    assert permuted == [base[i] for i in order]
    more = outcomes(pair.engine().select_expand([*random_prompts(2, 11), *prompts], **options))
    assert more[2:] == base
    alone = outcomes(pair.engine().select_expand(prompts[3:4], **options))
    assert alone == base[3:4]
    other_seed = outcomes(pair.engine().select_expand(prompts, **{**options, "seed": 3}))
    assert all(a != b for a, b in zip(other_seed, base, strict=True))


PAGE_BYTES = 16 * 1024
"""Size of both models' pages of 16 tokens: 2 layers, keys and values, 2 heads of 16 floats, twice."""


def test_suspended_prompts_come_to_the_same_end(pair: Pair, random_prompts: Prompts) -> None:
    prompts = [p[:5] for p in random_prompts(7, 12)]
    options = {"candidates": 2, "chunk": Chunk(tokens=4, until=None), "max_tokens": 28, "seed": 1}
    roomy = pair.engine()
    base = roomy.select_expand(prompts, **options)
    prefill = 2 * sum(len(p) for p in prompts if len(p) > 1)
    assert roomy.usage.prefill_tokens == prefill, "a prefix was computed twice"
    tight = small_pages(pair, 48)
    assert tight.pages_in_use == (0, 96)
    assert outcomes(tight.select_expand(prompts, **options)) == outcomes(base)
    assert tight.usage.prefill_tokens > prefill, "no prompt was suspended: the test does not test anything"
    assert tight.usage.sampled_tokens == roomy.usage.sampled_tokens
    assert tight.pages_in_use[0] == 0


def test_a_round_is_planned_once_however_often_it_waits(
    pair: Pair, random_prompts: Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned: list[Expansion] = []

    def counted(*arguments: Any) -> Expansion:
        planned.append(Expansion(*arguments))
        return planned[-1]

    monkeypatch.setattr("genssd.engine.search.prompt_search.Expansion", counted)
    prompts = [p[:5] for p in random_prompts(7, 12)]
    tight = small_pages(pair, 48)
    options = {"candidates": 2, "chunk": Chunk(tokens=4, until=None), "max_tokens": 28, "seed": 1}
    selections = tight.select_expand(prompts, **options)
    assert tight.usage.prefill_tokens > 2 * sum(map(len, prompts)), "no prompt was suspended"
    assert len(planned) == sum(len({record.trace[:-1] for record in s.tree}) for s in selections)


def test_suspension_with_a_beam(pair: Pair, random_prompts: Prompts) -> None:
    prompts = [p[:5] for p in random_prompts(6, 13)]
    options = {"candidates": 2, "beam": 2, "chunk": Chunk(tokens=4, until=None), "max_tokens": 24}
    options["criterion"] = Perplexity(scope="trajectory")
    roomy, tight = pair.engine(), small_pages(pair, 90)
    assert outcomes(tight.select_expand(prompts, **options)) == outcomes(roomy.select_expand(prompts, **options))
    assert tight.usage.prefill_tokens > roomy.usage.prefill_tokens
    assert tight.pages_in_use[0] == 0


def test_a_prompt_that_outgrows_the_cache_is_reported_and_the_others_go_on(pair: Pair) -> None:
    # 12 pages of 16 tokens: two candidates beside a response of 90 tokens still fit, beside 190 they do not
    tight = pair.engine(memory_bytes=12 * PAGE_BYTES)
    prompts = [[65] * 100, [66] * 20, [67] * 100]
    options = {"candidates": 2, "chunk": EIGHT, "max_tokens": 64, "loop_guard": None, "seed": 1}
    selections = tight.select_expand(prompts, **options)
    assert tight.pages_in_use[0] == 0
    reference = pair.engine().select_expand(prompts, **options)
    failed = [s for s in selections if s.error is not None]
    assert {s.index for s in failed} <= {0, 2}
    assert failed
    for selection in failed:
        assert "does not fit into the key-value cache" in str(selection.error)
    for actual, expected in zip(selections, reference, strict=True):
        if actual.error is None:
            assert outcome(actual) == outcome(expected)
    assert selections[1].error is None


def test_every_candidate_token_is_sampled_and_scored_exactly_once(pair: Pair, random_prompts: Prompts) -> None:
    for beam, threshold in ((1, None), (3, None), (2, 500.0)):
        engine = pair.engine()
        prompts = random_prompts(4, 14)
        selections = engine.select_expand(
            prompts, candidates=3, chunk=EIGHT, beam=beam, max_tokens=20, threshold=threshold
        )
        total = sum(len(r.token_ids) for s in selections for r in s.tree)
        assert engine.usage.sampled_tokens == engine.usage.scored_tokens == total
        assert engine.usage.prefill_tokens == 2 * sum(len(p) for p in prompts if len(p) > 1)
        assert all(len(r.stats) == len(r.token_ids) == len(r.teacher_logprob) for s in selections for r in s.tree)


def test_teacher_logprobs_are_at_temperature_one_over_the_whole_vocabulary(
    engine: Engine, pair: Pair, random_prompts: Prompts
) -> None:
    (selection,) = engine.select_expand(
        random_prompts(1, 15), candidates=2, chunk=EIGHT, max_tokens=16, sampling=Sampling(temperature=0.5, top_k=20)
    )
    for record in selection.tree:
        history = [t for k in range(1, len(record.trace)) for r in selection.tree if r.trace == record.trace[:k]
                   for t in r.token_ids]  # fmt: skip
        exact = pair.logprobs("teacher", list(selection.prompt_ids), history + list(record.token_ids))
        torch.testing.assert_close(record.teacher_logprob.double(), exact[-len(record.token_ids) :], atol=1e-4, rtol=0)


def test_responses_end_at_the_first_end_of_sequence(engine: Engine, random_prompts: Prompts) -> None:
    selections = engine.select_expand(random_prompts(12, 16), candidates=4, chunk=EIGHT, max_tokens=30)
    for record in (r for s in selections for r in s.tree):
        ends = [i for i, token in enumerate(record.token_ids) if token in ENDINGS]
        assert ends in ([], [len(record.token_ids) - 1])
        assert (record.ended == "finished") == bool(ends)
    finished = [t for s in selections for t in s.trajectories if t.status == "finished"]
    assert finished
    assert any(len(t.token_ids) % 8 for t in finished), "no response ended inside a chunk"
    assert {len(t.token_ids) for s in selections for t in s.trajectories if t.status == "length"} == {30}


def test_skipping_prompts_changes_nothing_for_the_others(engine: Engine, random_prompts: Prompts) -> None:
    a, b, c = random_prompts(3, 17)
    prompts = [a, b, a, a, c, b]
    options = {"candidates": 2, "chunk": EIGHT, "max_tokens": 16}
    everything = engine.select_expand(prompts, **options)
    assert [s.occurrence for s in everything] == [0, 0, 1, 2, 0, 1]
    assert len({everything[i].best.token_ids for i in (0, 2, 3)}) == 3
    for skip in (frozenset({0}), frozenset({1, 2, 4}), frozenset({0, 2, 5}), frozenset(range(6))):
        rest = sorted(engine.iter_select_expand(prompts, **options, skip=skip), key=lambda s: s.index)
        assert [s.index for s in rest] == [i for i in range(6) if i not in skip]
        assert outcomes(rest) == [outcome(everything[s.index]) for s in rest]


def test_an_abandoned_search_returns_its_pages(pair: Pair, random_prompts: Prompts) -> None:
    engine = pair.engine(max_num_seqs=6)
    for taken in (0, 1, 3):
        iterator = engine.iter_select_expand(random_prompts(8, 18), candidates=3, chunk=EIGHT, max_tokens=40)
        for _ in range(taken):
            next(iterator)
        if taken:
            assert engine.pages_in_use[0] > 0
        iterator.close()  # type: ignore[attr-defined]
        assert engine.pages_in_use[0] == 0
    second = engine.select_expand(random_prompts(2, 18), candidates=2, chunk=EIGHT, max_tokens=8)
    assert outcomes(second) == outcomes(
        pair.engine().select_expand(random_prompts(2, 18), candidates=2, chunk=EIGHT, max_tokens=8)
    )


def test_an_abandoned_generation_returns_its_pages(pair: Pair, random_prompts: Prompts) -> None:
    engine = pair.engine(max_num_seqs=4)
    iterator = engine.iter_generate(random_prompts(8, 18), n=2, max_tokens=20)
    next(iterator)
    assert engine.pages_in_use[0] > 0
    iterator.close()  # type: ignore[attr-defined]
    assert engine.pages_in_use[0] == 0
    for model in ("teacher", "student"):
        engine.generate(random_prompts(3, 18), n=2, max_tokens=20, model=model)  # type: ignore[arg-type]
        assert engine.pages_in_use[0] == 0


@dataclass(frozen=True)
class Misbehaving:
    """A criterion that raises, or returns NaN, from its given call on."""

    calls: list[int]
    result: float | None

    def score(self, candidate: Candidate) -> float:
        self.calls[0] -= 1
        if self.calls[0] >= 0:
            return float(len(candidate.token_ids))
        if self.result is None:
            raise RuntimeError("criterion broke")
        return self.result

    def higher_is_better(self) -> bool:
        return False


@pytest.mark.parametrize("calls", [0, 1, 7, 20])
def test_a_criterion_that_raises_leaves_no_pages(engine: Engine, random_prompts: Prompts, calls: int) -> None:
    with pytest.raises(InputError, match=r"Misbehaving failed in score.*RuntimeError: criterion broke"):
        engine.select_expand(
            random_prompts(5, 19), candidates=3, chunk=EIGHT, max_tokens=40, criterion=Misbehaving([calls], None)
        )


def test_a_criterion_that_returns_nan_is_named_with_the_prompt(engine: Engine, random_prompts: Prompts) -> None:
    with pytest.raises(InputError, match=r"Misbehaving.*NaN.*prompt \d"):
        engine.select_expand(
            random_prompts(5, 19), candidates=3, chunk=EIGHT, max_tokens=40, criterion=Misbehaving([5], math.nan)
        )


class LongestText:
    """A criterion where more is better, without any model."""

    def score(self, candidate: Candidate) -> float:
        return float(sum(candidate.token_ids))

    def higher_is_better(self) -> bool:
        return True


def test_the_direction_of_a_criterion_counts(engine: Engine, random_prompts: Prompts) -> None:
    for selection in engine.select_expand(
        random_prompts(4, 20), candidates=4, chunk=EIGHT, max_tokens=16, criterion=LongestText()
    ):
        first = [r for r in selection.tree if r.round == 0]
        totals = [sum(r.token_ids) for r in first]
        assert [r.verdict for r in first].index("kept") == totals.index(max(totals))
        assert selection.best.chunks[0].runner_up == sorted(totals)[-2]
    worst = engine.select_expand(
        random_prompts(2, 20), candidates=2, chunk=EIGHT, max_tokens=16, criterion=LongestText(), threshold=1e6
    )
    assert [s.best.status for s in worst] == ["pruned", "pruned"]


def test_random_selection_is_reproducible_and_not_the_first(engine: Engine, random_prompts: Prompts) -> None:
    options = {"candidates": 4, "chunk": EIGHT, "max_tokens": 16, "criterion": "random"}
    prompts = random_prompts(6, 21)
    one, two = engine.select_expand(prompts, **options), engine.select_expand(prompts, **options)
    assert outcomes(one) == outcomes(two)
    firsts = [s.best.trace[0] for s in one]
    assert len(set(firsts)) > 1
    reversed_order = engine.select_expand(prompts[::-1], **options)
    assert outcomes(reversed_order[::-1]) == outcomes(one)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"candidates": 0}, "candidates must be at least 1, not 0"),
        ({"beam": 0}, "beam must be at least 1, not 0"),
        ({"max_tokens": -3}, "max_tokens must be at least 1, not -3"),
        ({"criterion": "perplexity"}, r"unknown criterion 'perplexity'; registered: .*ppl.*random"),
        ({"criterion": 3}, "criterion must be text or a Criterion or a PoolCriterion, not 3"),
        ({"threshold": math.nan}, "threshold"),
    ],
    ids=str,
)
def test_a_bad_option_is_named_before_anything_runs(engine: Engine, options: dict[str, object], message: str) -> None:
    before = engine.usage.sampled_tokens
    with pytest.raises(InputError, match=message):
        engine.iter_select_expand(["abc"], **{"max_tokens": 8, "chunk": EIGHT, **options})  # type: ignore[arg-type]
    assert engine.usage.sampled_tokens == before


def test_no_prompts_give_no_selections(engine: Engine) -> None:
    assert engine.select_expand([]) == []
    assert engine.generate([]) == []
    assert engine.score([], []) == []


def test_results_come_as_prompts_end(pair: Pair, random_prompts: Prompts) -> None:
    engine = pair.engine(max_num_seqs=3)
    prompts = random_prompts(5, 22)
    iterator = engine.iter_select_expand(prompts, candidates=3, chunk=EIGHT, max_tokens=16)
    first = next(iterator)
    spent = engine.usage.sampled_tokens
    rest = list(iterator)
    assert sorted([first.index, *(s.index for s in rest)]) == list(range(5))
    assert engine.usage.sampled_tokens > spent


def test_two_searches_may_take_turns_on_one_cache(pair: Pair, random_prompts: Prompts) -> None:
    """Each sees the pages that the other has promised; both end with what they would have got alone."""
    tight = pair.engine(memory_bytes=40 * 16 * 1024)
    options = {"candidates": 3, "chunk": EIGHT, "max_tokens": 24}
    first, second = random_prompts(4, 19), random_prompts(4, 20)
    runs = [tight.iter_select_expand(prompts, **options) for prompts in (first, second)]
    outcomes_of_both: list[dict[int, Selection]] = [{}, {}]
    done = [False, False]
    while not all(done):
        for i, run in enumerate(runs):
            selection = next(run, None)
            done[i] = selection is None
            if selection is not None:
                outcomes_of_both[i][selection.index] = selection
    assert tight.pages_in_use[0] == 0
    for prompts, results in zip((first, second), outcomes_of_both, strict=True):
        alone = pair.engine().select_expand(prompts, **options)
        assert [results[i].error or results[i].best.token_ids for i in range(4)] == [s.best.token_ids for s in alone]


def test_a_single_string_is_no_list_of_prompts(engine: Engine) -> None:
    for call in (engine.select_expand, engine.generate):
        with pytest.raises(InputError, match="put a single one into a list"):
            call("abc", max_tokens=3)
