"""Runs of tokens and the hidden states that predict them."""

from __future__ import annotations

import math

import pytest
import torch
from support.toys import Pair

from genssd.engine.common.errors import NumericsError
from genssd.engine.engine import Engine
from genssd.engine.models.token_runs import TokenRun, nonfinite_logits, run_statistics
from genssd.kernels.logprob import STATISTICS, linear_logprob

IDS = [5, 9, 2, 7, 7, 1]


@torch.inference_mode()
def states_of(engine: Engine) -> torch.Tensor:
    runner = engine._resources.runners["student"]
    path = runner.tree.root()
    states_ND = runner.extend([path], [IDS])[0]
    runner.tree.drop(path)
    return states_ND


@torch.inference_mode()
def test_every_way_to_give_the_states_predicts_the_same_tokens(engine: Engine, pair: Pair) -> None:
    """The state before and those read after it; a surplus of states in front; a single token without any read."""
    states_ND, runner = states_of(engine), engine._resources.runners["student"]
    runs = [
        TokenRun(tokens=IDS[2:], before_D=states_ND[1], states_ND=states_ND[2:-1]),
        TokenRun(tokens=IDS[2:], before_D=None, states_ND=states_ND[1:-1]),
        TokenRun(tokens=IDS[2:], before_D=states_ND[0], states_ND=states_ND[:-1]),
        TokenRun(tokens=IDS[2:3], before_D=states_ND[1], states_ND=None),
        TokenRun(tokens=IDS[2:3], before_D=states_ND[1], states_ND=states_ND[2:2]),
    ]
    for run in runs:
        assert torch.equal(torch.cat(run.predicting_states()), states_ND[1 : 1 + len(run.tokens)])
    stats = run_statistics(runner, runs, lambda index, offset: "")
    exact = linear_logprob(states_ND[1:-1], runner.decoder.head.weight, torch.tensor(IDS[2:]))
    for run, part in zip(runs, stats, strict=True):
        for name in STATISTICS:
            assert torch.equal(getattr(part, name), getattr(exact, name)[: len(run.tokens)]), name
    expected = pair.logprobs("student", IDS[:2], IDS[2:])
    torch.testing.assert_close(stats[0].logprob.double(), expected, atol=1e-4, rtol=0)


@torch.inference_mode()
def test_missing_states_are_our_own_mistake(engine: Engine) -> None:
    states_ND = states_of(engine)
    for before_D in (None, states_ND[0]):
        with pytest.raises(AssertionError):
            TokenRun(tokens=IDS[2:], before_D=before_D, states_ND=states_ND[3:-1]).predicting_states()


@torch.inference_mode()
def test_a_row_that_is_not_finite_is_named_by_run_and_token(engine: Engine) -> None:
    states_ND, runner = states_of(engine).clone(), engine._resources.runners["student"]
    states_ND[3] = math.nan
    runs = [
        TokenRun(tokens=IDS[1:3], before_D=states_ND[0], states_ND=states_ND[1:2]),
        TokenRun(tokens=IDS[2:], before_D=states_ND[1], states_ND=states_ND[2:-1]),
    ]
    with pytest.raises(NumericsError, match="produced NaN or infinite logits for run 1, token 2; check") as caught:
        run_statistics(runner, runs, lambda index, offset: f"run {index}, token {offset}")
    assert str(caught.value) == str(nonfinite_logits(runner, "run 1, token 2"))
    assert str(runner.directory) in str(caught.value)
