"""The built-in criteria and their registry."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Sequence
from fractions import Fraction
from itertools import product
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from genssd.engine.common.errors import InputError
from genssd.engine.criteria import criterion_names
from genssd.engine.criteria.by_step import AslecCasl, AslecDrop, LocalNaturalness
from genssd.engine.criteria.candidate import ActivationMeans, Candidate, Window
from genssd.engine.criteria.controls import Random
from genssd.engine.criteria.criterion import Criterion, PoolCriterion
from genssd.engine.criteria.criterion_calls import evaluate
from genssd.engine.criteria.criterion_names import register_criterion, resolve
from genssd.engine.criteria.learning_gain import Lark
from genssd.engine.criteria.likelihood import Perplexity, RankSurprisal
from genssd.engine.criteria.weighted_rank import WeightedRank
from genssd.kernels.logprob import TokenStats


def stats(
    logprob: Sequence[float], rank: Sequence[int] | None = None, sum_p2: Sequence[float] | None = None
) -> TokenStats:
    n = len(logprob)
    return TokenStats(
        logprob=torch.tensor(logprob, dtype=torch.float32),
        logsumexp=torch.zeros(n),
        entropy=torch.zeros(n),
        sum_p2=torch.zeros(n) if sum_p2 is None else torch.tensor(sum_p2, dtype=torch.float32),
        rank=torch.ones(n, dtype=torch.int32) if rank is None else torch.tensor(rank, dtype=torch.int32),
    )


def candidate(
    chunk: Sequence[float],
    history: Sequence[float],
    stream: int = 0,
    final: bool = True,
    *,
    finished: bool = False,
    rank: Sequence[int] | None = None,
    history_rank: Sequence[int] | None = None,
    sum_p2: Sequence[float] | None = None,
    teacher: Sequence[float] | None = None,
    pieces: Sequence[str] | None = None,
) -> Candidate:
    """pieces: of all tokens that have text, the history's first."""
    return Candidate(
        token_ids=tuple(range(len(chunk))),
        stats=stats(chunk, rank, sum_p2),
        history_ids=tuple(range(len(history))),
        history=stats(history, history_rank),
        teacher_logprob=torch.zeros(len(chunk)) if teacher is None else torch.tensor(teacher),
        final=final,
        finished=finished,
        stream=stream,
        pieces_of=None if pieces is None else lambda ids: list(pieces[: len(ids)]),
    )


LOGPROBS = st.lists(st.floats(-20, 0, width=32), max_size=12)


@given(chunk=LOGPROBS.filter(bool), history=LOGPROBS, min_tokens=st.integers(1, 10))
def test_perplexity_is_the_exponential_of_the_mean(chunk: list[float], history: list[float], min_tokens: int) -> None:
    borrowed = history[max(0, len(history) - max(0, min_tokens - len(chunk))) :]
    expected = math.exp(-math.fsum(borrowed + chunk) / len(borrowed + chunk))
    assert Perplexity().score(candidate(chunk, history).lengthened(min_tokens)) == pytest.approx(expected, rel=1e-6)
    full = math.exp(-math.fsum(history + chunk) / len(history + chunk))
    trajectory = Perplexity(scope="trajectory")
    assert trajectory.score(candidate(chunk, history).lengthened(min_tokens)) == pytest.approx(full, rel=1e-6)


def test_a_short_ending_is_scored_with_the_end_of_its_history() -> None:
    def score(made: Candidate, shortest: int) -> float:
        return Perplexity().score(made.lengthened(shortest))

    assert score(candidate([-1.0], [-9.0, -2.0, -2.0, -3.0]), 4) == pytest.approx(math.exp(2.0))
    assert score(candidate([-1.0], [-9.0]), 1) == pytest.approx(math.e)
    assert score(candidate([-1.0], [-9.0], final=False), 4) == pytest.approx(math.e)


def test_a_lengthened_candidate_takes_everything_along() -> None:
    made = dataclasses.replace(
        candidate([-1.0, -2.0], [-3.0, -4.0, -5.0], teacher=[-0.1, -0.2], finished=True),
        token_ids=(8, 9), history_ids=(5, 6, 7), history_teacher_logprob=torch.tensor([-0.3, -0.4, -0.5]),
    )  # fmt: skip
    longer = made.lengthened(4)
    assert (longer.history_ids, longer.token_ids) == ((5,), (6, 7, 8, 9))
    assert longer.stats.logprob.tolist() == [-4.0, -5.0, -1.0, -2.0]
    assert longer.history.logprob.tolist() == [-3.0]
    assert longer.teacher_logprob is not None
    assert longer.history_teacher_logprob is not None
    assert longer.teacher_logprob.tolist() == pytest.approx([-0.4, -0.5, -0.1, -0.2])
    assert longer.history_teacher_logprob.tolist() == pytest.approx([-0.3])
    assert longer.finished
    assert made.lengthened(9).history_ids == ()
    assert made.lengthened(2) is made


