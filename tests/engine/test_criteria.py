"""The built-in criteria and their registry."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from genssd.engine import criterion_names
from genssd.engine.candidate import Candidate, Criterion
from genssd.engine.criteria import Perplexity, Random
from genssd.engine.criterion_names import register_criterion, resolve
from genssd.engine.errors import InputError
from genssd.kernels.logprob import TokenStats


def stats(logprob: list[float]) -> TokenStats:
    n = len(logprob)
    return TokenStats(
        logprob=torch.tensor(logprob),
        logsumexp=torch.zeros(n),
        entropy=torch.zeros(n),
        sum_p2=torch.zeros(n),
        rank=torch.ones(n, dtype=torch.int32),
    )


def candidate(chunk: list[float], history: list[float], stream: int = 0, final: bool = True) -> Candidate:
    return Candidate(
        token_ids=tuple(range(len(chunk))),
        stats=stats(chunk),
        history_ids=tuple(range(len(history))),
        history=stats(history),
        teacher_logprob=torch.zeros(len(chunk)),
        final=final,
        finished=False,
        stream=stream,
    )


LOGPROBS = st.lists(st.floats(-20, 0, width=32), max_size=12)


@given(chunk=LOGPROBS.filter(bool), history=LOGPROBS, min_tokens=st.integers(1, 10))
def test_perplexity_is_the_exponential_of_the_mean(chunk: list[float], history: list[float], min_tokens: int) -> None:
    borrowed = history[max(0, len(history) - max(0, min_tokens - len(chunk))) :]
    expected = math.exp(-math.fsum(borrowed + chunk) / len(borrowed + chunk))
    assert Perplexity(min_tokens=min_tokens).score(candidate(chunk, history)) == pytest.approx(expected, rel=1e-6)
    whole = math.exp(-math.fsum(history + chunk) / len(history + chunk))
    trajectory = Perplexity(scope="trajectory", min_tokens=min_tokens)
    assert trajectory.score(candidate(chunk, history)) == pytest.approx(whole, rel=1e-6)


def test_a_short_ending_is_scored_with_the_end_of_its_history() -> None:
    assert Perplexity(min_tokens=4).score(candidate([-1.0], [-9.0, -2.0, -2.0, -3.0])) == pytest.approx(math.exp(2.0))
    assert Perplexity(min_tokens=1).score(candidate([-1.0], [-9.0])) == pytest.approx(math.e)
    assert Perplexity(min_tokens=4).score(candidate([-1.0], [-9.0], final=False)) == pytest.approx(math.e)


def test_perplexity_without_a_finite_value_is_infinite_not_nan() -> None:
    assert Perplexity().score(candidate([-math.inf, -1.0], [])) == math.inf
    assert Perplexity().score(candidate([-1e5], [])) == math.inf
    assert not Perplexity().higher_is_better()


def test_random_depends_on_the_stream_and_the_position_alone() -> None:
    one = Random().score(candidate([-1.0], [-1.0], stream=5))
    assert Random().score(candidate([-7.0, -1.0], [-3.0], stream=5)) == one
    assert Random().score(candidate([-1.0], [-1.0], stream=6)) != one
    assert Random().score(candidate([-1.0], [], stream=5)) != one
    assert 0 <= one < 1


def test_names_resolve_and_objects_pass_through() -> None:
    assert resolve("ppl") == Perplexity()
    assert resolve("random") == Random()
    own = Perplexity(min_tokens=3)
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
