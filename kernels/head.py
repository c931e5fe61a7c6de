"""Losses under a linear head and their gradients, a chunk of rows at a time: no full [rows, vocabulary] tensor exists.

    x = hidden @ weight.T        z = softcap * tanh(x / softcap) / temperature        (no softcap: z = x / temperature)

A loss turns a chunk of x into one value per row and the gradient dx in one pass; two more products with dx give the
gradients of hidden and weight. That is 6 N V D operations, against 8 when the backward pass computes the logits again.
Chunks are added up in order, and no operation is atomic, so a gradient has the same bits in every run.

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
from genssd.kernels.options import COLDEST
from genssd.kernels.weight import Weight

CHUNK_BYTES = {"cpu": 128 << 20, "cuda": 2380 << 20}
"""Largest size of the float32 logits of one chunk, by device type. More rows per chunk mean fewer passes over the
gradient of the weight. On CUDA the gradient of the logits takes no memory of its own, and 4096 rows of a vocabulary of
151936 fit."""

SLICE = 1 << 20
"""Number of entries that a pass in plain torch computes at a time."""


class HeadLoss(NamedTuple):
    """Loss of a batch of rows under a linear head."""

    total: Tensor
    """Weighted sum of the losses of the rows, a differentiable scalar."""
    rows: Tensor
    """Unweighted loss of every row, [N], without gradient."""


class ChunkLogits(NamedTuple):
    """Logits of a chunk of rows under a head."""

    x: Tensor
    """Products of hidden states and head, [C, V], before softcap and temperature; with normalizers, after softcap."""
    normalizer_C2: Tensor | None = None
    """m and s of every row, float32, with log sum_v e^z_v = m + s, where the product's kernel has taken them."""


RowLoss = Callable[[ChunkLogits, slice], tuple[Tensor, Tensor]]
"""Function from the logits of a chunk of rows (which it may overwrite) and the chunk's slice of the batch to losses and
dx."""

Multiply = Callable[[Tensor, Tensor, Tensor], ChunkLogits]
"""Function from hidden states [C, D] and weight [V, D] to their logits, which are written into the third tensor."""