def test_perplexity_without_a_finite_value_is_infinite_not_nan() -> None:
    assert Perplexity().score(candidate([-math.inf, -1.0], [])) == math.inf
    assert Perplexity().score(candidate([-1e5], [])) == math.inf
    assert not Perplexity().higher_is_better()


def test_random_depends_on_the_stream_and_the_position_alone() -> None:
    one = Random().score(candidate([-1.0], [-1.0], stream=5))
    assert Random().score(candidate([-7.0], [-3.0], stream=5)) == one
    assert Random().score(candidate([-7.0, -3.0], [], stream=5)) == one
    assert Random().score(candidate([-1.0], [-1.0, -2.0], stream=5).lengthened(3)) != one
    assert Random().score(candidate([-1.0], [-1.0], stream=6)) != one
    assert Random().score(candidate([-1.0], [], stream=5)) != one
    assert 0 <= one < 1


def test_names_resolve_and_objects_pass_through() -> None:
    assert resolve("ppl") == Perplexity()
    assert resolve("random") == Random()
    own = Perplexity(window=3)
    assert resolve(own) is own
    with pytest.raises(InputError, match=r"unknown criterion 'pll'; registered: .*ppl"):
        resolve("pll")
    with pytest.raises(InputError, match=r"is no criterion: it needs score\(candidate\) and higher_is_better\(\)"):
        resolve(lambda c: 0.0)  # type: ignore[arg-type]


def test_a_class_in_place_of_an_object_is_refused() -> None:
    with pytest.raises(InputError, match="is no criterion"):
        resolve(Perplexity)  # type: ignore[arg-type]


def test_registered_criteria_are_made_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(criterion_names, "_MAKERS", dict(criterion_names._MAKERS))

    class Shortest:
        def score(self, candidate: Candidate) -> float:
            return float(len(candidate.token_ids))

        def higher_is_better(self) -> bool:
            return False

    register_criterion("shortest", Shortest)
    made = resolve("shortest")
    assert isinstance(made, Criterion)
    assert made.score(candidate([-1.0, -2.0], [])) == 2.0
    for taken in ("shortest", "ppl"):
        with pytest.raises(InputError, match=f"'{taken}' is already registered"):
            register_criterion(taken, Shortest)


# every criterion against its formula in plain floats

TOKENS = st.lists(
    st.tuples(
        st.floats(-20, 0, width=32),
        st.integers(1, 400),
        st.sampled_from(["ab", "", " é", "x. ", ".", "\n", "why? ", "€"]),
    ),
    max_size=10,
)


def build(history: list[tuple[float, int, str]], chunk: list[tuple[float, int, str]], finished: bool) -> Candidate:
    texts = [text for _, _, text in history + chunk]
    return candidate(
        [p for p, _, _ in chunk],
        [p for p, _, _ in history],
        finished=finished,
        rank=[r for _, r, _ in chunk],
        history_rank=[r for _, r, _ in history],
        pieces=texts[:-1] if finished else texts,
    )


@given(history=TOKENS, chunk=TOKENS.filter(bool), finished=st.booleans(), window=st.integers(10, 14))
def test_perplexity_in_every_scope_norm_and_reduction(
    history: list[tuple[float, int, str]], chunk: list[tuple[float, int, str]], finished: bool, window: int
) -> None:
    made = build(history, chunk, finished)
    texts = [text for _, _, text in history + chunk]
    if finished:
        texts[-1] = ""
    every = [(-p, text) for (p, _, _), text in zip(history + chunk, texts, strict=True)]
    for scope, norm, reduce in product(
        ("chunk", "trajectory", "window"), ("token", "byte", "sum"), ("mean", "max", "drop_first")
    ):
        options: dict[str, Any] = {"scope": scope, "norm": norm, "reduce": reduce, "window": window}
        if norm != "token" and reduce == "max":
            with pytest.raises(InputError, match="reduce='max'"):
                Perplexity(**options)
            continue
        counted = {"chunk": max(4, len(chunk)), "trajectory": len(every), "window": window}[scope]
        kept = every[max(0, len(every) - counted) :]
        if reduce == "drop_first" and len(kept) > 1:
            kept = kept[1:]
        total = math.fsum(nll for nll, _ in kept)
        expected = {
            "token": math.exp(min(700.0, total / len(kept))),
            "byte": math.exp(min(700.0, total / max(1, len("".join(text for _, text in kept).encode())))),
            "sum": total,
        }[norm]
        if reduce == "max":
            expected = math.exp(max(nll for nll, _ in kept))
        assert Perplexity(**options).score(made.lengthened(4)) == pytest.approx(expected, rel=1e-9), options


def test_a_window_is_the_last_tokens_even_of_a_longer_chunk() -> None:
    """Perplexity's scope: 'its last `window` tokens'."""
    made = candidate([-9.0, -2.0, -1.0], [-5.0])
    assert Perplexity(scope="window", window=2).score(made) == pytest.approx(math.exp(1.5))


