"""Triton kernels over the rows of a chunk of a head's logits: log-sum-exps, and losses with their gradients.

One program computes one row, and reads it as few times as possible: once less where the product has taken the
normalizer of its softmax (loss_logits_triton.py). The gradient overwrites the logits: a pass from the
end of a row to its beginning, whose first entries are the ones that the pass before it has left in the L2 cache, writes
to the upper half of the row's memory, which it has already read.

Shapes:  C rows of a chunk   V vocabulary
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from genssd.kernels.head_triton import rescale, safe_peak

EVERY_ROW = 1 << 30
"""Number of programs that is no limit: there is one for every row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RowTiles:
    """Sizes of one configuration of a kernel over rows."""

    block: int
    """Number of entries of a row that a program holds at once."""
    num_warps: int
    programs: int = EVERY_ROW
    """Maximum number of programs that compute the rows of a loss one after the other. Fewer programs leave more of a
    row in the L2 cache until its second pass. No result depends on it."""


ROWS = RowTiles(block=4096, num_warps=8)
"""Shipped configuration of the kernels over rows of one model's logits."""


@triton.jit
def squash(x, scale, softcap, SOFTCAP: tl.constexpr):
    """Return the logits z of the products x: capped by softcap, then multiplied by scale, 1 / temperature."""
    if SOFTCAP:
        x = softcap * (1.0 - 2.0 / (tl.exp(2.0 * x / softcap) + 1.0))
    return x * scale


@triton.jit
def unsquash_gradient(dz, z, scale, softcap, SOFTCAP: tl.constexpr):
    """Return dx, the gradient in the products x, from dz, the gradient in the logits times scale, at the logits z."""
    if SOFTCAP:
        t = z / (scale * softcap)
        dz = dz * (1.0 - t * t)
    return dz


@triton.jit
def row_normalizer(x, V, scale, softcap, BLOCK: tl.constexpr, SOFTCAP: tl.constexpr):
    """Return m and s with log sum e^z = m + s over the V entries that start at pointer x.

    They are returned separately, because z - m - s keeps its precision where the logits are far from 0. Sums stay in
    lanes until the end, so a row takes one reduction. A lane adds four entries at a time to the sum relative to its
    peak, because these are what one thread loads at once, and rescaling the sum costs more than adding to it.
    """
    LANES: tl.constexpr = BLOCK // 4
    peak = tl.full([LANES], -float("inf"), tl.float32)
    total = tl.zeros([LANES], tl.float32)
    for start in range(0, V, BLOCK):
        v = start + tl.arange(0, BLOCK)
        z = squash(tl.load(x + v, mask=v < V, other=0.0), scale, softcap, SOFTCAP)
        z = tl.reshape(tl.where(v < V, z, -float("inf")), [LANES, 4])
        new_peak = tl.maximum(peak, tl.max(z, 1))
        base = safe_peak(new_peak)
        # a NaN does not reach the peak, but it stays in the sum
        total = total * rescale(peak, base) + tl.sum(tl.exp(z - base[:, None]), 1)
        peak = new_peak
    base = safe_peak(tl.max(peak, 0))
    return base, tl.log(tl.sum(total * rescale(peak, base), 0))


