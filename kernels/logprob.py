"""Statistics of given tokens under a linear head, without a [tokens, vocabulary] tensor.

    z = softcap * tanh(hidden @ weight.T / softcap) / temperature    (no softcap: z = hidden @ weight.T / temperature)
    logprob = z[target] - logsumexp(z)      entropy = -sum_v p_v log p_v      sum_p2 = sum_v p_v^2
    rank = 1 + number of v with z_v > z[target]

One pass over the head gives every number that the selection criteria ask for (design: perplexity, rank-surprisal,
Brier score). Only a block of rows has its logits in memory at any time.

Shapes:  N rows   V vocabulary   D model width   K top-k
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from genssd.kernels.linear import linear

LOGITS_BYTES = 32 << 20  # of float32 logits alive at once


class NonFiniteLogits(ValueError):
    """A row of logits that has NaN or +inf, or nothing finite. `row` is its index."""

    def __init__(self, function: str, row: int) -> None:
        super().__init__(f"{function}: the logits of row {row} are not finite")
        self.row = row


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenStats:
    """What a model says about each of N given tokens. All [N]; natural logarithms; rank is int32, the rest float32."""

    logprob: Tensor
    logsumexp: Tensor
    entropy: Tensor
    sum_p2: Tensor
    rank: Tensor

    def __len__(self) -> int:
        return self.logprob.shape[0]

    def __getitem__(self, span: slice) -> TokenStats:
        """The statistics of a contiguous range of the tokens (views, no copy)."""
        return TokenStats(**{name: getattr(self, name)[span] for name in self.__slots__})

    @staticmethod
    def concatenate(parts: Sequence[TokenStats]) -> TokenStats:
        """Join statistics of consecutive spans, in order."""
        return TokenStats(**{name: torch.cat([getattr(p, name) for p in parts]) for name in TokenStats.__slots__})

    @staticmethod
    def empty() -> TokenStats:
        """The statistics of no token."""
        none = torch.empty(0)
        return TokenStats(logprob=none, logsumexp=none, entropy=none, sum_p2=none, rank=none.to(torch.int32))


def linear_logprob(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    target_N: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> TokenStats:
    """Score target_N (int64, in [0, V)) under softmax(hidden_ND @ weight_VD.T + bias).

    The product is taken in the dtype of its inputs, everything after it in float32 (float64 stays float64).
    Raises ValueError on shapes that do not agree, a target outside the vocabulary or an option out of range, and
    NonFiniteLogits on a row with NaN or +inf logits.
    """
    _check(hidden_ND, weight_VD, target_N, bias, temperature, softcap)
    rows = max(1, LOGITS_BYTES // (4 * weight_VD.shape[0]))
    parts = [
        _reference(hidden_ND[i : i + rows], weight_VD, target_N[i : i + rows], bias, temperature, softcap)
        for i in range(0, hidden_ND.shape[0], rows)
    ]
    if not parts:
        return TokenStats.empty()
    stats = TokenStats.concatenate(parts)
    if not bool(stats.logsumexp.isfinite().all()):
        row = int((~stats.logsumexp.isfinite()).nonzero()[0])
        raise NonFiniteLogits("linear_logprob", row)
    return stats


def _reference(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    target_N: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
) -> TokenStats:
    z = linear(hidden_ND, weight_VD, bias)
    z = z if z.dtype == torch.float64 else z.float()
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    z = z / temperature if temperature != 1.0 else z
    chosen = z.gather(1, target_N[:, None])
    logp = torch.log_softmax(z, dim=1)
    p = logp.exp()
    return TokenStats(
        logprob=logp.gather(1, target_N[:, None])[:, 0],
        logsumexp=z.logsumexp(1),
        # 0 log 0 is 0: a banned token has logp = -inf
        entropy=-(p * logp.clamp_min(torch.finfo(logp.dtype).min)).sum(1),
        sum_p2=(p * p).sum(1),
        rank=(1 + (z > chosen).sum(1)).to(torch.int32),
    )


def _check(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, temperature: float, softcap: float | None
) -> None:
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"linear_logprob: hidden {tuple(hidden.shape)} must be [N, D] and weight {tuple(weight.shape)} [V, D]"
        )
    if target.shape != hidden.shape[:1] or target.dtype != torch.int64:
        raise ValueError(
            f"linear_logprob: target must be int64 [{hidden.shape[0]}], not {target.dtype} {tuple(target.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"linear_logprob: bias must be [{weight.shape[0]}], not {tuple(bias.shape)}")
    for name, value in (("temperature", temperature), ("softcap", softcap)):
        if value is not None and not 0.0 < value < math.inf:
            raise ValueError(f"linear_logprob: {name} must be positive, not {value}")
    if len(target) and not (int(target.min()) >= 0 and int(target.max()) < weight.shape[0]):
        raise ValueError(f"linear_logprob: a target lies outside the vocabulary of {weight.shape[0]}")
