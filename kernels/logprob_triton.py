"""The Triton kernels behind `linear_logprob`: one pass over the head for a block of rows.

A program takes a block of rows and one split of the vocabulary, walks the split's tiles in order, and keeps for each
row

    peak = max z        total = sum e^(z - peak)        slope = sum (z - peak) e^(z - peak)
    square = sum e^2(z - peak)        above = number of z > z[target]

A second kernel merges the splits in order. The boundaries of splits and tiles depend on the vocabulary alone, every
product is added up in the same order with the same instruction, and nothing is atomic: a row's bits depend on that row
alone. The target's logit comes from a tile of its own, rows by rows, of which the diagonal is kept: the same product,
added up in the same order as in the vocabulary's tiles, so that comparing with it counts ranks exactly.

Shapes:  N rows   V vocabulary   D model width   S splits
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

SPLITS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiles:
    """Sizes of one configuration of the kernel. block: rows and vocabulary entries of a tile (the same, see above)."""

    block: int
    block_d: int
    num_warps: int
    num_stages: int


HALF_HOPPER = Tiles(block=128, block_d=64, num_warps=8, num_stages=3)
HALF_AMPERE = Tiles(block=128, block_d=32, num_warps=8, num_stages=4)  # with 64, the addresses spill registers
HALF_AMD = Tiles(block=128, block_d=32, num_warps=8, num_stages=2)  # 64 KiB of local memory
SINGLE = Tiles(block=64, block_d=32, num_warps=4, num_stages=2)


def tiles_for(dtype: torch.dtype, *, amd: bool, capability: int) -> Tiles:
    """The configuration that ships for a dtype. capability: NVIDIA's, 80 for sm_80; without meaning on AMD."""
    if dtype == torch.float32:
        return SINGLE
    if amd:
        return HALF_AMD
    return HALF_HOPPER if capability >= 90 else HALF_AMPERE


