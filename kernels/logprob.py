"""Statistics of given tokens under a linear head, without a [tokens, vocabulary] tensor.

    z = softcap * tanh(hidden @ weight.T / softcap) / temperature    (no softcap: z = hidden @ weight.T / temperature)
    logprob = z[target] - logsumexp(z)      entropy = -sum_v p_v log p_v      sum_p2 = sum_v p_v^2
    rank = 1 + number of v with z_v > z[target]

One pass over the head gives every number that the selection criteria ask for (perplexity, rank-surprisal, Brier
score). torch sees one operator, genssd::linear_logprob: on CUDA it is the Triton kernel of logprob_triton.py, elsewhere
the reference below, in which only a block of rows has its logits in memory at any time.

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
    def of(values: Sequence[Tensor]) -> TokenStats:
        """From the values in the order of the fields."""
        return TokenStats(**dict(zip(TokenStats.__slots__, values, strict=True)))

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
    if not len(target_N):
        return TokenStats.empty()
    stats = TokenStats.of(_linear_logprob(hidden_ND, weight_VD, target_N, bias, temperature, softcap))
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fields of TokenStats, in order."""
    z = linear(hidden_ND, weight_VD, bias)
    z = z if z.dtype == torch.float64 else z.float()
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    z = z / temperature if temperature != 1.0 else z
    chosen = z.gather(1, target_N[:, None])
    logp = torch.log_softmax(z, dim=1)
    p = logp.exp()
    # 0 log 0 is 0: a banned token has logp = -inf
    entropy = -(p * logp.clamp_min(torch.finfo(logp.dtype).min)).sum(1)
    rank = (1 + (z > chosen).sum(1)).to(torch.int32)
    return logp.gather(1, target_N[:, None])[:, 0], z.logsumexp(1), entropy, (p * p).sum(1), rank


def _blockwise(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    target_N: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Where no kernel of ours runs: the reference, a block of rows at a time."""
    rows = max(1, LOGITS_BYTES // (4 * weight_VD.shape[0]))
    parts = [
        _reference(h, weight_VD, target, bias, temperature, softcap)
        for h, target in zip(torch.split(hidden_ND, rows), torch.split(target_N, rows), strict=True)
    ]
    logprob, logsumexp, entropy, sum_p2, rank = (torch.cat(values) for values in zip(*parts, strict=True))
    return logprob, logsumexp, entropy, sum_p2, rank


_linear_logprob = torch.library.custom_op("genssd::linear_logprob", _blockwise, mutates_args=())


@_linear_logprob.register_kernel("cuda")
def _linear_logprob_triton(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    target_N: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if hidden_ND.dtype == torch.float64:
        return _reference(hidden_ND, weight_VD, target_N, bias, temperature, softcap)
    # imported here, because Triton need not be installed where there is no GPU
    from genssd.kernels.logprob_triton import score_rows, tiles_for

    device = torch.cuda.get_device_properties(hidden_ND.device)
    amd, capability = torch.version.hip is not None, 10 * device.major + device.minor
    return score_rows(
        hidden_ND.contiguous(),
        weight_VD.contiguous(),
        target_N.contiguous(),
        bias,
        temperature,
        softcap,
        programs=device.multi_processor_count,
        tiles=tiles_for(hidden_ND.dtype, amd=amd, capability=capability),
    )


@_linear_logprob.register_fake
def _linear_logprob_fake(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    target_N: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    wide = torch.promote_types(hidden_ND.dtype, torch.float32)
    a, b, c, d = (target_N.new_empty(target_N.shape, dtype=wide) for _ in range(4))
    return a, b, c, d, target_N.new_empty(target_N.shape, dtype=torch.int32)


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