@triton.jit
def _logsumexp_kernel(
    x, peaks, log_totals,  # [C, V] [C, S] [C, S]
    V, S, stride, scale, softcap, SPLIT: tl.constexpr, BLOCK: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    split, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    start = split * SPLIT
    peak, log_total = row_normalizer(
        x + row * stride + start, tl.minimum(V - start, SPLIT), scale, softcap, BLOCK, SOFTCAP
    )
    tl.store(peaks + row * S + split, peak)
    tl.store(log_totals + row * S + split, log_total)


@triton.jit
def _merge_logsumexp_kernel(peaks, log_totals, out, S, SPLITS: tl.constexpr):
    row, s = tl.program_id(0).to(tl.int64), tl.arange(0, SPLITS)
    peak = tl.load(peaks + row * S + s, mask=s < S, other=-float("inf"))
    log_total = tl.load(log_totals + row * S + s, mask=s < S, other=-float("inf"))
    highest = safe_peak(tl.max(tl.where(log_total > -float("inf"), peak, -float("inf")), 0))
    total = tl.sum(tl.where(log_total == -float("inf"), 0.0, tl.exp(peak - highest + log_total)), 0)
    tl.store(out + row, highest + tl.log(total))


def logsumexp_rows(x_CV: Tensor, temperature: float, softcap: float | None, *, tiles: RowTiles = ROWS) -> Tensor:
    """Compute `head.row_logsumexp`, float32 [C], for float32 logits on a CUDA device.

    Several programs compute a row, whose splits depend on V and the tiles alone, so that few rows are fast as well.
    """
    C, V = x_CV.shape
    split = 8 * tiles.block
    S = -(-V // split)
    out, peaks, log_totals = (torch.empty(C, n, dtype=torch.float32, device=x_CV.device) for n in (1, S, S))
    _logsumexp_kernel[(S, C)](
        x_CV, peaks, log_totals, V, S, x_CV.stride(0), 1.0 / temperature, softcap or 1.0,
        SPLIT=split, BLOCK=tiles.block, SOFTCAP=softcap is not None, num_warps=tiles.num_warps,
    )  # fmt: skip
    _merge_logsumexp_kernel[(C,)](peaks, log_totals, out, S, SPLITS=triton.next_power_of_2(S), num_warps=1)
    return out[:, 0]


def upper_half(x_CV: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the memory of x, float32, as a tensor of its shape and of a 16-bit dtype in every row's upper half, or x
    itself for float32."""
    return x_CV if dtype == torch.float32 else x_CV.view(dtype)[:, x_CV.shape[1] :]


def lower_half(x_CV: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the memory of x, float32, as a tensor of its shape and of a 16-bit dtype in every row's lower half, or x
    itself for float32."""
    return x_CV if dtype == torch.float32 else x_CV.view(dtype)[:, : x_CV.shape[1]]


@triton.jit
def _softmax_gradient_kernel(
    x, logsumexp, coefficients, dx,  # [C, V] [C] [1 or 3, C] [C, V], the upper half of x
    C, V, stride_x, stride_dx, scale, softcap,
    BLOCK: tl.constexpr, SOFTCAP: tl.constexpr, LINEAR: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    lse = tl.load(logsumexp + row)
    a = tl.load(coefficients + row)
    for i in range(0, tl.cdiv(V, BLOCK)):
        v = (tl.cdiv(V, BLOCK) - 1 - i) * BLOCK + lane
        z = squash(tl.load(x + row * stride_x + v, mask=v < V, other=0.0), scale, softcap, SOFTCAP)
        log_p = z - lse
        p = tl.exp(log_p)
        dz = p * a
        if not LINEAR:
            b, c = tl.load(coefficients + C + row), tl.load(coefficients + 2 * C + row)
            dz += p * (tl.where(p == 0.0, 0.0, b * log_p) + c * p)
        out = unsquash_gradient(dz * scale, z, scale, softcap, SOFTCAP)
        tl.debug_barrier()  # all threads have read the block's entries before one is overwritten
        tl.store(dx + row * stride_dx + v, out.to(dx.dtype.element_ty), mask=v < V)


def softmax_gradient_rows(
    x_CV: Tensor,
    logsumexp_C: Tensor,
    coefficients_KC: Tensor,
    temperature: float,
    softcap: float | None,
    dtype: torch.dtype,
    *,
    tiles: RowTiles = ROWS,
) -> Tensor:
    """Compute `head.softmax_gradient` for float32 logits on a CUDA device; the result overwrites x."""
    C, V = x_CV.shape
    dx_CV = upper_half(x_CV, dtype)
    _softmax_gradient_kernel[(C,)](
        x_CV, logsumexp_C.contiguous(), coefficients_KC.contiguous(), dx_CV, C, V, x_CV.stride(0), dx_CV.stride(0),
        1.0 / temperature, softcap or 1.0, BLOCK=tiles.block, SOFTCAP=softcap is not None,
        LINEAR=len(coefficients_KC) == 1, num_warps=tiles.num_warps,
    )  # fmt: skip
    return dx_CV


@triton.jit
def _cross_entropy_kernel(
    x, normalizer, target, row_weight, loss, dx,  # [C, V] [C, 2] int64 [C] [C] [C] [C, V], the upper half of x
    C, V, stride_x, stride_dx, scale, softcap,
    BLOCK: tl.constexpr, SOFTCAP: tl.constexpr, KNOWN: tl.constexpr,
):  # fmt: skip
    """KNOWN: the normalizers are known, and x is capped; then a row is read once."""
    lane = tl.arange(0, BLOCK)
    for number in range(tl.program_id(0), C, tl.num_programs(0)):
        row = tl.zeros([], tl.int64) + number
        x_row, dx_row = x + row * stride_x, dx + row * stride_dx
        weight, token = tl.load(row_weight + row), tl.load(target + row)
        z_target = squash(tl.load(x_row + token), scale, softcap, SOFTCAP and not KNOWN)
        if KNOWN:
            peak, log_total = tl.load(normalizer + 2 * row), tl.load(normalizer + 2 * row + 1)
        else:
            peak, log_total = row_normalizer(x_row, V, scale, softcap, BLOCK, SOFTCAP)
        nll = tl.where(weight == 0.0, 0.0, peak + log_total - z_target)
        tl.store(loss + row, nll)
        weight *= scale
        for i in range(0, tl.cdiv(V, BLOCK)):
            v = (tl.cdiv(V, BLOCK) - 1 - i) * BLOCK + lane
            z = squash(tl.load(x_row + v, mask=v < V, other=0.0), scale, softcap, SOFTCAP and not KNOWN)
            out = unsquash_gradient(weight * tl.exp(z - peak - log_total), z, scale, softcap, SOFTCAP)
            tl.debug_barrier()  # all threads have read the block's entries before one is overwritten
            tl.store(dx_row + v, out.to(dx.dtype.element_ty), mask=v < V)
        # dz is p, and at the target p - 1 = expm1(-nll), by Kahan's quotient, which corrects the rounding of p
        p = tl.exp(-nll)
        dz = tl.where(p == 1.0, -nll, tl.where(p - 1.0 == -1.0, -1.0, (p - 1.0) * (-nll / tl.log(p))))
        out = unsquash_gradient(weight * dz, z_target, scale, softcap, SOFTCAP)
        tl.debug_barrier()
        tl.store(dx_row + token, out.to(dx.dtype.element_ty))


def cross_entropy_rows(
    x_CV: Tensor,
    target_C: Tensor,
    row_weight_C: Tensor,
    temperature: float,
    softcap: float | None,
    dtype: torch.dtype,
    *,
    normalizer_C2: Tensor | None = None,
    tiles: RowTiles = ROWS,
) -> tuple[Tensor, Tensor]:
    """Return the losses, float32 [C], and their gradients in x times row_weight, [C, V] of the given dtype.

    x: float32 logits on a CUDA device, before softcap and temperature; the gradients overwrite them. normalizer: of
    `loss_logits_triton.write_normalized_logits`, which has capped x.
    """
    C, V = x_CV.shape
    loss_C = torch.empty(C, dtype=torch.float32, device=x_CV.device)
    dx_CV = upper_half(x_CV, dtype)
    known = normalizer_C2 is not None
    _cross_entropy_kernel[(min(C, tiles.programs),)](
        x_CV, normalizer_C2 if known else loss_C, target_C, row_weight_C, loss_C, dx_CV, C, V, x_CV.stride(0),
        dx_CV.stride(0), 1.0 / temperature, softcap or 1.0, BLOCK=tiles.block, SOFTCAP=softcap is not None,
        KNOWN=known, num_warps=tiles.num_warps,
    )  # fmt: skip
    return loss_C, dx_CV
