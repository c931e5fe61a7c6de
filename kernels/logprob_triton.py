"""Triton kernels of `linear_logprob`: one pass over the head for a block of rows.

A program takes a block of rows and one split of the vocabulary, walks the split's tiles in order, and keeps for each
row

    peak = max z        total = sum e^(z - peak)        slope = sum (z - peak) e^(z - peak)
    square = sum e^2(z - peak)        above = number of z > z[target]

Another kernel merges the splits. The boundaries of splits and tiles do not depend on the rows, every product is added
up in the same order with the same instruction, and no operation is atomic: a row's bits depend on that row alone. A
first kernel computes the targets' logits: it multiplies each block of rows with the weights of the block's own targets
and keeps the diagonal. It uses the same instruction in the same order, so comparing logits with them yields exact
ranks.

Shapes:  N rows   V vocabulary   D model width   S splits
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from genssd.kernels.head_triton import (
    HeadLaunch,
    HeadTiles,
    add_product,
    describe,
    finish_logits,
    multiply_by_library,
    multiply_tile,
    place_of,
    rescale,
    safe_peak,
    squash,
)

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
MERGED_ROWS = 8  # rows that a merging program takes
MERGED_SPLITS = 64  # splits that it reads at once
LOGITS_BYTES = 256 << 20  # largest size of the library's products for one block of rows
LOGITS_SPLIT, LOGITS_BLOCK = 32768, 4096  # entries of a row that a program reads, and at once


@triton.jit(do_not_specialize=("N",))
def _target_kernel(
    hidden, weight, bias, target,  # [N, D] [V, D] [V] int64 [N]
    chosen,  # [N]
    N, V, D, stride_n, stride_v, temperature, softcap,
    BLOCK_M: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """Compute the targets' logits of BLOCK rows, which are repeated to the BLOCK_M rows that the matrix unit takes."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    m, lane = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK)
    n = first + lane
    token = tl.minimum(tl.maximum(tl.load(target + n, mask=n < N, other=0), 0), V - 1)
    n_at = tl.minimum(first + m % BLOCK, N - 1)[:, None] * stride_n
    v_at = token[:, None] * stride_v
    x = tl.zeros([BLOCK_M, BLOCK], tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        h = tl.load(hidden + n_at + d[None, :], mask=d[None, :] < D, other=0.0)
        w = tl.load(weight + v_at + d[None, :], mask=d[None, :] < D, other=0.0)
        x = add_product(x, h, w.T, INTERPRET)
    if HAS_BIAS:
        x += tl.load(bias + token).to(tl.float32)[None, :]
    z = squash(x, temperature, softcap, SOFTCAP)
    tl.store(chosen + n, tl.sum(tl.where(m[:, None] == lane[None, :], z, 0.0), 0), mask=n < N)


@triton.jit
def add_logits(z, peak, total, slope, square):
    """Return the sums of a block of rows after a tile of their logits z. slope is in units of ln 2."""
    new_peak = tl.maximum(peak, tl.max(z, 1))
    base = safe_peak(new_peak)
    scale = rescale(peak, base)
    shift = tl.where(peak == -float("inf"), 0.0, (peak - base) * LOG2_E)
    # in units of ln 2, in which exponentials are one instruction
    away = (z - base[:, None]) * LOG2_E
    e = tl.exp2(away)
    # 0 * -inf would be NaN: an entry of probability 0 must add 0, and 2^-200 is 0 in float32
    slope = scale * (slope + shift * total) + tl.sum(tl.maximum(away, -200.0) * e, 1)
    total = scale * total + tl.sum(e, 1)
    square = scale * scale * square + tl.sum(e * e, 1)
    return new_peak, total, slope, square


# code specialised on the number of rows might round differently
@triton.jit(do_not_specialize=("N", "tiles_per_split", "group"))
def _score_split_kernel(
    hidden, weight, bias, chosen,  # [N, D] [V, D] [V] [N]
    partial,  # [5, S, N]
    N, V, D, stride_n, stride_v, tiles_per_split, group, temperature, softcap,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, DESCRIPTORS: tl.constexpr,
    HAS_BIAS: tl.constexpr, SCALED: tl.constexpr, SOFTCAP: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    blocks, tiles = tl.cdiv(N, BLOCK_N), tl.cdiv(V, BLOCK_V)
    splits = tl.cdiv(tiles, tiles_per_split)
    for task in range(tl.program_id(0), blocks * splits, tl.num_programs(0)):
        split, block = place_of(task, blocks, splits, group)
        n = block * BLOCK_N + tl.arange(0, BLOCK_N)
        z_target = tl.load(chosen + n, mask=n < N, other=0.0)
        peak = tl.full([BLOCK_N], -float("inf"), tl.float32)
        total = tl.zeros([BLOCK_N], tl.float32)
        slope = tl.zeros([BLOCK_N], tl.float32)
        square = tl.zeros([BLOCK_N], tl.float32)
        above = tl.zeros([BLOCK_N], tl.float32)
        for tile in range(split * tiles_per_split, tl.minimum((split + 1) * tiles_per_split, tiles)):
            v_first = tile * BLOCK_V
            x = multiply_tile(
                hidden, weight, block * BLOCK_N, v_first, N, V, D, stride_n, stride_v,
                BLOCK_N, BLOCK_V, BLOCK_D, DESCRIPTORS, INTERPRET,
            )  # fmt: skip
            z = finish_logits(x, bias, v_first, V, temperature, softcap, BLOCK_V, HAS_BIAS, SCALED, SOFTCAP)
            above += tl.sum((z > z_target[:, None]).to(tl.float32), 1)
            peak, total, slope, square = add_logits(z, peak, total, slope, square)

        kept = n < N
        at = split.to(tl.int64) * N + n
        size = splits.to(tl.int64) * N
        tl.store(partial + at, peak, mask=kept)
        tl.store(partial + size + at, total, mask=kept)
        tl.store(partial + 2 * size + at, slope * LN_2, mask=kept)
        tl.store(partial + 3 * size + at, square, mask=kept)
        tl.store(partial + 4 * size + at, above, mask=kept)


@triton.jit(do_not_specialize=("N", "first"))
def _score_logits_kernel(
    x, bias, target,  # [C, V] [V] int64 [N]
    chosen, partial,  # [N] [5, S, N]
    N, V, first, stride, temperature, softcap,
    SPLIT: tl.constexpr, BLOCK: tl.constexpr, HAS_BIAS: tl.constexpr, SCALED: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Compute what `_score_split_kernel` does for one row and SPLIT entries of its products x; row 0 is row `first`."""
    row, split, splits = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    n = first + row
    token = tl.minimum(tl.maximum(tl.load(target + n), 0), V - 1).to(tl.int32)
    x_row = x + row * stride
    x_target = tl.full([1, 1], 0.0, tl.float32) + tl.load(x_row + token)
    z_target = finish_logits(x_target, bias, token, V, temperature, softcap, 1, HAS_BIAS, SCALED, SOFTCAP)
    z_target = tl.sum(tl.sum(z_target, 1), 0)
    peak = tl.full([1], -float("inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    slope = tl.zeros([1], tl.float32)
    square = tl.zeros([1], tl.float32)
    above = tl.zeros([1], tl.float32)
    for start in range(split * SPLIT, tl.minimum((split + 1) * SPLIT, V), BLOCK):
        v = start + tl.arange(0, BLOCK)
        z = tl.load(x_row + v, mask=v < V, other=0.0)[None, :]
        z = finish_logits(z, bias, start, V, temperature, softcap, BLOCK, HAS_BIAS, SCALED, SOFTCAP)
        above += tl.sum((z > z_target).to(tl.float32), 1)
        peak, total, slope, square = add_logits(z, peak, total, slope, square)
    one = tl.arange(0, 1)
    at = partial + split.to(tl.int64) * N + n + one
    size = splits.to(tl.int64) * N
    tl.store(at, peak)
    tl.store(at + size, total)
    tl.store(at + 2 * size, slope * LN_2)
    tl.store(at + 3 * size, square)
    tl.store(at + 4 * size, above)
    if split == 0:
        tl.store(chosen + n, z_target)


@triton.jit(do_not_specialize=("N", "S"))
def _merge_splits_kernel(
    partial, chosen,  # [5, S, N] [N]
    logprob, logsumexp, entropy, sum_p2, rank,  # [N] each
    N, S,
    ROWS: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    kept = (n < N)[None, :]
    size = tl.cast(S, tl.int64) * N
    highest = tl.full([BLOCK_S, ROWS], -float("inf"), tl.float32)
    for first in range(0, S, BLOCK_S):
        s = first + tl.arange(0, BLOCK_S)
        at = partial + s[:, None].to(tl.int64) * N + n[None, :]
        highest = tl.maximum(highest, tl.load(at, mask=kept & (s < S)[:, None], other=-float("inf")))
    peak = tl.max(highest, 0)
    base = safe_peak(peak)
    total = tl.zeros([BLOCK_S, ROWS], tl.float32)
    slope = tl.zeros([BLOCK_S, ROWS], tl.float32)
    square = tl.zeros([BLOCK_S, ROWS], tl.float32)
    above = tl.zeros([BLOCK_S, ROWS], tl.float32)
    for first in range(0, S, BLOCK_S):
        s = first + tl.arange(0, BLOCK_S)
        at = partial + s[:, None].to(tl.int64) * N + n[None, :]
        read = kept & (s < S)[:, None]
        split_peak = tl.load(at, mask=read, other=-float("inf"))
        split_total = tl.load(at + size, mask=read, other=0.0)
        shift = tl.where(split_peak == -float("inf"), 0.0, split_peak - base[None, :])
        scale = rescale(split_peak, base[None, :])
        total += scale * split_total
        slope += scale * (tl.load(at + 2 * size, mask=read, other=0.0) + shift * split_total)
        square += scale * scale * tl.load(at + 3 * size, mask=read, other=0.0)
        above += tl.load(at + 4 * size, mask=read, other=0.0)
    log_total = tl.log(tl.sum(total, 0))
    # subtracted one after the other: the sum peak + log(total) would lose the low bits of the logarithm
    z = tl.load(chosen + n, mask=n < N, other=0.0)
    tl.store(logprob + n, z - peak - log_total, mask=n < N)
    tl.store(logsumexp + n, peak + log_total, mask=n < N)
    tl.store(entropy + n, log_total - tl.sum(slope, 0) / tl.sum(total, 0), mask=n < N)
    tl.store(sum_p2 + n, tl.sum(square, 0) / (tl.sum(total, 0) * tl.sum(total, 0)), mask=n < N)
    tl.store(rank + n, tl.sum(above, 0).to(tl.int32) + 1, mask=n < N)


def choose_target_tiling(tiles: HeadTiles) -> dict[str, int]:
    """Return the launch options of the kernel that computes the targets' logits, which go with tiles of the head.

    Few rows per program spread the work over the multiprocessors. Elsewhere than on Hopper and later, the tile is large
    enough for the instruction that the large tiles take: the bits must be equal, or a target would rank above itself.
    """
    return {
        "BLOCK_M": min(64, tiles.block_n),
        "BLOCK": 16 if tiles.descriptors else min(64, tiles.block_n, tiles.block_v),
        "BLOCK_D": 128 if tiles.block_d == 64 else tiles.block_d,
        "num_warps": 4,
        "num_stages": min(4, tiles.num_stages),
    }


def score_rows(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    target_N: Tensor,
    bias_V: Tensor | None,
    temperature: float,
    softcap: float | None,
    *,
    launch: HeadLaunch,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return logprob, logsumexp, entropy and sum_p2 (float32 [N]) and rank (int32 [N]) on a CUDA device.

    The host does not wait for the device. A target outside the vocabulary is taken for the nearest id.
    """
    N, V, device = len(hidden_ND), weight_VD.shape[0], hidden_ND.device
    S = -(-V // LOGITS_SPLIT) if launch.library else launch.divide(V)[0]
    partial = torch.empty(5, S, N, dtype=torch.float32, device=device)
    # five tensors: an operator may not return two tensors that share storage
    chosen, logprob, logsumexp, entropy, sum_p2 = (torch.empty(N, dtype=torch.float32, device=device) for _ in range(5))
    rank = torch.empty(N, dtype=torch.int32, device=device)
    add_splits = _score_logits if launch.library else _score_tiles
    add_splits(hidden_ND, weight_VD, target_N, bias_V, temperature, softcap, launch, (chosen, partial))
    _merge_splits_kernel[(-(-N // MERGED_ROWS),)](
        partial, chosen, logprob, logsumexp, entropy, sum_p2, rank, N, S, ROWS=MERGED_ROWS, BLOCK_S=MERGED_SPLITS
    )  # fmt: skip
    return logprob, logsumexp, entropy, sum_p2, rank


def _score_tiles(
    hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor, bias_V: Tensor | None, temperature: float,
    softcap: float | None, launch: HeadLaunch, out: tuple[Tensor, Tensor],
) -> None:  # fmt: skip
    """Write the targets' logits [N] and the partial results [5, S, N] of all splits into out."""
    (N, D), V, tiles = hidden_ND.shape, weight_VD.shape[0], launch.tiles
    S, per_split = launch.divide(V)
    blocks = -(-N // tiles.block_n)
    chosen, partial = out
    bias = bias_V if bias_V is not None else weight_VD
    strides = hidden_ND.stride(0), weight_VD.stride(0)
    shared = {"HAS_BIAS": bias_V is not None, "SOFTCAP": softcap is not None, "INTERPRET": launch.interpret}
    targets = choose_target_tiling(tiles)
    _target_kernel[(-(-N // targets["BLOCK"]),)](
        hidden_ND, weight_VD, bias, target_N, chosen, N, V, D, *strides, temperature, softcap or 1.0,
        **shared, **targets,
    )  # fmt: skip
    _score_split_kernel[(min(launch.programs, blocks * S),)](
        describe(hidden_ND, tiles.block_n, tiles), describe(weight_VD, tiles.block_v, tiles), bias, chosen, partial,
        N, V, D, *strides, per_split, min(launch.group, blocks), temperature, softcap or 1.0,
        BLOCK_N=tiles.block_n, BLOCK_V=tiles.block_v, BLOCK_D=tiles.block_d, DESCRIPTORS=tiles.descriptors,
        SCALED=temperature != 1.0, **shared, num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip


def _score_logits(
    hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor, bias_V: Tensor | None, temperature: float,
    softcap: float | None, launch: HeadLaunch, out: tuple[Tensor, Tensor],
) -> None:  # fmt: skip
    """Do what `_score_tiles` does from the library's products, LOGITS_BYTES of them at a time."""
    N, V = len(hidden_ND), weight_VD.shape[0]
    chosen, partial = out
    rows = max(1, LOGITS_BYTES // (4 * V))
    for first in range(0, N, rows):
        x_CV = multiply_by_library(hidden_ND[first : first + rows], weight_VD)
        _score_logits_kernel[(len(x_CV), partial.shape[1])](
            x_CV, bias_V if bias_V is not None else x_CV, target_N, chosen, partial, N, V, first, x_CV.stride(0),
            temperature, softcap or 1.0, SPLIT=LOGITS_SPLIT, BLOCK=LOGITS_BLOCK, HAS_BIAS=bias_V is not None,
            SCALED=temperature != 1.0, SOFTCAP=softcap is not None, num_warps=8,
        )  # fmt: skip
