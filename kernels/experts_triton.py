"""Triton kernels of `expert_mlp`: products of rows with their experts' matrices, and the sum over a row's experts.

The products of a row with an expert are sorted by expert, on the device. A program of `_grouped_kernel` multiplies a
tile of consecutive ones, all of one expert, with a block of the expert's rows; it finds its tile from where each expert
begins. Their number is bounded without knowing how many rows an expert has: every expert has at most one tile that is
not full. So no value comes to the host, and a captured graph serves any routing.

The weight is the left factor: the shapes of the matrix unit then have at least 64 outputs and few rows, which is what
decoding needs, and no entry depends on the other rows of its tile.

Shapes:  N rows   X experts   K experts of a row   T = N K products of a row with an expert   D inputs   M outputs
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from genssd.kernels.activation import Activation
from genssd.kernels.head_triton import add_product

SUM_BLOCK = 1024  # entries of a row that a program of the sum over experts computes


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertTiles:
    """Sizes of one configuration of the grouped product.

    block_t: rows of a tile. block_m: its outputs. block_d: inputs multiplied at a time. interpret: whether Triton's
    interpreter runs the kernel.
    """

    block_t: int
    block_m: int
    block_d: int
    num_warps: int
    num_stages: int
    interpret: bool = False


FEW = ExpertTiles(block_t=16, block_m=64, block_d=128, num_warps=4, num_stages=4)
SOME = ExpertTiles(block_t=64, block_m=128, block_d=64, num_warps=4, num_stages=4)
MANY = ExpertTiles(block_t=128, block_m=128, block_d=64, num_warps=8, num_stages=4)
AMPERE_MANY = ExpertTiles(block_t=128, block_m=128, block_d=32, num_warps=8, num_stages=4)
AMD_FEW = ExpertTiles(block_t=16, block_m=64, block_d=128, num_warps=4, num_stages=2)
AMD_MANY = ExpertTiles(block_t=64, block_m=128, block_d=32, num_warps=4, num_stages=2)
SINGLE = ExpertTiles(block_t=32, block_m=32, block_d=32, num_warps=8, num_stages=3)
"""float32, which no matrix unit multiplies exactly."""


def choose_tiles(dtype: torch.dtype, rows: int, *, amd: bool, capability: int) -> ExpertTiles:
    """Return the shipped configuration. rows: the mean number of rows of an expert that has any.

    capability: NVIDIA's compute capability, 80 for sm_80; ignored on AMD. None was measured on a device yet.
    """
    if dtype == torch.float32:
        return SINGLE
    if amd:
        return AMD_FEW if rows <= 16 else AMD_MANY
    if rows <= 64:
        return FEW if rows <= 16 else SOME
    return MANY if capability >= 90 else AMPERE_MANY


def choose_launch(dtype: torch.dtype, device: torch.device, products: int, experts: int) -> ExpertTiles:
    """Return the configuration for so many products of rows with experts on a device."""
    properties = torch.cuda.get_device_properties(device)
    return choose_tiles(
        dtype, -(-products // experts), amd=torch.version.hip is not None,
        capability=10 * properties.major + properties.minor,
    )  # fmt: skip


@triton.jit
def _grouped_kernel(
    x, weight, bias, order, start, out,  # [N or T, D] [X, M, D] [X, M] int64 [T] int64 [X + 1] [T, M]
    X, K, D, M, stride_x, stride_e, stride_m, stride_b,
    GATHER: tl.constexpr, HAS_BIAS: tl.constexpr, EXPERTS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Compute a tile [BLOCK_T, BLOCK_M] of the products of one expert, and their biases.

    order: the products by expert, each as row * K + its place in the row. start: index into order of each expert's
    first; the last entry is T. GATHER: x has a row per row, and out one per product as sorted; else x has one per
    product as sorted, and out in the order of rows. EXPERTS: a power of two that X fits in.
    """
    tile = tl.program_id(0)
    e = tl.arange(0, EXPERTS)
    first = tl.load(start + tl.minimum(e, X))
    last = tl.load(start + tl.minimum(e + 1, X))
    tiles = (last - first + BLOCK_T - 1) // BLOCK_T
    until = tl.cumsum(tiles, 0)  # tiles of all experts up to e
    expert = tl.sum((until <= tile).to(tl.int32), 0)
    if expert >= X:
        return
    within = tile - tl.sum(tl.where(e < expert, tiles, 0), 0)
    t = tl.load(start + expert) + within * BLOCK_T + tl.arange(0, BLOCK_T)
    kept = t < tl.load(start + expert + 1)
    product = tl.load(order + t, mask=kept, other=0)
    from_row = x + (product // K if GATHER else t)[None, :] * stride_x
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    # outputs beyond the last repeat it
    from_weight = weight + expert.to(tl.int64) * stride_e + tl.minimum(m, M - 1).to(tl.int64)[:, None] * stride_m
    y = tl.zeros([BLOCK_M, BLOCK_T], tl.float32)
    for d_first in range(0, D, BLOCK_D):
        d = d_first + tl.arange(0, BLOCK_D)
        w = tl.load(from_weight + d[None, :], mask=d[None, :] < D, other=0.0)
        h = tl.load(from_row + d[:, None], mask=kept[None, :] & (d[:, None] < D), other=0.0)
        y = add_product(y, w, h, INTERPRET)
    if HAS_BIAS:
        y += tl.load(bias + expert.to(tl.int64) * stride_b + tl.minimum(m, M - 1)).to(tl.float32)[:, None]
    to = (t if GATHER else product)[None, :] * M + m[:, None]
    tl.store(out + to, y.to(out.dtype.element_ty), mask=kept[None, :] & (m[:, None] < M))


@triton.jit
def _sum_kernel(
    y, expert, weight, out,  # [T, D] int64 [N, K] [N, K] [N, D]
    D,
    K: tl.constexpr, PLACES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add up BLOCK entries of one row's products in ascending order of the experts. PLACES: a power of two that K fits
    in."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    k = tl.arange(0, PLACES)
    e = tl.load(expert + row * K + k, mask=k < K, other=1 << 30)
    is_before = (e[None, :] < e[:, None]) | ((e[None, :] == e[:, None]) & (k[None, :] < k[:, None]))
    rank = tl.sum(is_before.to(tl.int32), 1)
    total = tl.zeros([BLOCK], tl.float32)
    for place in tl.static_range(K):
        at = row * K + tl.sum(tl.where(rank == place, k, 0), 0)
        value = tl.load(y + at * D + d, mask=d < D, other=0.0).to(tl.float32)
        total += tl.load(weight + at).to(tl.float32) * value
    tl.store(out + row * D + d, total.to(out.dtype.element_ty), mask=d < D)


def run_experts(
    h_ND: Tensor,
    expert_NK: Tensor,
    weight_NK: Tensor,
    gate_up: tuple[Tensor, Tensor | None],
    down: tuple[Tensor, Tensor | None],
    activation: Activation,
) -> Tensor:
    """Compute `experts.expert_mlp` on a CUDA device. gate_up, down: the matrices of all experts, and their biases."""
    (N, K), X = expert_NK.shape, len(gate_up[0])
    if h_ND.stride(1) != 1:
        h_ND = h_ND.contiguous()
    expert_NK, weight_NK = expert_NK.contiguous(), weight_NK.contiguous()
    sorted_T, order_T = expert_NK.flatten().sort(stable=True)
    start_X = torch.searchsorted(sorted_T, torch.arange(X + 1, device=h_ND.device))
    tiles = choose_launch(h_ND.dtype, h_ND.device, N * K, X)
    gate_up_TF = multiply_grouped(h_ND, *gate_up, order_T, start_X, K, tiles, gather=True)
    y_TD = multiply_grouped(activation(gate_up_TF), *down, order_T, start_X, K, tiles, gather=False)
    return sum_products(y_TD, expert_NK, weight_NK)


def multiply_grouped(
    x: Tensor,
    weight_XMD: Tensor,
    bias_XM: Tensor | None,
    order_T: Tensor,
    start_X: Tensor,
    top_k: int,
    tiles: ExpertTiles,
    *,
    gather: bool,
) -> Tensor:
    """Return the products of rows with their experts' matrices, [T, M]. See `_grouped_kernel` for the arguments."""
    (X, M, D), T = weight_XMD.shape, len(order_T)
    out_TM = torch.empty(T, M, dtype=x.dtype, device=x.device)
    bias = weight_XMD if bias_XM is None else bias_XM
    _grouped_kernel[(count_programs(T, X, tiles), -(-M // tiles.block_m))](
        x, weight_XMD, bias, order_T, start_X, out_TM,
        X, top_k, D, M, x.stride(0), weight_XMD.stride(0), weight_XMD.stride(1), bias.stride(0),
        GATHER=gather, HAS_BIAS=bias_XM is not None, EXPERTS=triton.next_power_of_2(X), **launch_options(tiles),
    )  # fmt: skip
    return out_TM


def count_programs(products: int, experts: int, tiles: ExpertTiles) -> int:
    """Return a bound of the number of tiles of rows, whatever the routing: no tile is empty, and of each expert at most
    one is not full."""
    return min(products, -(-products // tiles.block_t) + experts)


def launch_options(tiles: ExpertTiles) -> dict[str, int | bool]:
    """Return the constants and launch options of the grouped product that a configuration decides."""
    return {
        "BLOCK_T": tiles.block_t,
        "BLOCK_M": tiles.block_m,
        "BLOCK_D": tiles.block_d,
        "INTERPRET": tiles.interpret,
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
    }


def sum_products(y_TD: Tensor, expert_NK: Tensor, weight_NK: Tensor, *, block: int = SUM_BLOCK) -> Tensor:
    """Return the weighted sums over the experts of each row, [N, D]; y_TD: the products in the order of rows."""
    (N, K), D = expert_NK.shape, y_TD.shape[1]
    out_ND = torch.empty(N, D, dtype=y_TD.dtype, device=y_TD.device)
    _sum_kernel[(N, -(-D // block))](
        y_TD, expert_NK, weight_NK, out_ND, D, K=K, PLACES=triton.next_power_of_2(K), BLOCK=block, num_warps=4
    )
    return out_ND
