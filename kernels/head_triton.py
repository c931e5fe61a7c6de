"""Triton functions for a linear head: tiles of its logits. Passes over stored logits are in rows_triton.py.

Shapes:  N rows   V vocabulary   D model width
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadTiles:
    """Sizes of one configuration of a kernel over the head.

    block: rows, and also vocabulary entries, of a tile. block_d: entries of the model width multiplied at a time.
    """

    block: int
    block_d: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadLaunch:
    """Launch configuration of a kernel over the head.

    programs: number of programs, on which no result depends. interpret: whether Triton's interpreter runs the kernel.
    """

    programs: int
    tiles: HeadTiles
    interpret: bool = False


HALF_HOPPER = HeadTiles(block=128, block_d=64, num_warps=8, num_stages=3)
HALF_AMPERE = HeadTiles(block=128, block_d=32, num_warps=8, num_stages=4)  # with 64, the addresses spill registers
HALF_AMD = HeadTiles(block=128, block_d=32, num_warps=8, num_stages=2)  # 64 KiB of local memory
DRAWING = HeadTiles(block=64, block_d=64, num_warps=8, num_stages=3)
SINGLE = HeadTiles(
    block=32, block_d=32, num_warps=4, num_stages=3
)  # no matrix unit computes float32, and larger tiles spill
DRAWING_SINGLE = HeadTiles(block=32, block_d=64, num_warps=4, num_stages=3)


def choose_tiles(dtype: torch.dtype, *, amd: bool, capability: int, drawing: bool = False) -> HeadTiles:
    """Return the shipped tile sizes for a dtype. capability: NVIDIA's compute capability, 80 for sm_80; ignored on AMD.

    drawing: for the kernel that draws tokens, which needs registers for the noise of every tile.
    """
    if dtype == torch.float32:
        return DRAWING_SINGLE if drawing else SINGLE
    if drawing:
        return DRAWING
    if amd:
        return HALF_AMD
    return HALF_HOPPER if capability >= 90 else HALF_AMPERE


def choose_launch(hidden: Tensor, *, drawing: bool = False) -> HeadLaunch:
    """Choose the launch configuration for the device and dtype of the hidden states."""
    device = torch.cuda.get_device_properties(hidden.device)
    capability = 10 * device.major + device.minor
    tiles = choose_tiles(hidden.dtype, amd=torch.version.hip is not None, capability=capability, drawing=drawing)
    return HeadLaunch(programs=device.multi_processor_count, tiles=tiles)


@triton.jit
def squash(x, temperature, softcap, SOFTCAP: tl.constexpr):
    """Return the logits z of the products x: capped by softcap, then divided by temperature; see head.py."""
    if SOFTCAP:
        x = softcap * (1.0 - 2.0 / (tl.exp(2.0 * x / softcap) + 1.0))
    return x / temperature


@triton.jit
def logits_tile(
    hidden, weight, bias,  # [N, D] [V, D] [V]
    n, v, N, V, D, stride_n, stride_v,
    temperature, softcap,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Return the logits z of rows n and vocabulary entries v, float32 [BLOCK, BLOCK].

    Indices beyond the last row or entry are replaced by the last one.
    """
    z = tl.zeros([BLOCK, BLOCK], tl.float32)
    n_at = tl.minimum(n, N - 1)[:, None] * stride_n
    v_at = tl.minimum(v, V - 1)[None, :] * stride_v
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        h = tl.load(hidden + n_at + d[None, :], mask=d[None, :] < D, other=0.0)
        w = tl.load(weight + v_at + d[:, None], mask=d[:, None] < D, other=0.0)
        if INTERPRET:  # the interpreter would multiply the bits of bf16 as integers
            h, w = h.to(tl.float32), w.to(tl.float32)
        z = tl.dot(h, w, z, input_precision="ieee")
    if HAS_BIAS:
        z += tl.load(bias + tl.minimum(v, V - 1)).to(tl.float32)[None, :]
    return squash(z, temperature, softcap, SOFTCAP)


@triton.jit
def safe_peak(peak):
    """Return the value to subtract before exponentiating: the peak, or 0 for -inf, where differences would be NaN."""
    return tl.where(peak == -float("inf"), 0.0, peak)


@triton.jit
def rescale(old_peak, base):
    """Return e^(old_peak - base), the factor of sums relative to old_peak; 0 for an old peak of -inf (empty sums)."""
    return tl.where(old_peak == -float("inf"), 0.0, tl.exp(tl.where(old_peak == -float("inf"), 0.0, old_peak - base)))
