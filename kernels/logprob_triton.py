"""Triton kernels of `linear_logprob`: one pass over the head for a block of rows.

A program takes a block of rows and one split of the vocabulary, walks the split's tiles in order, and keeps for each
row

    peak = max z        total = sum e^(z - peak)        slope = sum (z - peak) e^(z - peak)
    square = sum e^2(z - peak)        above = number of z > z[target]

Another kernel merges the splits in order. The boundaries of splits and tiles depend on the vocabulary alone, every
product is added up in the same order with the same instruction, and no operation is atomic: a row's bits depend on that
row alone. A first kernel computes the targets' logits: it multiplies each block of rows with the weights of the block's
own targets and keeps the diagonal. It uses the same tile function, so comparing logits with them yields exact ranks.

Shapes:  N rows   V vocabulary   D model width   S splits
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from genssd.kernels.head_triton import HeadLaunch, logits_tile, rescale, safe_peak

SPLITS = 128
"""Number of splits of the vocabulary: about one per multiprocessor of a large GPU, so that all of them read weights
even for a few rows."""


@triton.jit
def _target_kernel(
    hidden, weight, bias, target,  # [N, D] [V, D] [V] int64 [N]
    chosen,  # [N]
    N, V, D, stride_n, stride_v, temperature, softcap,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    lane = tl.arange(0, BLOCK)
    n = tl.program_id(0).to(tl.int64) * BLOCK + lane
    token = tl.load(target + n, mask=n < N, other=0)
    z = logits_tile(
        hidden, weight, bias, n, token, N, V, D, stride_n, stride_v, temperature, softcap,
        BLOCK, BLOCK_D, HAS_BIAS, SOFTCAP, INTERPRET,
    )  # fmt: skip
    tl.store(chosen + n, tl.sum(tl.where(lane[:, None] == lane[None, :], z, 0.0), 1), mask=n < N)


@triton.jit
def _score_split_kernel(
    hidden, weight, bias, target, chosen,  # [N, D] [V, D] [V] int64 [N] [N]
    partial,  # [5, S, N]
    N, V, D, stride_n, stride_v, tiles_per_split, temperature, softcap,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(N, BLOCK)
    splits = tl.cdiv(tl.cdiv(V, BLOCK), tiles_per_split)
    lane = tl.arange(0, BLOCK)
    # neighbouring programs take the same split, so its weights are read from memory once, then from the L2 cache
    for task in range(tl.program_id(0), blocks * splits, tl.num_programs(0)):
        split = task // blocks
        n = ((task % blocks) * BLOCK + lane).to(tl.int64)
        token = tl.load(target + n, mask=n < N, other=0)
        z_target = tl.load(chosen + n, mask=n < N, other=0.0)
        peak = tl.full([BLOCK], -float("inf"), tl.float32)
        total = tl.zeros([BLOCK], tl.float32)
        slope = tl.zeros([BLOCK], tl.float32)
        square = tl.zeros([BLOCK], tl.float32)
        above = tl.zeros([BLOCK], tl.float32)
        for tile in range(split * tiles_per_split, tl.minimum((split + 1) * tiles_per_split, tl.cdiv(V, BLOCK))):
            v = (tile * BLOCK + lane).to(tl.int64)
            z = logits_tile(
                hidden, weight, bias, n, v, N, V, D, stride_n, stride_v, temperature, softcap,
                BLOCK, BLOCK_D, HAS_BIAS, SOFTCAP, INTERPRET,
            )  # fmt: skip
            z = tl.where(v[None, :] < V, z, -float("inf"))
            above += tl.sum(((z > z_target[:, None]) & (v[None, :] != token[:, None])).to(tl.float32), 1)
            new_peak = tl.maximum(peak, tl.max(z, 1))
            base = safe_peak(new_peak)
            scale = rescale(peak, base)
            shift = tl.where(peak == -float("inf"), 0.0, peak - base)
            away = z - base[:, None]
            e = tl.exp(away)
            # 0 * -inf would be NaN: an entry of probability 0 must add 0
            slope = scale * (slope + shift * total) + tl.sum(tl.where(e > 0.0, away * e, 0.0), 1)
            total = scale * total + tl.sum(e, 1)
            square = scale * scale * square + tl.sum(e * e, 1)
            peak = new_peak

        kept = n < N
        at = split * N + n
        tl.store(partial + at, peak, mask=kept)
        tl.store(partial + splits * N + at, total, mask=kept)
        tl.store(partial + 2 * splits * N + at, slope, mask=kept)
        tl.store(partial + 3 * splits * N + at, square, mask=kept)
        tl.store(partial + 4 * splits * N + at, above, mask=kept)


@triton.jit
def _merge_splits_kernel(
    partial, chosen,  # [5, S, N] [N]
    logprob, logsumexp, entropy, sum_p2, rank,  # [N] each
    N, S,
    BLOCK: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    kept = n < N
    peak = tl.full([BLOCK], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    slope = tl.zeros([BLOCK], tl.float32)
    square = tl.zeros([BLOCK], tl.float32)
    above = tl.zeros([BLOCK], tl.float32)
    for split in range(0, S):
        at = partial + split * N + n
        split_peak = tl.load(at, mask=kept, other=0.0)
        split_total = tl.load(at + S * N, mask=kept, other=1.0)
        split_slope = tl.load(at + 2 * S * N, mask=kept, other=0.0)
        split_square = tl.load(at + 3 * S * N, mask=kept, other=0.0)
        above += tl.load(at + 4 * S * N, mask=kept, other=0.0)
        new_peak = tl.maximum(peak, split_peak)
        base = safe_peak(new_peak)
        shift = tl.where(peak == -float("inf"), 0.0, peak - base)
        split_shift = tl.where(split_peak == -float("inf"), 0.0, split_peak - base)
        a, b = rescale(peak, base), rescale(split_peak, base)
        slope = a * (slope + shift * total) + b * (split_slope + split_shift * split_total)
        total = a * total + b * split_total
        square = a * a * square + b * b * split_square
        peak = new_peak
    # subtracted one after the other: the sum peak + log(total) would lose the low bits of the logarithm
    tl.store(logprob + n, tl.load(chosen + n, mask=kept, other=0.0) - peak - tl.log(total), mask=kept)
    tl.store(logsumexp + n, peak + tl.log(total), mask=kept)
    tl.store(entropy + n, tl.log(total) - slope / total, mask=kept)
    tl.store(sum_p2 + n, square / (total * total), mask=kept)
    tl.store(rank + n, above.to(tl.int32) + 1, mask=kept)


def divide_vocabulary(vocabulary: int, block: int) -> tuple[int, int]:
    """Return the number of splits and of tiles per split, which depend on the vocabulary and the tile size alone."""
    tiles = -(-vocabulary // block)
    per_split = -(-tiles // SPLITS)
    return -(-tiles // per_split), per_split


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

    Targets must lie in the vocabulary.
    """
    N, D = hidden_ND.shape
    V, tiles, device = weight_VD.shape[0], launch.tiles, hidden_ND.device
    S, per_split = divide_vocabulary(V, tiles.block)
    blocks = -(-N // tiles.block)
    partial = torch.empty(5, S, N, dtype=torch.float32, device=device)
    # five tensors: an operator may not return two tensors that share storage
    chosen, logprob, logsumexp, entropy, sum_p2 = (torch.empty(N, dtype=torch.float32, device=device) for _ in range(5))
    rank = torch.empty(N, dtype=torch.int32, device=device)
    bias = bias_V if bias_V is not None else weight_VD
    strides = hidden_ND.stride(0), weight_VD.stride(0)
    options = {
        "BLOCK": tiles.block,
        "BLOCK_D": tiles.block_d,
        "HAS_BIAS": bias_V is not None,
        "SOFTCAP": softcap is not None,
        "INTERPRET": launch.interpret,
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
    }
    _target_kernel[(blocks,)](
        hidden_ND, weight_VD, bias, target_N, chosen, N, V, D, *strides, temperature, softcap or 1.0, **options
    )
    _score_split_kernel[(min(launch.programs, blocks * S),)](
        hidden_ND, weight_VD, bias, target_N, chosen, partial,
        N, V, D, *strides, per_split, temperature, softcap or 1.0, **options,
    )  # fmt: skip
    _merge_splits_kernel[(-(-N // 128),)](
        partial, chosen, logprob, logsumexp, entropy, sum_p2, rank, N, S, BLOCK=128
    )  # fmt: skip
    return logprob, logsumexp, entropy, sum_p2, rank
