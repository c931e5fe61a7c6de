"""A linear head's losses and their gradients, a chunk of rows at a time: no [rows, vocabulary] tensor is ever whole.

    x = hidden @ weight.T        z = softcap * tanh(x / softcap) / temperature        (no softcap: z = x / temperature)

A loss turns a chunk of x into one value per row and its gradient dx in one go; two more products with dx give the
gradients of hidden and weight. That is 6 N V D operations, against 8 when the logits are computed again in backward.
Chunks are added up in order, and nothing is atomic, so a gradient has the same bits in every run.

Shapes:  N rows   C rows of a chunk   V vocabulary   D model width
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from genssd.kernels.linear import linear
from genssd.kernels.weight import Weight

CHUNK_BYTES = {"cpu": 128 << 20, "cuda": 1280 << 20}
"""Of float32 logits alive at once. More rows mean fewer passes over the weight's gradient."""

SLICE = 1 << 20
"""Entries that a pass in plain torch works on at a time."""


class HeadLoss(NamedTuple):
    """total: the weighted sum over the rows, differentiable. rows: [N], each row's own loss, without gradient."""

    total: Tensor
    rows: Tensor


RowLoss = Callable[[Tensor, slice], tuple[Tensor, Tensor]]
"""From x of some rows (which it may overwrite) and their place in the batch to their losses and dx."""