@triton.jit
def _logits_tile(
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
    if SOFTCAP:
        z = softcap * (1.0 - 2.0 / (tl.exp(2.0 * z / softcap) + 1.0))
    return z / temperature


@triton.jit
def _score_split_kernel(
    hidden, weight, bias, target,  # [N, D] [V, D] [V] int64 [N]
    partial, chosen,  # [5, S, N] [N]
    N, V, D, stride_n, stride_v, tiles_per_split, temperature, softcap,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(N, BLOCK)
    splits = tl.cdiv(tl.cdiv(V, BLOCK), tiles_per_split)
    lane = tl.arange(0, BLOCK)
    # neighbouring programs share a split, so its weights are read from memory once and from the cache after
    for task in range(tl.program_id(0), blocks * splits, tl.num_programs(0)):
        split = task // blocks
        n = ((task % blocks) * BLOCK + lane).to(tl.int64)
        token = tl.load(target + n, mask=n < N, other=0)
        own = _logits_tile(
            hidden, weight, bias, n, token, N, V, D, stride_n, stride_v, temperature, softcap,
            BLOCK, BLOCK_D, HAS_BIAS, SOFTCAP, INTERPRET,
        )  # fmt: skip
        z_target = tl.sum(tl.where(lane[:, None] == lane[None, :], own, 0.0), 1)

        peak = tl.full([BLOCK], -float("inf"), tl.float32)
        total = tl.zeros([BLOCK], tl.float32)
        slope = tl.zeros([BLOCK], tl.float32)
        square = tl.zeros([BLOCK], tl.float32)
        above = tl.zeros([BLOCK], tl.float32)
        for tile in range(split * tiles_per_split, tl.minimum((split + 1) * tiles_per_split, tl.cdiv(V, BLOCK))):
            v = (tile * BLOCK + lane).to(tl.int64)
            z = _logits_tile(
                hidden, weight, bias, n, v, N, V, D, stride_n, stride_v, temperature, softcap,
                BLOCK, BLOCK_D, HAS_BIAS, SOFTCAP, INTERPRET,
            )  # fmt: skip
            z = tl.where(v[None, :] < V, z, -float("inf"))
            above += tl.sum(((z > z_target[:, None]) & (v[None, :] != token[:, None])).to(tl.float32), 1)
            new_peak = tl.maximum(peak, tl.max(z, 1))
            # while all is -inf, differences from the peak would be NaN
            base = tl.where(new_peak == -float("inf"), 0.0, new_peak)
            shift = tl.where(peak == -float("inf"), 0.0, peak - base)
            scale = tl.where(peak == -float("inf"), 0.0, tl.exp(shift))
            away = z - base[:, None]
            e = tl.exp(away)
            # 0 * -inf is NaN: an entry without probability adds nothing
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
        tl.store(chosen + n, z_target, mask=kept & (lane * 0 + split == 0))


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
        their_peak = tl.load(at, mask=kept, other=0.0)
        their_total = tl.load(at + S * N, mask=kept, other=1.0)
        their_slope = tl.load(at + 2 * S * N, mask=kept, other=0.0)
        their_square = tl.load(at + 3 * S * N, mask=kept, other=0.0)
        above += tl.load(at + 4 * S * N, mask=kept, other=0.0)
        new_peak = tl.maximum(peak, their_peak)
        base = tl.where(new_peak == -float("inf"), 0.0, new_peak)
        ours = tl.where(peak == -float("inf"), 0.0, peak - base)
        theirs = tl.where(their_peak == -float("inf"), 0.0, their_peak - base)
        a = tl.where(peak == -float("inf"), 0.0, tl.exp(ours))
        b = tl.where(their_peak == -float("inf"), 0.0, tl.exp(theirs))
        slope = a * (slope + ours * total) + b * (their_slope + theirs * their_total)
        total = a * total + b * their_total
        square = a * a * square + b * b * their_square
        peak = new_peak
    lse = peak + tl.log(total)
    tl.store(logprob + n, tl.load(chosen + n, mask=kept, other=0.0) - lse, mask=kept)
    tl.store(logsumexp + n, lse, mask=kept)
    tl.store(entropy + n, tl.log(total) - slope / total, mask=kept)
    tl.store(sum_p2 + n, square / (total * total), mask=kept)
    tl.store(rank + n, above.to(tl.int32) + 1, mask=kept)


def splits_of(vocabulary: int, block: int) -> tuple[int, int]:
    """Splits and tiles per split: a function of the vocabulary alone."""
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
    programs: int,
    tiles: Tiles,
    interpret: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """logprob, logsumexp, entropy, sum_p2 (float32 [N]) and rank (int32 [N]). Targets must lie in the vocabulary.

    programs: how many run at once; the result does not depend on it.
    """
    N, D = hidden_ND.shape
    V = weight_VD.shape[0]
    S, per_split = splits_of(V, tiles.block)
    device = hidden_ND.device
    partial = torch.empty(5, S, N, dtype=torch.float32, device=device)
    chosen, logprob, logsumexp, entropy, sum_p2 = torch.empty(5, N, dtype=torch.float32, device=device)
    rank = torch.empty(N, dtype=torch.int32, device=device)
    grid = (min(programs, -(-N // tiles.block) * S),)
    _score_split_kernel[grid](
        hidden_ND, weight_VD, bias_V if bias_V is not None else weight_VD, target_N, partial, chosen,
        N, V, D, hidden_ND.stride(0), weight_VD.stride(0), per_split, temperature, softcap or 1.0,
        BLOCK=tiles.block, BLOCK_D=tiles.block_d, HAS_BIAS=bias_V is not None, SOFTCAP=softcap is not None,
        INTERPRET=interpret, num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip
    _merge_splits_kernel[(-(-N // 128),)](
        partial, chosen, logprob, logsumexp, entropy, sum_p2, rank, N, S, BLOCK=128
    )  # fmt: skip
    return logprob, logsumexp, entropy, sum_p2, rank
