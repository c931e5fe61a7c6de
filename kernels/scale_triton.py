"""Triton kernel that scales a gradient by a number on the device and rounds it once to another dtype."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, NUM_WARPS = 2048, 4
"""Number of entries of a program: sixteen for each thread, in loads and stores of 16 bytes."""


@triton.jit
def _scale_kernel(gradient, factor, out, count, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(gradient + i, mask=i < count, other=0.0).to(tl.float32) * tl.load(factor)
    tl.store(out + i, value.to(out.dtype.element_ty), mask=i < count)


def scale(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return gradient times factor, a float32 scalar tensor, as a new tensor that is rounded to dtype once.

    The product is taken in float32. torch's own kernel for three dtypes computes the place of every entry by divisions
    and chooses its casts at every entry, because the scalar is broadcast.
    """
    gradient = gradient.contiguous()
    out = torch.empty_like(gradient, dtype=dtype)
    count = gradient.numel()
    if count:
        _scale_kernel[(-(-count // BLOCK),)](gradient, factor, out, count, BLOCK=BLOCK, num_warps=NUM_WARPS)
    return out