def rows_per_chunk(num_rows: int, vocabulary: int, device: torch.device, *, most: int | None = None) -> int:
    """Return the number of rows of a chunk: those whose float32 logits fit into CHUNK_BYTES, at least one.

    most: largest number of rows; None for no other limit than the memory. On CUDA the chunks of num_rows rows have
    about the same size, in multiples of 128 rows where that fits.
    """
    fitting = max(1, CHUNK_BYTES.get(device.type, CHUNK_BYTES["cpu"]) // (4 * vocabulary))
    fitting = fitting if most is None else min(fitting, most)
    if device.type != "cuda" or num_rows <= fitting:
        return fitting
    even = -(-num_rows // -(-num_rows // fitting))
    return min(-(-even // 128) * 128, fitting)


def compute_losses_and_gradients(
    row_loss: RowLoss,
    hidden_ND: Tensor,
    weight_VD: Tensor,
    row_weight_N: Tensor,
    *,
    rows: int,
    want_hidden: bool,
    want_weight: bool,
    multiply: Multiply | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the losses [N] and the requested gradients of hidden and weight, in their shapes (else empty).

    rows: rows of a chunk. multiply: writes the logits; None for `multiply_into`. Rows of row weight 0 are read as
    zeros, so that a value that is not finite in them changes no result. A weight of another dtype than hidden is cast
    for the products. The gradient of hidden has the dtype of hidden; that of weight is summed and returned in float32
    (float64 for float64 hidden states), whatever its dtype.
    """
    wide = torch.promote_types(hidden_ND.dtype, torch.float32)
    w = weight_VD.to(hidden_ND.dtype)
    losses_N = torch.empty(hidden_ND.shape[0], dtype=wide, device=hidden_ND.device)
    x_CV = torch.empty(min(rows, len(hidden_ND)), len(weight_VD), dtype=wide, device=hidden_ND.device)
    d_hidden = hidden_ND.new_empty(hidden_ND.shape if want_hidden else 0)
    d_weight = torch.empty(weight_VD.shape if want_weight else 0, dtype=wide, device=w.device)
    if not len(hidden_ND):
        d_weight.zero_()
    for start in range(0, hidden_ND.shape[0], rows):
        span = slice(start, start + rows)
        h = hidden_ND[span].masked_fill(row_weight_N[span, None] == 0, 0)
        out = x_CV[: len(h)]
        logits = ChunkLogits(multiply_into(h, w, out=out)) if multiply is None else multiply(h, w, out)
        losses_N[span], dx = row_loss(logits, span)
        if want_hidden:
            torch.mm(dx, w, out=d_hidden[span])
        if want_weight:
            add_product(d_weight, dx.T, h, first=start == 0)
        del dx  # before the next chunk makes another
    return losses_N, d_hidden, d_weight


def multiply_into(hidden_ND: Tensor, weight_VD: Tensor, out: Tensor) -> Tensor:
    """Write hidden @ weight.T into out, float32 or float64, and return it.

    The product of bfloat16 or float16 inputs is not rounded to their dtype.
    """
    if hidden_ND.dtype != out.dtype:
        return linear(hidden_ND, weight_VD, out=out)
    return torch.mm(hidden_ND, weight_VD.T, out=out)


def add_product(total: Tensor, a: Tensor, b: Tensor, *, first: bool) -> None:
    """Add a @ b to total, float32 or float64, in place. first: overwrite total, which may be uninitialised."""
    if a.dtype == total.dtype:
        torch.mm(a, b, out=total) if first else total.addmm_(a, b)
    elif a.is_cuda and first:
        torch.mm(a, b, out_dtype=total.dtype, out=total)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    elif first:
        total.copy_(a @ b)
    else:
        total += a @ b


def iter_slices(num_rows: int, vocabulary: int) -> Iterator[slice]:
    """Yield slices of a few rows for passes in plain torch, whose intermediate results then fit the processor's cache.

    Callers write results into tensors that were allocated before: a small tensor kept between large ones that are freed
    would pin a piece of the heap per slice.
    """
    step = max(1, SLICE // vocabulary)
    for start in range(0, num_rows, step):
        yield slice(start, min(start + step, num_rows))


def squash(x: Tensor, temperature: float, softcap: float | None) -> Tensor:
    """Return the logits z of the products x: capped by softcap, then divided by temperature (see head.py)."""
    if softcap is not None:
        x = softcap * torch.tanh(x / softcap)
    return x / temperature if temperature != 1.0 else x


def unsquash_gradient(dz: Tensor, x: Tensor, temperature: float, softcap: float | None) -> Tensor:
    """Return dx, the gradient in the products x, from dz, the gradient in the logits z = squash(x)."""
    if softcap is not None:
        dz = dz * (1.0 - torch.tanh(x / softcap) ** 2)
    return dz / temperature if temperature != 1.0 else dz


def row_logsumexp(x_CV: Tensor, temperature: float, softcap: float | None) -> Tensor:
    """Return log sum_v e^z_v of every row, [C], for z = squash(x). A row with nothing but -inf gives -inf."""
    if x_CV.is_cuda and x_CV.dtype == torch.float32:
        from genssd.kernels.rows_triton import logsumexp_rows

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
    """Return dx of dz = p a, or of dz = p (a + b log p + c p), where z = squash(x) and p = e^(z - logsumexp).

    coefficients_KC: a, or a, b and c, of every row. p = 0 gives dz = 0. x_CV may be overwritten. dtype: that of the
    result. The gradient of every loss of one softmax has this form except for a few entries of a row, which the caller
    writes afterwards.
    """
    if x_CV.is_cuda and x_CV.dtype == torch.float32:
        from genssd.kernels.rows_triton import softmax_gradient_rows

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
    """Return empty tensors with the shapes and dtypes of a loss operator's outputs, for torch's tracing."""
    wide = torch.promote_types(hidden_ND.dtype, torch.float32)
    return (
        hidden_ND.new_empty((), dtype=wide),
        hidden_ND.new_empty(hidden_ND.shape[0], dtype=wide),
        hidden_ND.new_empty(hidden_ND.shape if want_hidden else 0),
        weight_VD.new_empty(weight_VD.shape if want_weight else 0, dtype=wide),
    )


def save_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    """Save the gradients that the operator has already computed; its last two inputs tell which were requested."""
    _, losses, d_hidden, d_weight = output
    ctx.mark_non_differentiable(losses, d_hidden, d_weight)
    ctx.set_materialize_grads(False)  # else torch fills zeros of the size of both gradients, which nobody reads
    ctx.save_for_backward(d_hidden, d_weight)
    ctx.requested, ctx.num_inputs = inputs[-2:], len(inputs)
    ctx.dtypes = inputs[0].dtype, inputs[1].dtype


@once_differentiable
def scale_gradients(ctx: Any, upstream: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    """Compute the backward pass of an operator whose first two inputs are hidden and weight: scale its saved gradients.

    The upstream gradient keeps its precision: a loss scale may not even fit the dtype of the gradients.
    """
    if upstream is None:  # the total has no gradient
        return (*[None] * ctx.num_inputs,)
    hidden, weight = (
        _scale(gradient, upstream, dtype) if is_requested else None
        for gradient, dtype, is_requested in zip(ctx.saved_tensors, ctx.dtypes, ctx.requested, strict=True)
    )
    return hidden, weight, *[None] * (ctx.num_inputs - 2)


def _scale(gradient: Tensor, upstream: Tensor, dtype: torch.dtype) -> Tensor:
    """Return gradient times upstream, a scalar tensor, rounded to dtype once."""
    if gradient.is_cuda and upstream.dtype == torch.float32:
        from genssd.kernels.scale_triton import scale

        return scale(gradient, upstream, dtype)
    if gradient.dtype == upstream.dtype == dtype:
        return gradient * upstream
    out = torch.empty_like(gradient, dtype=dtype)
    for target, part in zip(torch.split(out, 8192), torch.split(gradient, 8192), strict=True):
        target.copy_(part * upstream[None])
    return out


def choose_product_dtype(hidden: Tensor) -> torch.dtype:
    """Return the dtype of a head's product: that of hidden, or autocast's where it is on and hidden is not float64."""
    if torch.is_autocast_enabled(hidden.device.type) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(hidden.device.type)
    return hidden.dtype


def check_head(function: str, hidden: Tensor, weight: Weight, role: str = "") -> None:
    """Raise ValueError unless hidden is [N, D] and weight [V, D]. role: word before both names in the message, such as
    "student "."""
    if hidden.ndim != 2 or len(weight.shape) != 2 or hidden.shape[1] != weight.shape[1] or not weight.shape[0]:
        raise ValueError(
            f"{function}: {role}hidden {tuple(hidden.shape)} must be [N, D] and {role}weight {tuple(weight.shape)} "
            "[V, D]"
        )


def check_positive(function: str, **options: float | None) -> None:
    """Raise ValueError naming the first option that is neither None nor positive and finite.

    A temperature must be at least COLDEST.
    """
    for name, value in options.items():
        if value is not None and not 0.0 < value < math.inf:
            raise ValueError(f"{function}: {name} must be positive, not {value}")
        if name == "temperature" and value is not None and value < COLDEST:
            raise ValueError(f"{function}: temperature must be at least {COLDEST:g}, not {value:g}")


def resolve_row_weights(function: str, row_weight_N: Tensor | None, hidden_ND: Tensor) -> Tensor:
    """Return the row weights, float32 [N] (float64 for float64 hidden states); ones where row_weight_N is None.

    Raises ValueError on another shape and on weights that require a gradient.
    """
    wide = torch.promote_types(hidden_ND.dtype, torch.float32)
    if row_weight_N is None:
        return torch.ones(hidden_ND.shape[0], dtype=wide, device=hidden_ND.device)
    if row_weight_N.shape != hidden_ND.shape[:1]:
        raise ValueError(f"{function}: row_weight must be [{hidden_ND.shape[0]}], not {tuple(row_weight_N.shape)}")
    if row_weight_N.requires_grad:
        raise ValueError(f"{function}: row_weight is not differentiated; detach it")
    return row_weight_N.to(wide)


def require_in_vocabulary(function: str, target_N: Tensor, vocabulary: int) -> None:
    """Raise ValueError naming the first row whose target is outside the vocabulary. The host waits for the device."""
    outside = (target_N < 0) | (target_N >= vocabulary)
    if bool(outside.any()):
        row = int(outside.nonzero()[0])
        raise ValueError(
            f"{function}: the target {int(target_N[row])} of row {row} lies outside the vocabulary of {vocabulary}"
        )
