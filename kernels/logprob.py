"""Statistics of target tokens under a linear head, without a [tokens, vocabulary] tensor.

    z = softcap * tanh(x / softcap) / temperature,  x = hidden @ weight.T + bias      (no softcap: z = x / temperature)
    logprob = z[target] - logsumexp(z)      entropy = -sum_v p_v log p_v      sum_p2 = sum_v p_v^2
    rank = 1 + number of v with z_v > z[target]

One pass over the head computes every number that the selection criteria read (perplexity, rank-surprisal, Brier score).
torch sees one operator, genssd::linear_logprob: on CUDA it is the Triton kernel of logprob_triton.py, on the CPU the
native kernel, and elsewhere the reference below, which keeps the logits of one block of rows in memory at a time. Its
gradient is in logprob_gradient.py.

Shapes:  N rows   V vocabulary   D model width   K top-k
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from genssd import _core
from genssd.kernels.head import (
    check_head,
    check_positive,
    choose_product_dtype,
    iter_slices,
    multiply_into,
    require_in_vocabulary,
)
from genssd.kernels.inference import refuse_gradients
from genssd.kernels.logprob_gradient import backward, save_context
from genssd.kernels.native import detach, runs_natively
from genssd.kernels.threads import num_threads
from genssd.kernels.weight import PackedWeight, Weight, cells_of

LOGITS_BYTES = 32 << 20  # largest size of the float32 logits of one block of rows
STATISTICS = ("logprob", "logsumexp", "entropy", "sum_p2", "rank")

OperatorOutputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
"""Outputs of genssd::linear_logprob: STATISTICS in order, then the ids and log-probabilities of the top k."""


class NonFiniteLogits(ValueError):
    """Error raised for a row of logits that has a NaN, a +inf or no finite entry. `row` is its index."""

    def __init__(self, function: str, row: int) -> None:
        super().__init__(f"{function}: the logits of row {row} are not finite")
        self.row = row


@dataclass(frozen=True, slots=True)
class TopK:
    """The K most likely tokens of N rows, most likely first; of equally likely ones the lower id comes first."""

    ids: Tensor
    """Token ids, int64 [N, K]."""
    logprob: Tensor
    """Log-probabilities of the tokens, float32 [N, K]."""

    @staticmethod
    def concatenate(parts: Sequence[TopK]) -> TopK:
        """Concatenate the rows of several parts in order; all must have the same K."""
        return TopK(torch.cat([part.ids for part in parts]), torch.cat([part.logprob for part in parts]))


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenStats:
    """Statistics of N target tokens under a model, each [N], in nats; rank is int32, the others float32."""

    logprob: Tensor
    """Log-probability of each token."""
    logsumexp: Tensor
    """Log-sum-exp of the logits at each token."""
    entropy: Tensor
    """Entropy of the distribution at each token."""
    sum_p2: Tensor
    """Sum of the squared probabilities at each token."""
    rank: Tensor
    """Rank of each token: 1 plus the number of tokens with a larger logit."""
    topk: TopK | None = None
    """The most likely tokens at each token, where they were asked for."""

    def __len__(self) -> int:
        return self.logprob.shape[0]

    def __getitem__(self, span: slice) -> TokenStats:
        """Return the statistics of a contiguous range of the tokens, as views without a copy."""
        topk = None if self.topk is None else TopK(self.topk.ids[span], self.topk.logprob[span])
        return dataclasses.replace(
            TokenStats.from_values([getattr(self, name)[span] for name in STATISTICS]), topk=topk
        )

    @staticmethod
    def concatenate(parts: Sequence[TokenStats]) -> TokenStats:
        """Concatenate the statistics of several parts in order. The top k are kept if every part has them."""
        tops = [part.topk for part in parts if part.topk is not None]
        topk = TopK.concatenate(tops) if len(tops) == len(parts) > 0 else None
        joined = TokenStats.from_values([torch.cat([getattr(part, name) for part in parts]) for name in STATISTICS])
        return dataclasses.replace(joined, topk=topk)

    @staticmethod
    def from_values(values: Sequence[Tensor]) -> TokenStats:
        """Build the statistics from tensors [N] in the order of STATISTICS, without top k."""
        logprob, logsumexp, entropy, sum_p2, rank = values
        return TokenStats(logprob=logprob, logsumexp=logsumexp, entropy=entropy, sum_p2=sum_p2, rank=rank)

    @staticmethod
    def empty() -> TokenStats:
        """Return the statistics of zero tokens."""
        none = torch.empty(0)
        return TokenStats(logprob=none, logsumexp=none, entropy=none, sum_p2=none, rank=none.to(torch.int32))


def linear_logprob(
    hidden_ND: Tensor,
    weight_VD: Weight,
    target_N: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    topk: int = 0,
    checked: bool = True,
) -> TokenStats:
    """Return the statistics of target_N (int64 [N], in [0, V)) under softmax(z).

    The product is taken in the dtype of hidden (or autocast's), everything after it in float32 (float64 stays
    float64). bias: [V], not differentiated. All outputs but rank and the top k are differentiable in hidden and weight;
    with a packed weight, which must have hidden's dtype, none is. topk: number of most likely tokens to return as well.
    Raises ValueError on shapes that do not agree or an option out of range and, where checked, ValueError on a target
    outside the vocabulary and NonFiniteLogits on a row with a NaN, a +inf or no finite logit. Without checked the host
    does not wait for the device; such a target is then taken for the nearest id, and the logsumexp of such a row is not
    finite.
    """
    check_head("linear_logprob", hidden_ND, weight_VD)
    check_positive("linear_logprob", temperature=temperature, softcap=softcap)
    if target_N.shape != hidden_ND.shape[:1] or target_N.dtype != torch.int64:
        raise ValueError(
            f"linear_logprob: target must be int64 [{hidden_ND.shape[0]}], not {target_N.dtype} {tuple(target_N.shape)}"
        )
    if bias is not None and bias.shape != weight_VD.shape[:1]:
        raise ValueError(f"linear_logprob: bias must be [{weight_VD.shape[0]}], not {tuple(bias.shape)}")
    if bias is not None and bias.requires_grad and torch.is_grad_enabled():
        raise ValueError("linear_logprob: bias is not differentiated; detach it")
    if not 0 <= topk <= weight_VD.shape[0]:
        raise ValueError(f"linear_logprob: topk must be in 0..{weight_VD.shape[0]}, not {topk}")
    if isinstance(weight_VD, PackedWeight):
        refuse_gradients("linear_logprob with a packed weight", hidden_ND)
        outputs, hidden_ND = _allocate_outputs(hidden_ND, target_N, topk), hidden_ND.contiguous()
        *values, ids, logprob = _score_natively(hidden_ND, weight_VD, target_N, bias, temperature, softcap, outputs)
        if checked:
            _check_outputs(target_N, values[1], weight_VD.shape[0])
    else:
        dtype = choose_product_dtype(hidden_ND)
        with torch.autocast(hidden_ND.device.type, enabled=False):
            *values, ids, logprob = _linear_logprob(
                hidden_ND.to(dtype), weight_VD, target_N, bias, temperature, softcap, topk, checked
            )
    stats = TokenStats.from_values(values)
    return dataclasses.replace(stats, topk=TopK(ids, logprob)) if topk else stats


def _score_reference(
    z: Tensor, target_C: Tensor, temperature: float, softcap: float | None, topk: int
) -> tuple[Tensor, ...]:
    """Compute the operator's outputs for a few rows from their products x, named z, which are overwritten."""
    if softcap is not None:
        z.div_(softcap).tanh_().mul_(softcap)
    if temperature != 1.0:
        z.div_(temperature)
    chosen = z.gather(1, target_C[:, None])
    rank = 1 + (z > chosen).sum(1)
    values, ids = top_k(z, topk)
    peak = z.amax(1, keepdim=True)
    e = z.sub_(peak).exp()
    total = e.sum(1)
    # 0 log 0 is 0: a banned token has z = -inf
    slope = z.clamp_min_(torch.finfo(z.dtype).min).mul_(e).sum(1)
    square = e.square_().sum(1)
    log_total, peak = total.log(), peak[:, 0]
    return (
        chosen[:, 0] - peak - log_total,
        peak + log_total,
        log_total - slope / total,
        square / (total * total),
        rank,
        ids,
        values - peak[:, None] - log_total[:, None],
    )