@given(history=TOKENS, chunk=TOKENS.filter(bool), finished=st.booleans(), r_max=st.integers(1, 400))
def test_rank_surprisal_is_the_ratio_of_the_sums(
    history: list[tuple[float, int, str]], chunk: list[tuple[float, int, str]], finished: bool, r_max: int
) -> None:
    made = build(history, chunk, finished)
    scopes: tuple[Literal["chunk", "trajectory"], ...] = ("chunk", "trajectory")
    for scope in scopes:
        counted = [*(history if scope == "trajectory" else []), *(chunk[:-1] if finished else chunk)]
        value = RankSurprisal(scope=scope, r_max=r_max).score(made)
        if counted:
            surprisal = max(1e-12, -math.fsum(p for p, _, _ in counted))
            assert value == pytest.approx(sum(min(r, r_max) for _, r, _ in counted) / surprisal, rel=1e-9)
        else:
            assert value == math.inf


def test_rank_surprisal_leaves_out_the_end_of_sequence_and_clamps() -> None:
    made = candidate([-1.0, -3.0, -9.0], [], finished=True, rank=[500, 2, 7])
    assert resolve("rsr").score(made) == pytest.approx((100 + 2) / 4)  # type: ignore[union-attr]
    assert RankSurprisal().score(candidate([0.0], [], rank=[1])) == pytest.approx(1e12)


def test_rank_surprisal_on_the_toy_of_its_paper() -> None:
    """App. A.6 of 2601.14249: V=50, Zipf 2.3, the student is 0.8 A + 0.2 B; text of A, of B and of the student.

    Expected: surprisal, rank and mean ratio of one token as reproduced from the paper (200 draws), whose own are within
    7 %: 1.38/2.49/1.69, 2.73/4.31/1.30, 1.67/2.93/1.62.
    """
    generator = np.random.default_rng(11)
    zipf = np.arange(1, 51) ** -2.3
    zipf /= zipf.sum()
    sums = np.zeros((3, 3))
    for _ in range(200):
        a, b = zipf[generator.permutation(50)], zipf[generator.permutation(50)]
        student = 0.8 * a + 0.2 * b
        ranks = [1 + sum(q > p for q in student) for p in student]
        logprob = np.log(student)
        ratios = [RankSurprisal().score(candidate([p], [], rank=[r])) for p, r in zip(logprob, ranks, strict=True)]
        for row, text in enumerate((a, b, student)):
            sums[row] += (-(text @ logprob), text @ ranks, text @ ratios)
    expected = [[1.37, 2.46, 1.70], [2.64, 4.07, 1.30], [1.62, 2.78, 1.62]]
    np.testing.assert_allclose(sums / 200, expected, rtol=0.035)
    np.testing.assert_allclose(sums / 200, [[1.38, 2.49, 1.69], [2.73, 4.31, 1.30], [1.67, 2.93, 1.62]], rtol=0.07)
    sequences = [int(t) for t in generator.choice(50, size=4000, p=a)]  # one response: the ratio of the sums
    long = candidate(logprob[sequences].tolist(), [], rank=[ranks[t] for t in sequences])
    assert RankSurprisal().score(long) == pytest.approx((a @ ranks) / -(a @ logprob), rel=0.1)


def response_of(step_lengths: Sequence[int], generator: np.random.Generator, penalty: float) -> Candidate:
    """Steps of so many tokens, the last of each a full stop; log-probabilities N(-1, 0.1) less a penalty on the first
    token of every step."""
    pieces, logprob = [], []
    for i, length in enumerate(step_lengths):
        pieces += [" a" if i else "a", *"b" * (length - 2), "."]
        drawn = np.minimum(generator.normal(-1.0, 0.1, length), 0.0)
        drawn[0] -= penalty
        logprob += drawn.tolist()
    return candidate(logprob, [], pieces=pieces)


def test_dropping_heads_and_casl_undo_the_preference_for_long_steps() -> None:
    """Section 5.2: i.i.d. log-probabilities but for a fixed penalty of the first token of a step."""
    generator = np.random.default_rng(4)
    short = [response_of([6] * 20, generator, 3.0) for _ in range(60)]
    middle = [response_of([10] * 12, generator, 3.0) for _ in range(60)]
    long = [response_of([20] * 6, generator, 3.0) for _ in range(60)]
    plain = {name: [-math.log(Perplexity().score(c)) for c in group] for name, group in (("s", short), ("l", long))}
    assert min(plain["l"]) > max(plain["s"])
    for name in ("aslec_drop", "aslec_casl"):
        values = evaluate(resolve(name), short + middle + long)
        gap = np.mean(values[120:]) - np.mean(values[:60])
        assert abs(gap) < 0.01, name  # the plain gap is 3 (1/6 - 1/20) = 0.35
        wins = np.mean([a > b for a, b in zip(values[120:], values[:60], strict=True)])
        assert 0.25 < wins < 0.75, name
    gamma = AslecCasl().fit([AslecCasl().features(c) for c in short + middle + long])
    assert gamma == pytest.approx(-3.0, abs=0.3)


