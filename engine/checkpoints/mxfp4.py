"""Weights in MXFP4, as GPT-OSS's checkpoints store the projections of their experts.

The format (OCP Microscaling Formats, version 1.0): 32 numbers along the inputs share a scale, a power of two whose
exponent is stored with a bias of 127. A number has 4 bits: a sign, two bits of exponent and one of mantissa. Two
numbers are in a byte, the first in its lower half.

Shapes:  X experts   M outputs   B blocks of 32 inputs
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 32
"""Number of values that share a scale."""
SCALE_BIAS = 127
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Values of the lower three bits of a number."""


def dequantize(blocks_XMBH: Tensor, scales_XMB: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the numbers of MXFP4 blocks, [X, M, 32 B].

    blocks: uint8 [X, M, B, 16]. scales: uint8 [X, M, B]. A value is exact in bfloat16 and float32 within their range.
    """
    values_16 = torch.tensor([*MAGNITUDES, *(-value for value in MAGNITUDES)], device=blocks_XMBH.device)
    out = blocks_XMBH.new_empty(*scales_XMB.shape[:2], scales_XMB.shape[2] * BLOCK, dtype=dtype)
    for blocks, scales, expert in zip(blocks_XMBH, scales_XMB, out, strict=True):  # little memory besides the result
        pairs = torch.stack([blocks & 15, blocks >> 4], dim=-1).flatten(-2)
        numbers = torch.ldexp(values_16[pairs.int()], scales.int()[..., None] - SCALE_BIAS)
        expert.copy_(numbers.flatten(-2))
    return out
