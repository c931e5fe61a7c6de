"""Statistics of runs of given tokens, from the hidden states that predict them.

A hidden state predicts the token after the one it was computed at. So the tokens of a run are predicted by the last
hidden state before the run, and by those of all its tokens but the last.

Shapes:  N hidden states   D model width
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from genssd.engine.common.errors import NumericsError
from genssd.engine.models.runner import ModelRunner
from genssd.kernels.logprob import TokenStats


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRun:
    """Consecutive tokens of one sequence, and the hidden states before them."""

    tokens: Sequence[int]
    before_D: Tensor | None
    """Hidden state of the token before those of `states_ND`; None where `states_ND` holds enough of them."""
    states_ND: Tensor | None
    """Hidden states of the tokens up to the last but one of the run; None for none. The last len(tokens) of `before_D`
    and these predict the run."""

    def predicting_states(self) -> list[Tensor]:
        """Return the states that predict the run, in order, as parts that are [n, D] each and len(tokens) in all."""
        num_states = 0 if self.states_ND is None else len(self.states_ND)
        if self.states_ND is not None and num_states >= len(self.tokens):
            return [self.states_ND[num_states - len(self.tokens) :]]
        assert self.before_D is not None
        assert num_states + 1 == len(self.tokens), "a run lacks states"
        return [self.before_D[None]] if self.states_ND is None else [self.before_D[None], self.states_ND]


def run_statistics(runner: ModelRunner, runs: Sequence[TokenRun], place: Callable[[int, int], str]) -> list[TokenStats]:
    """Return the statistics of every run's tokens under the runner's model, in order, in the host's memory.

    Criteria read them there: a read of the device for each candidate would wait for the step that is queued already.
    place: returns the name of a token in messages, from the index of its run and its index in the run. Raises
    NumericsError where the logits of a token are NaN or infinite.
    """
    targets = torch.tensor([token for run in runs for token in run.tokens], device=runner.decoder.device)
    states = torch.cat([part for run in runs for part in run.predicting_states()])
    stats = runner.decoder.head.score(states, targets, checked=False).to_host()
    faults = torch.nonzero(~torch.isfinite(stats.logsumexp))
    if len(faults):
        index, offset = [(i, t) for i, run in enumerate(runs) for t in range(len(run.tokens))][int(faults[0])]
        raise nonfinite_logits(runner, place(index, offset))
    parts, start = [], 0
    for run in runs:
        parts.append(stats[start : start + len(run.tokens)])
        start += len(run.tokens)
    return parts


def nonfinite_logits(runner: ModelRunner, place: str) -> NumericsError:
    """Return the error that names the model and the place where its logits are NaN or infinite."""
    return NumericsError(
        f"the {runner.role} {runner.directory} produced NaN or infinite logits for {place}; check the weights, or run "
        "it in float32"
    )


def response_place(label: str, position: int) -> str:
    """Return the name of a position in the response to a prompt, for messages."""
    return f"{label}, response position {position}"