@given(history=TOKENS, chunk=TOKENS.filter(bool), finished=st.booleans(), skip=st.integers(0, 3))
def test_aslec_drop_is_the_mean_without_the_heads(
    history: list[tuple[float, int, str]], chunk: list[tuple[float, int, str]], finished: bool, skip: int
) -> None:
    made = build(history, chunk, finished)
    begin, content = len(history), len(history) + len(chunk) - finished
    heads = {t for start, end in made.steps() for t in range(start, min(end, start + skip))}
    values = dict(enumerate([p for p, _, _ in history + chunk][:content]))
    kept = [p for t, p in values.items() if t >= begin and t not in heads]
    kept = kept or [p for t, p in values.items() if t >= begin]
    expected = math.fsum(kept) / len(kept) if kept else -math.inf
    assert AslecDrop(skip_tokens=skip).score(made) == pytest.approx(expected, rel=1e-9)


def test_casl_solves_the_normal_equations() -> None:
    generator = np.random.default_rng(8)
    pool = [
        response_of(generator.integers(4, 15, size=generator.integers(2, 9)).tolist(), generator, 2.0)
        for _ in range(40)
    ]
    rows = []
    for made in pool:
        heads = {start for start, _ in made.steps()}
        p = made.stats.logprob.double().tolist()
        first, rest = [p[t] for t in range(len(p)) if t in heads], [p[t] for t in range(len(p)) if t not in heads]
        rows.append((math.fsum(p) / len(p), math.fsum(rest) / len(rest), math.fsum(first) / len(first)))
        assert len(heads) > 1
        assert AslecCasl().features(made) == pytest.approx((*rows[-1], len(heads) / len(p)), rel=1e-12)
    shares = [len(made.steps()) / len(made.token_ids) for made in pool]
    design = np.array([[rest, first, share, 1.0] for (_, rest, first), share in zip(rows, shares, strict=True)])
    mean = np.array([row[0] for row in rows])
    gamma = np.linalg.solve(design.T @ design, design.T @ mean)[2]
    features = [AslecCasl().features(made) for made in pool]
    assert AslecCasl().fit(features) == pytest.approx(gamma, rel=1e-6)
    np.testing.assert_allclose(AslecCasl().score_pool(features), mean - gamma * np.array(shares), rtol=1e-6)
    np.testing.assert_allclose(AslecCasl(gamma=-1.5).score_pool(features), mean + 1.5 * np.array(shares), rtol=1e-9)
    assert (AslecCasl().pool, AslecCasl(gamma=0.0).pool) == ("data", "prompt")
    assert AslecCasl().fit([]) == 0.0


def test_a_chunk_that_goes_on_with_a_step_has_no_head_of_its_own() -> None:
    made = candidate([-7.0, -2.0, -5.0, -1.0], [-1.0] * 4, pieces=["a", "b", "c", "d", "e", ".", " f", "gggg"])
    assert AslecDrop().score(made) == pytest.approx(-(7 + 2 + 1) / 3)
    assert AslecCasl().features(made) == pytest.approx((-15 / 4, -10 / 3, -5.0, 1 / 4))


LARK_POOL = st.lists(
    st.lists(st.tuples(st.floats(-8, -0.0078125, width=32), st.floats(0, 1, width=32)), min_size=1, max_size=6),
    min_size=1,
    max_size=5,
)


@given(pool=LARK_POOL)
def test_lark_is_the_gain_relative_to_the_pool(pool: list[list[tuple[float, float]]]) -> None:
    made = [candidate([p for p, _ in one], [], sum_p2=[q for _, q in one]) for one in pool]
    loss = [-math.fsum(p for p, _ in one) / len(one) for one in pool]
    brier = [math.fsum(1 - 2 * math.exp(p) + q for p, q in one) / len(one) for one in pool]
    ratio = [b / x for b, x in zip(brier, loss, strict=True)]
    shared = sum(r * x for r, x in zip(ratio, loss, strict=True)) / sum(loss)
    expected = [x / sum(loss) * (2 * r - shared) for r, x in zip(ratio, loss, strict=True)]
    values = evaluate(resolve("lark"), made)
    assert values == pytest.approx(expected, rel=1e-6, abs=1e-9)
    assert math.fsum(values) == pytest.approx(shared, rel=1e-6, abs=1e-9)  # sum of the gains