def top_k(z_NV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest values of every row, largest first, and their ids; of equal values the lower ids first."""
    if k == 0:
        return z_NV.new_empty(len(z_NV), 0), torch.empty(len(z_NV), 0, dtype=torch.int64, device=z_NV.device)
    values, ids = z_NV.topk(k, dim=1)
    kth = values[:, -1:]
    if bool(((z_NV >= kth).sum(1) > k).any()):  # more entries tie with the k-th than fit
        z_NV = z_NV.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)  # comparisons with NaN are false
        kth = z_NV.topk(k, dim=1).values[:, -1:]
        tied = z_NV == kth
        missing = k - (z_NV > kth).sum(1, keepdim=True)
        kept = (z_NV > kth) | (tied & (tied.cumsum(1) <= missing))
        ids = kept.nonzero()[:, 1].reshape(-1, k)
    ids = ids.sort(dim=1).values
    values = z_NV.gather(1, ids)
    order = values.argsort(dim=1, descending=True, stable=True)
    return values.gather(1, order), ids.gather(1, order)


def _score_in_blocks(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    target_N: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    topk: int,
    checked: bool,
) -> OperatorOutputs:
    """Compute the outputs with the native kernel where it runs, else with the reference, a block of rows at a time."""
    values = _allocate_outputs(hidden_ND, target_N, topk)
    weight_VD = weight_VD.to(hidden_ND.dtype)
    if runs_natively(hidden_ND, weight_VD, bias):
        _score_natively(hidden_ND, weight_VD, target_N, bias, temperature, softcap, values)
    else:
        _score_rows(hidden_ND, weight_VD, target_N, bias, temperature, softcap, topk, values)
    if checked:
        _check_outputs(target_N, values[1], len(weight_VD))
    return values


def _score_rows(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    target_N: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    topk: int,
    values: OperatorOutputs,
) -> None:
    """Write the outputs into values with the reference, a block of rows at a time."""
    in_range_N = target_N.clamp(0, weight_VD.shape[0] - 1)
    N, V = len(hidden_ND), len(weight_VD)
    rows = max(1, LOGITS_BYTES // (4 * V))
    x_CV = values[0].new_empty(min(rows, N), V)
    for start in range(0, N, rows):
        block = slice(start, min(start + rows, N))
        h, x = hidden_ND[block], x_CV[: block.stop - start]
        x = multiply_into(h, weight_VD, out=x)
        if bias is not None:
            x += bias
        for part in iter_slices(len(x), V):
            parts = _score_reference(x[part], in_range_N[block][part], temperature, softcap, topk)
            for value, computed in zip(values, parts, strict=True):
                value[block][part] = computed


def _score_natively(
    hidden_ND: Tensor,
    weight_VD: Weight,
    target_N: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    values: OperatorOutputs,
) -> OperatorOutputs:
    V = weight_VD.shape[0]
    stats_4N = torch.stack(values[:4])
    _core.linear_logprob(
        hidden_ND.detach(), cells_of(weight_VD), V, target_N.clamp(0, V - 1), detach(bias),
        temperature, softcap or 0.0, stats_4N, *values[4:], num_threads(),
    )  # fmt: skip
    for value, computed in zip(values, stats_4N, strict=False):
        value.copy_(computed)
    return values


def _allocate_outputs(hidden_ND: Tensor, target_N: Tensor, topk: int) -> OperatorOutputs:
    """Allocate the operator's outputs, uninitialised."""
    wide = torch.promote_types(hidden_ND.dtype, torch.float32)
    a, b, c, d = (target_N.new_empty(target_N.shape, dtype=wide) for _ in range(4))
    rank = target_N.new_empty(target_N.shape, dtype=torch.int32)
    shape = (target_N.shape[0], topk)
    return a, b, c, d, rank, target_N.new_empty(shape), target_N.new_empty(shape, dtype=wide)


def _check_outputs(target_N: Tensor, logsumexp_N: Tensor, vocabulary: int) -> None:
    """Raise ValueError on a target outside the vocabulary, else NonFiniteLogits on a row without a finite logsumexp.

    The host waits for the device once.
    """
    bad_N = (target_N < 0) | (target_N >= vocabulary) | ~logsumexp_N.isfinite()
    if bool(bad_N.any()):
        require_in_vocabulary("linear_logprob", target_N, vocabulary)
        raise NonFiniteLogits("linear_logprob", int(bad_N.nonzero()[0]))


_linear_logprob = torch.library.custom_op("genssd::linear_logprob", _score_in_blocks, mutates_args=())


@_linear_logprob.register_kernel("cuda")
def _linear_logprob_triton(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    target_N: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    topk: int,
    checked: bool,
) -> OperatorOutputs:
    # the Triton kernel computes no top k, and its descriptors take no tensor without rows
    if hidden_ND.dtype == torch.float64 or topk or not len(hidden_ND):
        return _score_in_blocks(hidden_ND, weight_VD, target_N, bias, temperature, softcap, topk, checked)
    # imported here, because Triton need not be installed where there is no GPU
    from genssd.kernels.head_triton import choose_launch
    from genssd.kernels.logprob_triton import score_rows

    hidden_ND, weight_VD = hidden_ND.contiguous(), weight_VD.to(hidden_ND.dtype).contiguous()
    launch = choose_launch(hidden_ND, weight_VD, "score")
    stats = score_rows(hidden_ND, weight_VD, target_N, bias, temperature, softcap, launch=launch)
    if checked:
        _check_outputs(target_N, stats[1], len(weight_VD))
    return (*stats, target_N.new_empty(len(target_N), 0), stats[0].new_empty(len(target_N), 0))


@_linear_logprob.register_fake
def _(hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor, *rest: Any) -> OperatorOutputs:
    return _allocate_outputs(hidden_ND, target_N, rest[-2])


_linear_logprob.register_autograd(backward, setup_context=save_context)
