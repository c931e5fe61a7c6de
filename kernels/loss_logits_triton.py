"""Triton kernels that write the logits of a chunk of rows for a loss, and take the normalizers of its softmax with it.

The product of tiles is that of scoring (head_triton.py). A program takes a block of rows and one split of the
vocabulary, writes each tile of logits, and keeps the peak and the sum of the softmax while the tile is in its
registers; another kernel merges the splits. The pass that computes the loss then need not read the logits for them.
Boundaries of splits and tiles do not depend on the rows, and no operation is atomic.

Shapes:  C rows of a chunk   V vocabulary   D model width   S splits
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from genssd.kernels.head_triton import (
    HeadLaunch,
    describe,
    finish_logits,
    multiply_tile,
    place_of,
    rescale,
    safe_peak,
)

LOG2_E = tl.constexpr(1.4426950408889634)
MERGED_ROWS = 8  # rows that a merging program takes
MERGED_SPLITS = 64  # splits that it reads at once


# code specialised on the number of rows might round differently
@triton.jit(do_not_specialize=("C", "tiles_per_split", "group"))
def _write_kernel(
    hidden, weight,  # [C, D] [V, D]
    x, partial,  # [C, V] [2, S, C]
    C, V, D, stride_n, stride_v, stride_x, tiles_per_split, group, scale, softcap,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, DESCRIPTORS: tl.constexpr,
    SOFTCAP: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Write capped logits, and for each row and split their peak and the sum of e^(scale (logit - peak))."""
    blocks, tiles = tl.cdiv(C, BLOCK_N), tl.cdiv(V, BLOCK_V)
    splits = tl.cdiv(tiles, tiles_per_split)
    for task in range(tl.program_id(0), blocks * splits, tl.num_programs(0)):
        split, block = place_of(task, blocks, splits, group)
        n = block * BLOCK_N + tl.arange(0, BLOCK_N)
        # the places in a block of rows fit 32 bits, and take half of the registers of 64
        x_block = x + (block * BLOCK_N).to(tl.int64) * stride_x
        x_rows = tl.arange(0, BLOCK_N)[:, None] * stride_x
        peak = tl.full([BLOCK_N], -float("inf"), tl.float32)
        total = tl.zeros([BLOCK_N], tl.float32)
        for tile in range(split * tiles_per_split, tl.minimum((split + 1) * tiles_per_split, tiles)):
            v_first = tile * BLOCK_V
            z = multiply_tile(
                hidden, weight, block * BLOCK_N, v_first, C, V, D, stride_n, stride_v,
                BLOCK_N, BLOCK_V, BLOCK_D, DESCRIPTORS, INTERPRET,
            )  # fmt: skip
            z = finish_logits(z, x, v_first, V, 1.0, softcap, BLOCK_V, False, False, SOFTCAP)
            v = v_first + tl.arange(0, BLOCK_V)
            tl.store(x_block + (x_rows + v[None, :]), z, mask=(n < C)[:, None] & (v < V)[None, :])
            new_peak = tl.maximum(peak, tl.max(z, 1))
            base = safe_peak(new_peak)
            # a NaN does not reach the peak, but it stays in the sum
            total = total * rescale(peak * scale, base * scale)
            total += tl.sum(tl.exp2((z - base[:, None]) * (scale * LOG2_E)), 1)
            peak = new_peak
        at = split.to(tl.int64) * C + n
        tl.store(partial + at, peak, mask=n < C)
        tl.store(partial + splits.to(tl.int64) * C + at, total, mask=n < C)


@triton.jit(do_not_specialize=("C", "S"))
def _merge_kernel(
    partial, normalizer,  # [2, S, C] [C, 2]
    C, S, scale, ROWS: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    highest = tl.full([BLOCK_S, ROWS], -float("inf"), tl.float32)
    for first in range(0, S, BLOCK_S):
        s = first + tl.arange(0, BLOCK_S)
        at = partial + s[:, None].to(tl.int64) * C + n[None, :]
        highest = tl.maximum(highest, tl.load(at, mask=(n < C)[None, :] & (s < S)[:, None], other=-float("inf")))
    base = safe_peak(tl.max(highest, 0))
    total = tl.zeros([BLOCK_S, ROWS], tl.float32)
    for first in range(0, S, BLOCK_S):
        s = first + tl.arange(0, BLOCK_S)
        at = partial + s[:, None].to(tl.int64) * C + n[None, :]
        read = (n < C)[None, :] & (s < S)[:, None]
        peak = tl.load(at, mask=read, other=-float("inf"))
        split_total = tl.load(at + tl.cast(S, tl.int64) * C, mask=read, other=0.0)
        total += rescale(peak * scale, base[None, :] * scale) * split_total
    tl.store(normalizer + 2 * n, base * scale, mask=n < C)
    tl.store(normalizer + 2 * n + 1, tl.log(tl.sum(total, 0)), mask=n < C)


def write_normalized_logits(
    hidden_CD: Tensor,
    weight_VD: Tensor,
    out_CV: Tensor,
    temperature: float,
    softcap: float | None,
    *,
    launch: HeadLaunch,
) -> Tensor:
    """Write the logits at temperature 1, capped by softcap, into out, float32, and return their normalizers [C, 2].

    normalizer: m and s with log sum_v e^z_v = m + s for the logits z at the temperature, float32; see
    `rows_triton.row_normalizer`, which computes the same from written logits. A row with a NaN or +inf has s = NaN.
    """
    (C, D), V, tiles = hidden_CD.shape, len(weight_VD), launch.tiles
    S, per_split = launch.divide(V)
    blocks = -(-C // tiles.block_n)
    partial = torch.empty(2, S, C, dtype=torch.float32, device=out_CV.device)
    normalizer_C2 = torch.empty(C, 2, dtype=torch.float32, device=out_CV.device)
    _write_kernel[(min(launch.programs, blocks * S),)](
        describe(hidden_CD, tiles.block_n, tiles), describe(weight_VD, tiles.block_v, tiles), out_CV, partial,
        C, V, D, hidden_CD.stride(0), weight_VD.stride(0), out_CV.stride(0), per_split, min(launch.group, blocks),
        1.0 / temperature, softcap or 1.0,
        BLOCK_N=tiles.block_n, BLOCK_V=tiles.block_v, BLOCK_D=tiles.block_d, DESCRIPTORS=tiles.descriptors,
        SOFTCAP=softcap is not None, INTERPRET=launch.interpret, num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )  # fmt: skip
    _merge_kernel[(-(-C // MERGED_ROWS),)](
        partial, normalizer_C2, C, S, 1.0 / temperature, ROWS=MERGED_ROWS, BLOCK_S=MERGED_SPLITS
    )
    return normalizer_C2