@given(scores=st.lists(st.integers(-9, 9), min_size=1, max_size=7), data=st.data())
def test_lark_weights(scores: list[int], data: st.DataObject) -> None:
    budget = data.draw(st.integers(1, len(scores)))
    weights = Lark.weights(scores, budget)
    assert math.fsum(weights) == pytest.approx(1.0)
    assert min(weights) >= 0
    order = sorted(scores, reverse=True)
    if budget == len(scores) or order[0] == order[budget]:
        chosen = [w for w in weights if w > 0]
        assert chosen == pytest.approx([1 / budget] * budget)
        return
    threshold = order[budget]
    mean = Fraction(sum(order[:budget]), budget)
    for score, weight in zip(scores, weights, strict=True):
        exact = max(Fraction(0), Fraction(score - threshold) / (budget * (mean - threshold)))
        assert weight == pytest.approx(float(exact))


def test_lark_weights_need_a_budget_within_the_pool() -> None:
    for budget in (0, 4, -1):
        with pytest.raises(InputError, match=rf"in 1\.\.3, not {budget}"):
            Lark.weights([1.0, 2.0, 3.0], budget)


@given(
    tokens=st.lists(
        st.tuples(st.floats(-12, 0, width=32), st.floats(-12, 0, width=32), st.integers(1, 60)), min_size=1, max_size=9
    ),
    longest=st.booleans(),
)
def test_the_shares_means_and_counts(tokens: list[tuple[float, float, int]], longest: bool) -> None:
    made = candidate(
        [s for s, _, _ in tokens], [-3.0, -4.0], teacher=[t for _, t, _ in tokens], rank=[r for _, _, r in tokens]
    )
    n = len(tokens)
    expected = {
        "divergence": math.fsum(t - s for s, t, _ in tokens) / n,
        "teacher_logprob": math.fsum(t for _, t, _ in tokens) / n,
        "rsd_accept": sum(s >= math.log(0.01) and r <= 20 for s, _, r in tokens) / n,
        "rsd_accept(probability=0.25, top=3)": sum(s >= math.log(0.25) and r <= 3 for s, _, r in tokens) / n,
        "surprisal_band": sum(0.5 <= -s <= 4 for s, _, _ in tokens) / n,
        "surprisal_band(low=1, high=2)": sum(1 <= -s <= 2 for s, _, _ in tokens) / n,
        "length": float(n),
        "length(scope='trajectory')": float(n + 2),
    }
    for name, value in expected.items():
        criterion = resolve(name)
        assert isinstance(criterion, Criterion)
        assert criterion.score(made) == pytest.approx(value, rel=1e-9, abs=1e-9), name


def test_the_band_and_the_acceptance_include_their_edges() -> None:
    assert evaluate(resolve("surprisal_band"), [candidate([-0.5, -4.0, -0.49, -4.01], [])]) == [0.5]
    edge = candidate([math.log(0.5)] * 2, [], rank=[20, 21])
    assert evaluate(resolve("rsd_accept(probability=0.49)"), [edge]) == [0.5]


def test_directions() -> None:
    low = ["ppl", "rsr", "length", "0.5*rsr + 0.5*random"]
    high = ["lalp", "aslec_drop", "aslec_casl", "lark", "divergence", "rsd_accept", "surprisal_band", "random"]
    for name in low:
        assert not resolve(name).higher_is_better(), name
    for name in [*high, "teacher_logprob", "length(longest=True)"]:
        assert resolve(name).higher_is_better(), name


def test_local_naturalness_scores_the_steps_of_the_chunk_in_their_windows() -> None:
    """Every step of four tokens; the chunk begins inside the third one."""
    pieces = [p for _ in range(6) for p in (" a", "b", "c", ".")]
    requested: list[Window] = []

    def local(ids: Sequence[int], windows: Sequence[Window]) -> list[torch.Tensor]:
        assert len(ids) == 24
        requested.extend(windows)
        return [torch.full((end - start,), -float(i + 1)) for i, (_, start, end) in enumerate(windows)]

    def scored(criterion: LocalNaturalness, begin: int) -> float:
        requested.clear()
        return criterion.score(
            Candidate(
                token_ids=tuple(range(24 - begin)),
                stats=stats([-1.0] * (24 - begin)),
                history_ids=tuple(range(begin)),
                history=stats([-1.0] * begin),
                final=True,
                finished=False,
                pieces_of=lambda ids: pieces[: len(ids)],
                local_logprob=local,
            )
        )

    assert scored(LocalNaturalness(steps=1), 10) == -(1 + 2 + 3 + 4) / 4
    assert requested == [(4, 10, 12), (8, 12, 16), (12, 16, 20), (16, 20, 24)]
    scored(LocalNaturalness(steps=0), 0)
    assert requested == [(4 * i, 4 * i, 4 * i + 4) for i in range(6)]
    scored(LocalNaturalness(), 0)
    assert requested == [(4 * max(0, i - 4), 4 * i, 4 * i + 4) for i in range(6)]
    scored(LocalNaturalness(share=0.25), 0)
    assert requested == [(4 * (i - math.ceil(i / 4)), 4 * i, 4 * i + 4) for i in range(6)]


