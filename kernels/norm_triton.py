"""The Triton kernel behind `rms_norm` and `add_rms_norm`.

A program holds whole rows: they are read once. How many rows depends on the width alone, and so do a row's bits.

Shapes:  N rows   D width
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 1024  # entries of a program, where a row has fewer
MAX_WIDTH = 16384  # of a row that fits the registers of one program


@triton.jit
def _rms_norm_kernel(
    x, residual, weight, normed, total,  # [N, D] [N, D] [D] [N, D] [N, D]
    N, D, stride_x, stride_residual, eps,
    ADD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
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
    unit = (value * scale[:, None]).to(dtype).to(tl.float32)
    tl.store(normed + n * D + d, (w * unit).to(dtype), mask=kept)


def choose_tiling(width: int) -> tuple[int, int, int]:
    """Rows and entries of a row that a program holds, and its warps."""
    block = triton.next_power_of_2(width)
    rows = max(1, TILE // block)
    return rows, block, max(4, min(16, rows * block // 1024))


def rms_norm_rows(x_ND: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """See norm.rms_norm. Rows may lie apart. Raises ValueError on rows wider than MAX_WIDTH."""
    normed_ND = torch.empty(x_ND.shape, dtype=x_ND.dtype, device=x_ND.device)
    x_ND = _rows(x_ND)
    _launch(x_ND, x_ND, weight_D, normed_ND, normed_ND, eps, add=False)
    return normed_ND


def add_rms_norm_rows(x_ND: Tensor, residual_ND: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See norm.add_rms_norm. Rows may lie apart. Raises ValueError on rows wider than MAX_WIDTH."""
    normed_ND = torch.empty(x_ND.shape, dtype=x_ND.dtype, device=x_ND.device)
    total_ND = torch.empty(x_ND.shape, dtype=x_ND.dtype, device=x_ND.device)
    _launch(_rows(x_ND), _rows(residual_ND), weight_D, normed_ND, total_ND, eps, add=True)
    return normed_ND, total_ND


def _rows(x_ND: Tensor) -> Tensor:
    """Entries of a row together."""
    return x_ND if x_ND.stride(1) == 1 else x_ND.contiguous()


def _launch(
    x_ND: Tensor, residual_ND: Tensor, weight_D: Tensor, normed_ND: Tensor, total_ND: Tensor, eps: float, *, add: bool
) -> None:
    N, D = x_ND.shape
    if D > MAX_WIDTH:
        raise ValueError(f"rms_norm: rows of {D} are wider than {MAX_WIDTH}")
    rows, block, num_warps = choose_tiling(D)
    _rms_norm_kernel[(-(-N // rows),)](
        x_ND, residual_ND, weight_D.contiguous(), normed_ND, total_ND, N, D, x_ND.stride(0), residual_ND.stride(0), eps,
        ADD=add, ROWS=rows, BLOCK=block, num_warps=num_warps,
    )  # fmt: skip
