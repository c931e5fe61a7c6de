"""Triton kernel of `rms_norm` and `add_rms_norm`.

A program holds complete rows, so each is read once. The number of rows per program depends on the width alone, so a
row's bits do not depend on how many rows there are.

Shapes:  N rows   D width
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 1024  # entries of a program whose rows are narrower
MAX_WIDTH = 16384  # largest width of a row that fits the registers of one program


@triton.jit
def _rms_norm_kernel(
    x, residual, weight, normed, total,  # [N, D] [N, D] [D] [N, D] [N, D]
    N, D, stride_x, stride_residual, eps, offset,
    ADD: tl.constexpr, OFFSET: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Normalise ROWS rows of x, or of residual + x where ADD. OFFSET: whether `offset` is added to the weight, and the
    product rounded once."""
    n = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    d = tl.arange(0, BLOCK)[None, :]
    kept = (n < N) & (d < D)
    dtype = normed.dtype.element_ty
    w = tl.load(weight + d, mask=d < D, other=0.0).to(tl.float32)
    value = tl.load(x + n * stride_x + d, mask=kept, other=0.0).to(tl.float32)
    if ADD:
        value += tl.load(residual + n * stride_residual + d, mask=kept, other=0.0).to(tl.float32)
        rounded = value.to(dtype)
        tl.store(total + n * D + d, rounded, mask=kept)
        value = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, 1) / D + eps)
    unit = value * scale[:, None]
    if OFFSET:
        w += offset
    else:
        unit = unit.to(dtype).to(tl.float32)
    tl.store(normed + n * D + d, (w * unit).to(dtype), mask=kept)


def choose_tiling(width: int) -> tuple[int, int, int]:
    """Return the number of rows and of entries of a row that a program holds, and its number of warps."""
    block = triton.next_power_of_2(width)
    rows = max(1, TILE // block)
    return rows, block, max(4, min(16, rows * block // 1024))


def rms_norm_rows(x_ND: Tensor, weight_D: Tensor, eps: float, offset: float | None = None) -> Tensor:
    """Compute `norm.rms_norm` on a CUDA device.

    Rows may have any stride. Raises ValueError on rows of more than MAX_WIDTH entries.
    """
    normed_ND = torch.empty(x_ND.shape, dtype=x_ND.dtype, device=x_ND.device)
    x_ND = _with_contiguous_rows(x_ND)
    _launch(x_ND, x_ND, weight_D, normed_ND, normed_ND, eps, offset, add=False)
    return normed_ND


def add_rms_norm_rows(
    x_ND: Tensor, residual_ND: Tensor, weight_D: Tensor, eps: float, offset: float | None = None
) -> tuple[Tensor, Tensor]:
    """Compute `norm.add_rms_norm` on a CUDA device.

    Rows may have any stride. Raises ValueError on rows of more than MAX_WIDTH entries.
    """
    normed_ND = torch.empty(x_ND.shape, dtype=x_ND.dtype, device=x_ND.device)
    total_ND = torch.empty(x_ND.shape, dtype=x_ND.dtype, device=x_ND.device)
    x_ND, residual_ND = _with_contiguous_rows(x_ND), _with_contiguous_rows(residual_ND)
    _launch(x_ND, residual_ND, weight_D, normed_ND, total_ND, eps, offset, add=True)
    return normed_ND, total_ND


def _with_contiguous_rows(x_ND: Tensor) -> Tensor:
    """Return x with the entries of each row contiguous; rows may have any stride."""
    return x_ND if x_ND.stride(1) == 1 else x_ND.contiguous()


def _launch(
    x_ND: Tensor,
    residual_ND: Tensor,
    weight_D: Tensor,
    normed_ND: Tensor,
    total_ND: Tensor,
    eps: float,
    offset: float | None,
    *,
    add: bool,
) -> None:
    N, D = x_ND.shape
    if D > MAX_WIDTH:
        raise ValueError(f"rms_norm: rows of {D} are wider than {MAX_WIDTH}")
    rows, block, num_warps = choose_tiling(D)
    _rms_norm_kernel[(-(-N // rows),)](
        x_ND, residual_ND, weight_D.contiguous(), normed_ND, total_ND, N, D, x_ND.stride(0), residual_ND.stride(0), eps,
        float(offset or 0.0), ADD=add, OFFSET=offset is not None, ROWS=rows, BLOCK=block, num_warps=num_warps,
    )  # fmt: skip
