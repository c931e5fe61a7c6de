"""A linear head's losses and their gradients, a chunk of rows at a time: no [rows, vocabulary] tensor is ever whole.

    x = hidden @ weight.T        z = softcap * tanh(x / softcap) / temperature        (no softcap: z = x / temperature)

A loss turns a chunk of x into one value per row and its gradient dx in one go; two more products with dx give the
gradients of hidden and weight. That is 6 N V D operations, against 8 when the logits are computed again in backward.
Chunks are added up in order, and nothing is atomic, so a gradient has the same bits in every run.

Shapes:  N rows   C rows of a chunk   V vocabulary   D model width
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

CHUNK_BYTES = {"cpu": 128 << 20, "cuda": 1280 << 20}
"""Of float32 logits alive at once. More rows mean fewer passes over the weight's gradient."""


class HeadLoss(NamedTuple):
    """total: the weighted sum over the rows, differentiable. rows: [N], each row's own loss, without gradient."""

    total: Tensor
    rows: Tensor


RowLoss = Callable[[Tensor, slice], tuple[Tensor, Tensor]]
"""From x of some rows (which it may overwrite) and their place in the batch to their losses and dx."""


def chunk_rows(vocabulary: int, device: torch.device) -> int:
    """Rows whose float32 logits fit CHUNK_BYTES, at least one."""
    return max(1, CHUNK_BYTES.get(device.type, CHUNK_BYTES["cpu"]) // (4 * vocabulary))


def losses_and_gradients(
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
    d_hidden = torch.empty_like(hidden_ND) if want_hidden else hidden_ND.new_empty(0)
    d_weight = torch.zeros(weight_VD.shape, dtype=wide, device=w.device) if want_weight else weight_VD.new_empty(0)
    for start in range(0, hidden_ND.shape[0], rows):
        span = slice(start, start + rows)
        h = hidden_ND[span].masked_fill(row_weight_N[span, None] == 0, 0)
        losses_N[span], dx = row_loss(product(h, w.T), span)
        if want_hidden:
            torch.mm(dx, w, out=d_hidden[span])
        if want_weight:
            add_product(d_weight, dx.T, h)
    return losses_N, d_hidden, d_weight.to(weight_VD.dtype)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in float32 (float64 stays float64); the product of halves is not rounded where the device allows."""
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a, b, out_dtype=torch.float32)
    out = a @ b
    return out if out.dtype == torch.float64 else out.float()


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, where total is float32 or wider."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += a @ b


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
    return squash(x_CV, temperature, softcap).logsumexp(dim=1)


def softmax_gradient(
    x_CV: Tensor,
    logsumexp_C: Tensor,
    coefficients_3C: Tensor,
    temperature: float,
    softcap: float | None,
    dtype: torch.dtype,
) -> Tensor:
    """dx of dz = p (a + b log p + c p), where p = e^(z - logsumexp) and a, b, c are [C] each. p = 0 gives 0.

    Every loss of one softmax has this form but for a few entries of a row, which the caller puts in place after.
    """
    if x_CV.is_cuda and x_CV.dtype == torch.float32:
        from genssd.kernels.head_triton import softmax_gradient_rows

        return softmax_gradient_rows(x_CV, logsumexp_C, coefficients_3C, temperature, softcap, dtype)
    a, b, c = coefficients_3C.unbind()
    log_p = squash(x_CV, temperature, softcap) - logsumexp_C[:, None]
    p = log_p.exp()
    log_p = log_p.masked_fill(p == 0.0, 0.0)
    dz = p * (a[:, None] + b[:, None] * log_p + c[:, None] * p)
    return unsquash_gradient(dz, x_CV, temperature, softcap).to(dtype)


def fake_outputs(
    hidden_ND: Tensor, weight_VD: Tensor, want_hidden: bool, want_weight: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Shapes and dtypes of what a loss operator returns."""
    wide = torch.promote_types(hidden_ND.dtype, torch.float32)
    return (
        hidden_ND.new_empty((), dtype=wide),
        hidden_ND.new_empty(hidden_ND.shape[0], dtype=wide),
        torch.empty_like(hidden_ND) if want_hidden else hidden_ND.new_empty(0),
        torch.empty_like(weight_VD) if want_weight else weight_VD.new_empty(0),
    )


def save_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    """The operator has computed its gradients already: keep them."""
    _, losses, d_hidden, d_weight = output
    ctx.mark_non_differentiable(losses, d_hidden, d_weight)
    ctx.save_for_backward(d_hidden, d_weight)


def scaled_gradients(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of hidden and weight, times what comes from above; None where not wanted."""
    d_hidden, d_weight = ctx.saved_tensors
    return (
        d_hidden * upstream.to(d_hidden.dtype) if d_hidden.numel() else None,
        d_weight * upstream.to(d_weight.dtype) if d_weight.numel() else None,
    )


def product_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype a head's product is taken in: autocast's where it is on, else that of hidden."""
    if torch.is_autocast_enabled(hidden.device.type):
        return torch.get_autocast_dtype(hidden.device.type)
    return hidden.dtype


def check_head(function: str, hidden: Tensor, weight: Tensor, role: str = "") -> None:
    """Raise ValueError unless hidden is [N, D] and weight [V, D]. role: "student " in messages, say."""
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1] or not weight.shape[0]:
        raise ValueError(
            f"{function}: {role}hidden {tuple(hidden.shape)} must be [N, D] and {role}weight {tuple(weight.shape)} "
            "[V, D]"
        )


def check_positive(function: str, **options: float | None) -> None:
    """Raise ValueError naming the option that is given and not positive."""
    for name, value in options.items():
        if value is not None and not 0.0 < value < math.inf:
            raise ValueError(f"{function}: {name} must be positive, not {value}")


def row_weights(function: str, row_weight_N: Tensor | None, hidden_ND: Tensor) -> Tensor:
    """float32 [N] weights, ones where none are given."""
    if row_weight_N is None:
        return torch.ones(hidden_ND.shape[0], dtype=torch.float32, device=hidden_ND.device)
    if row_weight_N.shape != hidden_ND.shape[:1]:
        raise ValueError(f"{function}: row_weight must be [{hidden_ND.shape[0]}], not {tuple(row_weight_N.shape)}")
    if row_weight_N.requires_grad:
        raise ValueError(f"{function}: row_weight is not differentiated; detach it")
    return row_weight_N.to(torch.float64 if hidden_ND.dtype == torch.float64 else torch.float32)


def require_in_vocabulary(function: str, target_N: Tensor, vocabulary: int) -> None:
    """Raise ValueError naming the first row whose target is no index of the vocabulary. The host waits for this."""
    outside = (target_N < 0) | (target_N >= vocabulary)
    if bool(outside.any()):
        row = int(outside.nonzero()[0])
        raise ValueError(
            f"{function}: the target {int(target_N[row])} of row {row} lies outside the vocabulary of {vocabulary}"
        )