def rows_per_chunk(vocabulary: int, device: torch.device) -> int:
    """Rows whose float32 logits fit CHUNK_BYTES, at least one."""
    return max(1, CHUNK_BYTES.get(device.type, CHUNK_BYTES["cpu"]) // (4 * vocabulary))


def compute_losses_and_gradients(
    row_loss: RowLoss,
    hidden_ND: Tensor,
    weight_VD: Tensor,
    row_weight_N: Tensor,
    *,
    rows: int,
    want_hidden: bool,
    want_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """losses [N] and the gradients of what is wanted, in the shape and dtype of hidden and weight (else empty).

    Rows of weight 0 are taken as zeros, so that whatever they hold reaches nothing. A weight of another dtype than
    hidden is cast for the products; its gradient is summed in float32 whatever its dtype.
    """
    wide = torch.promote_types(hidden_ND.dtype, torch.float32)
    w = weight_VD.to(hidden_ND.dtype)
    losses_N = torch.empty(hidden_ND.shape[0], dtype=wide, device=hidden_ND.device)
    x_CV = torch.empty(min(rows, len(hidden_ND)), len(weight_VD), dtype=wide, device=hidden_ND.device)
    d_hidden = hidden_ND.new_empty(hidden_ND.shape if want_hidden else 0)
    d_weight = torch.zeros(weight_VD.shape, dtype=wide, device=w.device) if want_weight else weight_VD.new_empty(0)
    for start in range(0, hidden_ND.shape[0], rows):
        span = slice(start, start + rows)
        h = hidden_ND[span].masked_fill(row_weight_N[span, None] == 0, 0)
        losses_N[span], dx = row_loss(multiply_into(h, w, out=x_CV[: len(h)]), span)
        if want_hidden:
            torch.mm(dx, w, out=d_hidden[span])
        if want_weight:
            add_product(d_weight, dx.T, h)
    return losses_N, d_hidden, d_weight.to(weight_VD.dtype)


def multiply_into(hidden_ND: Tensor, weight_VD: Tensor, out: Tensor) -> Tensor:
    """hidden @ weight.T into out, float32 or float64; the product of halves is not rounded to halves."""
    if hidden_ND.is_cuda and hidden_ND.dtype != out.dtype:
        return out.copy_(torch.mm(hidden_ND, weight_VD.T, out_dtype=out.dtype))
    if hidden_ND.dtype != out.dtype:
        return linear(hidden_ND, weight_VD, out=out)
    return torch.mm(hidden_ND, weight_VD.T, out=out)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, where total is float32 or wider."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += a @ b


def iter_slices(num_rows: int, vocabulary: int) -> Iterator[slice]:
    """Few rows at a time, for passes in plain torch: what they make on the way stays in the processor's cache.

    Their results go into tensors made before: a small one that is kept between large ones that are not would pin a
    piece of the heap per slice.
    """
    step = max(1, SLICE // vocabulary)
    for start in range(0, num_rows, step):
        yield slice(start, min(start + step, num_rows))


def squash(x: Tensor, temperature: float, softcap: float | None) -> Tensor:
    """z of x."""
    if softcap is not None:
        x = softcap * torch.tanh(x / softcap)
    return x / temperature if temperature != 1.0 else x


def unsquash_gradient(dz: Tensor, x: Tensor, temperature: float, softcap: float | None) -> Tensor:
    """dx of dz."""
    if softcap is not None:
        dz = dz * (1.0 - torch.tanh(x / softcap) ** 2)
    return dz / temperature if temperature != 1.0 else dz


def row_logsumexp(x_CV: Tensor, temperature: float, softcap: float | None) -> Tensor:
    """log sum_v e^z_v of every row, [C]. A row with nothing but -inf gives -inf."""
    if x_CV.is_cuda and x_CV.dtype == torch.float32:
        from genssd.kernels.head_triton import logsumexp_rows

        return logsumexp_rows(x_CV, temperature, softcap)
    out_C = x_CV.new_empty(x_CV.shape[0])
    for part in iter_slices(*x_CV.shape):
        out_C[part] = squash(x_CV[part], temperature, softcap).logsumexp(dim=1)
    return out_C


def softmax_gradient(
    x_CV: Tensor,
    logsumexp_C: Tensor,
    coefficients_KC: Tensor,
    temperature: float,
    softcap: float | None,
    dtype: torch.dtype,
) -> Tensor:
    """dx of dz = p a, or of dz = p (a + b log p + c p), where p = e^(z - logsumexp). x may be overwritten.

    coefficients: a, or a, b and c, of every row. p = 0 gives 0. Every loss of one softmax has this form but for a few
    entries of a row, which the caller puts in place after.
    """
    if x_CV.is_cuda and x_CV.dtype == torch.float32:
        from genssd.kernels.head_triton import softmax_gradient_rows

        return softmax_gradient_rows(x_CV, logsumexp_C, coefficients_KC, temperature, softcap, dtype)
    for part in iter_slices(*x_CV.shape):
        a, *more = coefficients_KC[:, part, None].unbind()
        x = x_CV[part]
        log_p = squash(x, temperature, softcap) - logsumexp_C[part, None]
        p = log_p.exp()
        factor = a + more[0] * log_p.masked_fill_(p == 0.0, 0.0) + more[1] * p if more else a
        x.copy_(unsquash_gradient(p.mul_(factor), x, temperature, softcap))
    return x_CV.to(dtype)


def make_fake_outputs(
    hidden_ND: Tensor, weight_VD: Tensor, want_hidden: bool, want_weight: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Shapes and dtypes of what a loss operator returns."""
    wide = torch.promote_types(hidden_ND.dtype, torch.float32)
    return (
        hidden_ND.new_empty((), dtype=wide),
        hidden_ND.new_empty(hidden_ND.shape[0], dtype=wide),
        hidden_ND.new_empty(hidden_ND.shape if want_hidden else 0),
        weight_VD.new_empty(weight_VD.shape if want_weight else 0),
    )


def save_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    """The operator, whose last two inputs say which gradients are wanted, has computed them already: keep them."""
    _, losses, d_hidden, d_weight = output
    ctx.mark_non_differentiable(losses, d_hidden, d_weight)
    ctx.save_for_backward(d_hidden, d_weight)
    ctx.wanted, ctx.num_inputs = inputs[-2:], len(inputs)


@once_differentiable
def scale_gradients(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    """Backward of an operator whose first two inputs are hidden and weight: its gradients, times what comes from above.

    The factor keeps its precision: a loss scale may not even fit the gradient's dtype.
    """
    hidden, weight = (
        _scale(gradient, upstream) if wanted else None
        for gradient, wanted in zip(ctx.saved_tensors, ctx.wanted, strict=True)
    )
    return hidden, weight, *[None] * (ctx.num_inputs - 2)


def _scale(gradient: Tensor, upstream: Tensor) -> Tensor:
    if gradient.dtype == upstream.dtype:
        return gradient * upstream
    out = torch.empty_like(gradient)
    for target, part in zip(torch.split(out, 8192), torch.split(gradient, 8192), strict=True):
        target.copy_(part * upstream[None])
    return out


def choose_product_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype a head's product is taken in: hidden's, or autocast's where it is on and hidden is not float64."""
    if torch.is_autocast_enabled(hidden.device.type) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(hidden.device.type)
    return hidden.dtype


def check_head(function: str, hidden: Tensor, weight: Weight, role: str = "") -> None:
    """Raise ValueError unless hidden is [N, D] and weight [V, D]. role: "student " in messages, say."""
    if hidden.ndim != 2 or len(weight.shape) != 2 or hidden.shape[1] != weight.shape[1] or not weight.shape[0]:
        raise ValueError(
            f"{function}: {role}hidden {tuple(hidden.shape)} must be [N, D] and {role}weight {tuple(weight.shape)} "
            "[V, D]"
        )


def check_positive(function: str, **options: float | None) -> None:
    """Raise ValueError naming the option that is given and not positive."""
    for name, value in options.items():
        if value is not None and not 0.0 < value < math.inf:
            raise ValueError(f"{function}: {name} must be positive, not {value}")


def resolve_row_weights(function: str, row_weight_N: Tensor | None, hidden_ND: Tensor) -> Tensor:
    """[N] weights in float32 (float64 for float64 hidden states), ones where none are given."""
    wide = torch.promote_types(hidden_ND.dtype, torch.float32)
    if row_weight_N is None:
        return torch.ones(hidden_ND.shape[0], dtype=wide, device=hidden_ND.device)
    if row_weight_N.shape != hidden_ND.shape[:1]:
        raise ValueError(f"{function}: row_weight must be [{hidden_ND.shape[0]}], not {tuple(row_weight_N.shape)}")
    if row_weight_N.requires_grad:
        raise ValueError(f"{function}: row_weight is not differentiated; detach it")
    return row_weight_N.to(wide)


def require_in_vocabulary(function: str, target_N: Tensor, vocabulary: int) -> None:
    """Raise ValueError naming the first row whose target is no index of the vocabulary. The host waits for this."""
    outside = (target_N < 0) | (target_N >= vocabulary)
    if bool(outside.any()):
        row = int(outside.nonzero()[0])
        raise ValueError(
            f"{function}: the target {int(target_N[row])} of row {row} lies outside the vocabulary of {vocabulary}"
        )
