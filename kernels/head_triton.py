"""Triton functions and kernels for a linear head: tiles of its logits, and row-wise passes over a chunk of logits.

Shapes:  N rows   C rows of a chunk   V vocabulary   D model width
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
ROW_BLOCK = 4096  # entries of a row that a row-wise program holds at once


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
def unsquash_gradient(dz, z, temperature, softcap, SOFTCAP: tl.constexpr):
    """Return dx, the gradient in the products x, from dz, the gradient in the logits, at the logits z."""
    if SOFTCAP:
        t = z * temperature / softcap
        dz = dz * (1.0 - t * t)
    return dz / temperature


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


@triton.jit
def row_normalizer(x, V, temperature, softcap, BLOCK: tl.constexpr, SOFTCAP: tl.constexpr):
    """Return m and s with log sum e^z = m + s over the V entries that start at pointer x.

    They are returned separately, because z - m - s keeps its precision where the logits are far from 0. Sums stay in
    lanes until the end, so a row takes one reduction.
    """
    lane = tl.arange(0, BLOCK)
    peak = tl.full([BLOCK], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        v = start + lane
        z = squash(tl.load(x + v, mask=v < V, other=0.0), temperature, softcap, SOFTCAP)
        z = tl.where(v < V, z, -float("inf"))
        new_peak = tl.maximum(peak, z)
        base = safe_peak(new_peak)
        total = total * rescale(peak, base) + tl.exp(z - base)
        # tl.maximum drops a NaN, which must reach the result
        peak = tl.where(z != z, z, new_peak)
    base = safe_peak(tl.max(peak, 0))
    return base, tl.log(tl.sum(total * rescale(peak, base), 0))


@triton.jit
def _logsumexp_kernel(x, out, V, stride, temperature, softcap, BLOCK: tl.constexpr, SOFTCAP: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    peak, log_total = row_normalizer(x + row * stride, V, temperature, softcap, BLOCK, SOFTCAP)
    tl.store(out + row, peak + log_total)


def logsumexp_rows(x_CV: Tensor, temperature: float, softcap: float | None, *, block: int = ROW_BLOCK) -> Tensor:
    """Compute `head.row_logsumexp`, float32 [C], for float32 logits on a CUDA device."""
    C, V = x_CV.shape
    out = torch.empty(C, dtype=torch.float32, device=x_CV.device)
    _logsumexp_kernel[(C,)](
        x_CV, out, V, x_CV.stride(0), temperature, softcap or 1.0, BLOCK=block, SOFTCAP=softcap is not None, num_warps=8
    )
    return out


@triton.jit
def _softmax_gradient_kernel(
    x, logsumexp, coefficients, dx,  # [C, V] [C] [1 or 3, C] [C, V]
    C, V, stride_x, stride_dx, temperature, softcap,
    BLOCK: tl.constexpr, SOFTCAP: tl.constexpr, LINEAR: tl.constexpr,
):  # fmt: skip
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1)
    v = column * BLOCK + tl.arange(0, BLOCK)
    z = squash(tl.load(x + row * stride_x + v, mask=v < V, other=0.0), temperature, softcap, SOFTCAP)
    log_p = z - tl.load(logsumexp + row)
    p = tl.exp(log_p)
    dz = p * tl.load(coefficients + row)
    if not LINEAR:
        b, c = tl.load(coefficients + C + row), tl.load(coefficients + 2 * C + row)
        dz += p * (tl.where(p == 0.0, 0.0, b * log_p) + c * p)
    out = unsquash_gradient(dz, z, temperature, softcap, SOFTCAP)
    tl.store(dx + row * stride_dx + v, out.to(dx.dtype.element_ty), mask=v < V)


def softmax_gradient_rows(
    x_CV: Tensor,
    logsumexp_C: Tensor,
    coefficients_KC: Tensor,
    temperature: float,
    softcap: float | None,
    dtype: torch.dtype,
    *,
    block: int = ROW_BLOCK,
) -> Tensor:
    """Compute `head.softmax_gradient` for float32 logits on a CUDA device."""
    C, V = x_CV.shape
    dx_CV = torch.empty(C, V, dtype=dtype, device=x_CV.device)
    _softmax_gradient_kernel[(C, -(-V // block))](
        x_CV, logsumexp_C.contiguous(), coefficients_KC.contiguous(), dx_CV, C, V, x_CV.stride(0), dx_CV.stride(0),
        temperature, softcap or 1.0, BLOCK=block, SOFTCAP=softcap is not None, LINEAR=len(coefficients_KC) == 1,
        num_warps=8,
    )  # fmt: skip
    return dx_CV
