"""Triton's share of a linear head: tiles of its logits, and the row-wise passes over a chunk of them.

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
    """Sizes of one configuration of a kernel over the head. block: rows and vocabulary entries of a tile."""

    block: int
    block_d: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadLaunch:
    """How to start a kernel. programs: how many run at once; no result depends on it."""

    programs: int
    tiles: HeadTiles
    interpret: bool = False


HALF_HOPPER = HeadTiles(block=128, block_d=64, num_warps=8, num_stages=3)
HALF_AMPERE = HeadTiles(block=128, block_d=32, num_warps=8, num_stages=4)  # with 64, the addresses spill registers
HALF_AMD = HeadTiles(block=128, block_d=32, num_warps=8, num_stages=2)  # 64 KiB of local memory
DRAWING = HeadTiles(block=64, block_d=64, num_warps=8, num_stages=3)
SINGLE = HeadTiles(block=32, block_d=32, num_warps=4, num_stages=3)  # larger ones spill: no matrix unit takes them
DRAWING_SINGLE = HeadTiles(block=32, block_d=64, num_warps=4, num_stages=3)
ROW_BLOCK = 4096  # entries of a row that a row-wise program holds at once


def choose_tiles(dtype: torch.dtype, *, amd: bool, capability: int, drawing: bool = False) -> HeadTiles:
    """The configuration that ships for a dtype. capability: NVIDIA's, 80 for sm_80; without meaning on AMD.

    drawing: for the kernel that makes noise in every tile, which needs the registers for it.
    """
    if dtype == torch.float32:
        return DRAWING_SINGLE if drawing else SINGLE
    if drawing:
        return DRAWING
    if amd:
        return HALF_AMD
    return HALF_HOPPER if capability >= 90 else HALF_AMPERE


def choose_launch(hidden: Tensor, *, drawing: bool = False) -> HeadLaunch:
    """The configuration for the device and dtype of a tensor."""
    device = torch.cuda.get_device_properties(hidden.device)
    capability = 10 * device.major + device.minor
    tiles = choose_tiles(hidden.dtype, amd=torch.version.hip is not None, capability=capability, drawing=drawing)
    return HeadLaunch(programs=device.multi_processor_count, tiles=tiles)


@triton.jit
def squash(x, temperature, softcap, SOFTCAP: tl.constexpr):
    """z of x, see head.py."""
    if SOFTCAP:
        x = softcap * (1.0 - 2.0 / (tl.exp(2.0 * x / softcap) + 1.0))
    return x / temperature


@triton.jit
def unsquash_gradient(dz, z, temperature, softcap, SOFTCAP: tl.constexpr):
    """dx of dz at z."""
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
    """z of rows n and vocabulary entries v, float32 [BLOCK, BLOCK]; both index vectors may point beyond the end."""
    z = tl.zeros([BLOCK, BLOCK], tl.float32)
    n_at = tl.minimum(n, N - 1)[:, None] * stride_n
    v_at = tl.minimum(v, V - 1)[None, :] * stride_v
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        h = tl.load(hidden + n_at + d[None, :], mask=d[None, :] < D, other=0.0)
        w = tl.load(weight + v_at + d[:, None], mask=d[:, None] < D, other=0.0)
        if INTERPRET:  # the interpreter multiplies the bits of bf16
            h, w = h.to(tl.float32), w.to(tl.float32)
        z = tl.dot(h, w, z, input_precision="ieee")
    if HAS_BIAS:
        z += tl.load(bias + tl.minimum(v, V - 1)).to(tl.float32)[None, :]
    return squash(z, temperature, softcap, SOFTCAP)


@triton.jit
def safe_peak(peak):
    """What to subtract before exponentiating: while all is -inf, differences from the peak would be NaN."""
    return tl.where(peak == -float("inf"), 0.0, peak)


@triton.jit
def rescale(old_peak, base):
    """e^(old_peak - base), 0 while nothing has been seen."""
    return tl.where(old_peak == -float("inf"), 0.0, tl.exp(tl.where(old_peak == -float("inf"), 0.0, old_peak - base)))


@triton.jit
def row_normalizer(x, V, temperature, softcap, BLOCK: tl.constexpr, SOFTCAP: tl.constexpr):
    """m and s with log sum e^z = m + s over the V entries from pointer x on.

    Apart, because z - m - s loses nothing where the logits are far from 0. Sums stay in lanes until the end: one
    reduction per row.
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
        # a NaN is no maximum, and must not get lost
        peak = tl.where(z != z, z, new_peak)
    base = safe_peak(tl.max(peak, 0))
    return base, tl.log(tl.sum(total * rescale(peak, base), 0))


@triton.jit
def _logsumexp_kernel(x, out, V, stride, temperature, softcap, BLOCK: tl.constexpr, SOFTCAP: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    peak, log_total = row_normalizer(x + row * stride, V, temperature, softcap, BLOCK, SOFTCAP)
    tl.store(out + row, peak + log_total)


def logsumexp_rows(x_CV: Tensor, temperature: float, softcap: float | None, *, block: int = ROW_BLOCK) -> Tensor:
    """float32 [C]."""
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
    """See head.softmax_gradient."""
    C, V = x_CV.shape
    dx_CV = torch.empty(C, V, dtype=dtype, device=x_CV.device)
    _softmax_gradient_kernel[(C, -(-V // block))](
        x_CV, logsumexp_C.contiguous(), coefficients_KC.contiguous(), dx_CV, C, V, x_CV.stride(0), dx_CV.stride(0),
        temperature, softcap or 1.0, BLOCK=block, SOFTCAP=softcap is not None, LINEAR=len(coefficients_KC) == 1,
        num_warps=8,
    )  # fmt: skip
    return dx_CV