def test_a_share_of_the_steps_is_rounded_up_exactly() -> None:
    """0.07 of 100 steps are 7, though 0.07 * 100 is 7.000000000000001."""
    requested: list[Window] = []

    def local(ids: Sequence[int], windows: Sequence[Window]) -> list[torch.Tensor]:
        requested.extend(windows)
        return [torch.zeros(end - start) for _, start, end in windows]

    LocalNaturalness(share=0.07).score(
        Candidate(
            token_ids=tuple(range(101)),
            stats=stats([-1.0] * 101),
            final=True,
            finished=False,
            pieces_of=lambda ids: [" abcd."] * len(ids),
            local_logprob=local,
        )
    )
    assert requested[100] == (93, 100, 101)


# combinations


def test_a_weighted_sum_adds_ranks() -> None:
    """0.7 * rank by rsr + 0.3 * rank by length; equal ones share the mean of their places."""
    pool = [
        candidate([-1.0, -1.0], [], rank=[1, 1]),  # rsr 1: places 0 and 1
        candidate([-2.0], [], rank=[4]),  # rsr 2: place 2
        candidate([-1.0, -2.0, -1.0], [], rank=[1, 2, 1]),  # rsr 1
        candidate([-0.5], [], rank=[9]),  # rsr 18: place 3
    ]  # lengths 2, 1, 3, 1: places 2, 0.5, 3, 0.5
    values = evaluate(resolve("0.7*rsr + 0.3*length"), pool)
    assert values == pytest.approx([0.35 + 0.6, 1.4 + 0.15, 0.35 + 0.9, 2.1 + 0.15])
    # higher is better turns the places round, a pool criterion is requested once for all, and no weight is 1
    mixed = evaluate(resolve("length(longest=True) + 2*lark"), pool)
    lark = evaluate(Lark(), pool)
    places = [sum(other > value for other in lark) for value in lark]
    assert len(set(lark)) == 4
    assert mixed == pytest.approx([a + 2 * b for a, b in zip([1, 2.5, 0, 2.5], places, strict=True)])
    assert isinstance(resolve("0.5*rsr"), WeightedRank)


def test_a_sum_does_not_hide_a_criterion_that_gives_nan() -> None:
    """NaN compares with nothing, so it would take the place before the best; the search refuses NaN by itself."""

    class Broken:
        def score(self, candidate: Candidate) -> float:
            return math.nan if len(candidate.token_ids) == 1 else 1.0

        def higher_is_better(self) -> bool:
            return False

    combined = WeightedRank(parts=((1.0, Broken()),))
    values = combined.score_pool([combined.features(candidate([-1.0] * n, [])) for n in (1, 2, 3)])
    assert math.isnan(values[0])


def test_a_fitted_criterion_cannot_be_combined_unless_it_is_fixed() -> None:
    for text in ("aslec_casl + rsr", "0.5*rsr+0.5*aslec_casl"):
        with pytest.raises(InputError, match="fitted over all of the data cannot be ranked within a prompt"):
            resolve(text)
    assert isinstance(resolve("0.5*rsr + 0.5*aslec_casl(gamma=-1.0)"), PoolCriterion)


# names


def test_options_are_given_as_in_a_call() -> None:
    assert resolve("ppl(scope='trajectory', norm=\"byte\")") == Perplexity(scope="trajectory", norm="byte")
    assert resolve(" lalp( steps=2 ,share=None ) ") == LocalNaturalness(steps=2)
    assert resolve("aslec_casl(gamma=-0.25)") == AslecCasl(gamma=-0.25)
    assert resolve("rsr()") == RankSurprisal()
    assert resolve("1e-1*ppl(scope='window') + -2*rsr(r_max=9)") == WeightedRank(
        parts=((0.1, Perplexity(scope="window")), (-2.0, RankSurprisal(r_max=9)))
    )


OWN = """
class Words:
    def __init__(self, sign="+*("):
        self.sign = sign
    def score(self, candidate):
        return float(len(candidate.token_ids)) + len(self.sign)
    def higher_is_better(self):
        return True

ready = Words()
number = 3
def broken(x): ...
"""


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "own_criteria_of_the_test.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_criteria_of_the_test", raising=False)
    return "own_criteria_of_the_test"


