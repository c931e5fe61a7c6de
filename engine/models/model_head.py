"""The head of a model: from hidden states to logits, statistics of given tokens, and drawn tokens.

    logits = softcap * tanh(x / softcap),  x = (states / divisor) @ weight.T      (no softcap, no divisor: left out)

Shapes:  N hidden states   B states to draw after   D model width   V vocabulary
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from genssd.kernels.head import squash
from genssd.kernels.linear import linear
from genssd.kernels.logprob import TokenStats, linear_logprob
from genssd.kernels.sampling import linear_sample
from genssd.kernels.tuned import launch_mode
from genssd.kernels.weight import Weight


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelHead:
    """The product with the vocabulary at the end of a model. A softcap or divisor of None is not applied."""

    weight: Weight  # [V, D]
    softcap: float | None = None
    divisor: float | None = None
    deterministic: bool = True
    """Whether kernels over the head must give a row the same bits for every number of rows."""

    def divide(self, states: Tensor) -> Tensor:
        """Return the hidden states that all other methods take: those after the last norm, over the divisor."""
        return states if self.divisor is None else states / self.divisor

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """Return the logits of the next tokens, float32 [N, V]."""
        out = hidden_ND.new_empty(hidden_ND.shape[0], self.weight.shape[0], dtype=torch.float32)
        return squash(linear(hidden_ND, self.weight, out=out), 1.0, self.softcap)

    def score(self, hidden_ND: Tensor, target_N: Tensor, *, topk: int = 0, checked: bool = True) -> TokenStats:
        """Return the statistics of one token after each hidden state (`kernels/logprob.linear_logprob`)."""
        with launch_mode(deterministic=self.deterministic):
            return linear_logprob(hidden_ND, self.weight, target_N, softcap=self.softcap, topk=topk, checked=checked)

    def draw(self, hidden_BD: Tensor, key_B: Tensor, *, temperature: float, vocabulary: int) -> tuple[Tensor, Tensor]:
        """Return a token drawn after each hidden state and its log-probability (`kernels/sampling.linear_sample`).

        Of logits without a finite maximum the token is -1.
        """
        with launch_mode(deterministic=self.deterministic):
            return linear_sample(
                hidden_BD,
                self.weight,
                key_B,
                temperature=temperature,
                softcap=self.softcap,
                vocabulary=vocabulary,
                checked=False,
            )