def test_an_import_path_names_a_class_or_an_object(own_module: str) -> None:
    made = candidate([-1.0, -2.0], [])
    assert evaluate(resolve(f"{own_module}:Words"), [made]) == [5.0]
    assert evaluate(resolve(f"{own_module}:ready"), [made]) == [5.0]
    assert evaluate(resolve(f"{own_module}:Words(sign='a+b*(')"), [made]) == [7.0]
    for quoted in ("')'", '")"', "'\"('", '"\'("'):  # brackets and the other quote
        assert evaluate(resolve(f"2*{own_module}:Words(sign={quoted}) + rsr"), [made, made]) == [1.5, 1.5]
    with pytest.raises(InputError, match="3 is no criterion"):
        resolve(f"{own_module}:number")
    with pytest.raises(InputError, match=rf"{own_module}\.py has no Absent$"):
        resolve(f"{own_module}:Absent")
    with pytest.raises(InputError, match=rf"there is no module absent_module in {Path.cwd()} or among"):
        resolve("absent_module:Words")
    with pytest.raises(InputError, match=r"needs the option x: .*:broken\(x=\.\.\.\)"):
        resolve(f"{own_module}:broken")


def test_options_of_an_imported_object_are_refused(own_module: str) -> None:
    """They would be ignored."""
    with pytest.raises(InputError):
        resolve(f"{own_module}:ready(sign='')")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "unknown criterion ''"),
        ("rsr + ", "unknown criterion ''"),
        ("PPL", "unknown criterion 'PPL'"),
        ("ppl)", r"unknown criterion 'ppl\)'"),
        ("ppl(", "options are written as"),
        ("ppl(scope='chunk'", "options are written as"),
        ("ppl(scope='chunk)", "options are written as"),
        ("ppl((window=3)", "options are written as"),
        ("ppl(window=3) rsr", "options are written as"),
        ("ppl(3)", "options are written as"),
        ("ppl('chunk')", "options are written as"),
        ("ppl(**{'window': 3})", "options are written as"),
        ("ppl(window=open('x'))", "options are written as"),
        ("ppl(nrom='byte')", "ppl has no option nrom; it has: scope, window, norm, reduce; did you mean .norm."),
        ("0.5*rsd_accept(size=3)", r"rsd_accept has no option size; it has: probability, top"),
        ("random(size=3)", "random has no option size; it has none"),
        ("ppl(window=0)", "window must be at least 1"),
        ("lalp(share=1.5)", r"share None or in \[0, 1\]"),
        ("surprisal_band(low=4)", "low must lie below high"),
        ("half*rsr", "'half' is no weight"),
        ("*rsr", "'' is no weight"),
        ("rsr*0.7", "'rsr' is no weight"),
        ("genssd.engine.nowhere:Thing", "there is no module genssd.engine.nowhere in "),
        ("genssd.engine.criteria.likelihood:Nothing", r"likelihood\.py has no Nothing"),
        ("genssd.engine.criteria.candidate:Window", "criterion|argument"),
    ],
)
def test_malformed_names_say_what_is_wrong(text: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        resolve(text)


@pytest.mark.parametrize(
    ("text", "says"), [("0.5*foo", "unknown criterion 'foo'"), ("2*ppl(window=0)", "window must be at least 1")]
)
def test_what_is_wrong_behind_a_weight_is_not_blamed_on_the_weight(text: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        resolve(text)


@pytest.mark.parametrize("weight", ["nan", "inf", "-inf"])
def test_a_weight_is_finite(weight: str) -> None:
    """nan times a rank is NaN, inf times the best one's rank 0 too."""
    with pytest.raises(InputError):
        resolve(f"{weight}*rsr")


@pytest.mark.parametrize("text", [":Name", "..package:Name", "0.5*:Name", "ppl(window={[]: 1})"])
def test_odd_names_are_input_errors_too(text: str) -> None:
    with pytest.raises(InputError, match="criterion") as error:
        resolve(text)
    assert "is no weight" not in str(error.value)


@pytest.mark.parametrize(
    "text", ["ppl(window=1)(min_tokens=2)", "ppl(window=1).x(min_tokens=2)", "ppl(window=1, window=2)"]
)
def test_options_are_never_dropped_silently(text: str) -> None:
    with pytest.raises(InputError):
        resolve(text)


@pytest.mark.parametrize(
    "text",
    [
        "ppl(scope='trajectroy')",
        "ppl(norm='bytes')",
        "ppl(reduce='median')",
        "rsr(scope='window')",
        "length(scope='everything')",
        "rsd_accept(probability=0)",
        "lalp(steps=2.5)",
        "aslec_casl(gamma='3')",
    ],
)
def test_a_value_that_an_option_does_not_have_is_refused(text: str) -> None:
    """Otherwise it silently means another one, or fails in the middle of a search."""
    with pytest.raises(InputError):
        resolve(text)


@given(text=st.text(st.sampled_from(list("rsplarkn:.*+-()[]{}'\"=,0 5_\\#\n")), max_size=14))
def test_any_text_resolves_or_is_an_input_error(text: str) -> None:
    for name in (text, f"ppl({text})", f"0.5*rsr({text}", f"{text}*length"):
        try:
            made = resolve(name)
        except InputError:
            continue
        assert isinstance(made, Criterion | PoolCriterion)


# what is missing


def test_what_a_candidate_lacks_is_named() -> None:
    bare = Candidate(token_ids=(1, 2), stats=stats([-1.0, -2.0]), final=True, finished=False)
    for name in ("divergence", "teacher_logprob"):
        with pytest.raises(InputError, match=f"{name} needs the teacher's log-probabilities"):
            evaluate(resolve(name), [bare])
    for name in ("aslec_drop", "aslec_casl", "ppl(norm='byte')"):
        with pytest.raises(InputError, match="came without a tokenizer"):
            evaluate(resolve(name), [bare])
    with pytest.raises(InputError, match="came without a model"):
        evaluate(resolve("lalp"), [bare])


EVERY = [
    *criterion_names.registered_criteria(),
    *("ppl(norm='byte')", "ppl(norm='sum')", "ppl(reduce='max')", "ppl(reduce='drop_first')", "ppl(scope='window')"),
    *("ppl(scope='trajectory')", "rsr(scope='trajectory')", "aslec_casl(gamma=-1)", "lalp(share=0.5)", "lalp(steps=0)"),
    "0.7*rsr + 0.3*lark + aslec_drop",
]


def odd(chunk: Sequence[float], history: Sequence[float] = (), finished: bool = True) -> Candidate:
    """Tokens of one character each, at the model's mercy: -inf in the windows too."""
    content = len(history) + len(chunk) - finished
    every = torch.tensor([*history, *chunk] * 9)  # as many as a longer sequence needs
    return Candidate(
        token_ids=tuple(range(len(chunk))),
        stats=stats(chunk),
        history_ids=tuple(range(len(history))),
        history=stats(history),
        teacher_logprob=torch.full((len(chunk),), -1.0),
        final=True,
        finished=finished,
        pieces_of=lambda ids: ["x"] * content,
        local_logprob=lambda ids, windows: [every[start:end] for _, start, end in windows],
        activations=lambda ids, start: ActivationMeans(
            prompt_F=torch.tensor([0.5, -0.5], dtype=torch.float64),
            response_F=torch.tensor([0.25, 0.5], dtype=torch.float64),
            prompt_nll=math.inf if -math.inf in history else 1.0,
            counted=tuple(token + 1 < len(chunk) or not finished for token in range(len(chunk))),
        ),
        encode=lambda text: list(range(len(text) // 8)),
        answer="twelve",
    )


@pytest.mark.parametrize("name", EVERY)
def test_no_value_is_nan(name: str) -> None:
    """Responses of the end of sequence alone, one token, probability 0 and 1; by themselves and in one pool."""
    pool = [
        odd([-0.5]),
        odd([-0.5], [-1.0, -2.0]),
        odd([0.0], finished=False),
        odd([-3.0], finished=False),
        odd([0.0, 0.0, 0.0]),
        odd([-1.0, -2.0, -1.0]),
    ]
    criterion = resolve(name)
    for one in pool:
        assert not math.isnan(evaluate(criterion, [one])[0])
    assert not any(map(math.isnan, evaluate(criterion, pool)))


@pytest.mark.parametrize("name", EVERY)
def test_a_token_of_probability_0_gives_no_nan(name: str) -> None:
    pool = [
        odd([-math.inf, -1.0, -2.0]),
        odd([-math.inf], finished=False),
        odd([-math.inf], [-math.inf, -1.0]),
        odd([-1.0, -2.0, -1.0]),
    ]
    criterion = resolve(name)
    for one in pool:
        assert not math.isnan(evaluate(criterion, [one])[0])
    assert not any(map(math.isnan, evaluate(criterion, pool)))


@pytest.mark.parametrize("name", ["ppl", "lalp", "aslec_drop", "aslec_casl", "rsr", "rsd_accept"])
def test_a_token_that_the_student_cannot_write_never_wins(name: str) -> None:
    """An infinite surprisal is not what the student ranks high: 1 / inf is the least rank-surprisal ratio there is."""
    criterion = resolve(name)
    impossible, ordinary = evaluate(criterion, [odd([-1.0, -math.inf, -1.0]), odd([-1.0, -1.5, -1.0])])
    assert impossible < ordinary if criterion.higher_is_better() else impossible > ordinary


@given(pool=st.lists(st.tuples(TOKENS.filter(bool), st.booleans()), min_size=1, max_size=4))
def test_rank_surprisal_of_many_responses_is_a_ratio_of_sums_of_means(
    pool: list[tuple[list[tuple[float, int, str]], bool]],
) -> None:
    """Section 5.1: neither pooled tokens nor the mean of ratios."""
    for tokens, finished in pool:
        counted = tokens[:-1] if finished else tokens
        rank, surprisal = RankSurprisal(r_max=50).ratio(build([], tokens, finished))
        count = max(1, len(counted))
        assert rank == pytest.approx(sum(min(r, 50) for _, r, _ in counted) / count)
        assert surprisal == pytest.approx(-math.fsum(p for p, _, _ in counted) / count)
