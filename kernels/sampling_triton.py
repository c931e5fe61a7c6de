"""Triton kernels of `linear_sample`; those of `sample` are in filter_triton.py.

The noise is Gumbel's, from Philox 4x32-10 with the row's key, and the token's id as counter: the same random bits as on
the CPU.

Shapes:  B rows   V vocabulary   D model width   S splits
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from genssd.kernels.head_triton import HeadLaunch, logits_tile, rescale, safe_peak
from genssd.kernels.logprob_triton import divide_vocabulary


@triton.jit
def _gumbel(key, v):
    """Return -log(-log(1 - u)) with u in (0, 1) from the 32 random bits of (key, v).

    It is precise for small u, which yield the large noise that decides draws.
    """
    zero = v * 0
    bits, _, _, _ = tl.philox(key, v, zero, zero, zero)
    u = tl.minimum((bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 1.0 - 5.9604644775390625e-8)
    w = 1.0 - u
    # Kahan's log1p: the quotient corrects the rounding error of 1 - u
    t = tl.where(w == 1.0, u, -tl.log(w) * (u / tl.where(w == 1.0, 1.0, 1.0 - w)))
    return -tl.log(t)


@triton.jit
def _draw_split_kernel(
    hidden, weight, bias, key,  # [B, D] [V, D] [V] int64 [B]
    partial, winner,  # [4, S, B] int32 [S, B]
    B, V, D, vocabulary, stride_b, stride_v, tiles_per_split, temperature, softcap,
    GREEDY: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """Compute, for every row and split, the peak and sum of the softmax, the best noisy logit, its token and logit."""
    blocks = tl.cdiv(B, BLOCK)
    splits = tl.cdiv(tl.cdiv(V, BLOCK), tiles_per_split)
    lane = tl.arange(0, BLOCK)
    for task in range(tl.program_id(0), blocks * splits, tl.num_programs(0)):
        split = task // blocks
        n = ((task % blocks) * BLOCK + lane).to(tl.int64)
        seed = tl.load(key + n, mask=n < B, other=0)
        peak = tl.full([BLOCK], -float("inf"), tl.float32)
        total = tl.zeros([BLOCK], tl.float32)
        best = tl.full([BLOCK], -float("inf"), tl.float32)
        token = tl.zeros([BLOCK], tl.int32)
        z_token = tl.zeros([BLOCK], tl.float32)
        for tile in range(split * tiles_per_split, tl.minimum((split + 1) * tiles_per_split, tl.cdiv(V, BLOCK))):
            v = tile * BLOCK + lane
            z = logits_tile(
                hidden, weight, bias, n, v.to(tl.int64), B, V, D, stride_b, stride_v, 1.0, softcap,
                BLOCK, BLOCK_D, HAS_BIAS, SOFTCAP, INTERPRET,
            )  # fmt: skip
            z = tl.where(v[None, :] < V, z, -float("inf"))
            new_peak = tl.maximum(peak, tl.max(z, 1))
            base = safe_peak(new_peak)
            total = rescale(peak, base) * total + tl.sum(tl.exp(z - base[:, None]), 1)
            peak = new_peak
            if GREEDY:
                score = z
            else:
                score = z / temperature + _gumbel(seed[:, None], v[None, :] + tl.zeros([BLOCK, BLOCK], tl.int32))
            score = tl.where((v[None, :] < vocabulary) & (z > -float("inf")), score, -float("inf"))
            highest = tl.max(score, 1)
            first = tl.min(tl.where(score == highest[:, None], lane[None, :], BLOCK), 1)
            better = highest > best
            token = tl.where(better, tile * BLOCK + first, token)
            z_token = tl.where(better, tl.sum(tl.where(lane[None, :] == first[:, None], z, 0.0), 1), z_token)
            best = tl.where(better, highest, best)
        kept = n < B
        at = split * B + n
        tl.store(partial + at, peak, mask=kept)
        tl.store(partial + splits * B + at, total, mask=kept)
        tl.store(partial + 2 * splits * B + at, best, mask=kept)
        tl.store(partial + 3 * splits * B + at, z_token, mask=kept)
        tl.store(winner + at, token, mask=kept)


@triton.jit
def _draw_merge_kernel(
    partial, winner,  # [4, S, B] int32 [S, B]
    tokens, logprob,  # int64 [B] [B]
    B, S, BLOCK: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    kept = n < B
    peak = tl.full([BLOCK], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    best = tl.full([BLOCK], -float("inf"), tl.float32)
    token = tl.full([BLOCK], -1, tl.int32)
    z_token = tl.zeros([BLOCK], tl.float32)
    for split in range(0, S):
        at = partial + split * B + n
        split_peak = tl.load(at, mask=kept, other=0.0)
        split_total = tl.load(at + S * B, mask=kept, other=1.0)
        split_best = tl.load(at + 2 * S * B, mask=kept, other=0.0)
        base = safe_peak(tl.maximum(peak, split_peak))
        total = rescale(peak, base) * total + rescale(split_peak, base) * split_total
        peak = tl.maximum(peak, split_peak)
        better = split_best > best
        token = tl.where(better, tl.load(winner + split * B + n, mask=kept, other=0), token)
        z_token = tl.where(better, tl.load(at + 3 * S * B, mask=kept, other=0.0), z_token)
        best = tl.where(better, split_best, best)
    lse = peak + tl.log(total)
    # a NaN or an infinity anywhere in the row has reached its log-sum-exp
    sound = (lse == lse) & (lse > -float("inf")) & (lse < float("inf"))
    tl.store(tokens + n, tl.where(sound, token, -1).to(tl.int64), mask=kept)
    tl.store(logprob + n, z_token - lse, mask=kept)


def draw_rows(
    hidden_BD: Tensor,
    weight_VD: Tensor,
    key_B: Tensor,
    bias_V: Tensor | None,
    temperature: float,
    softcap: float | None,
    vocabulary: int,
    *,
    launch: HeadLaunch,
) -> tuple[Tensor, Tensor]:
    """Draw tokens from a head: int64 [B], -1 where the logits are not finite, and log-probabilities, float32 [B]."""
    B, D = hidden_BD.shape
    V, tiles, device = weight_VD.shape[0], launch.tiles, hidden_BD.device
    S, per_split = divide_vocabulary(V, tiles.block)
    partial = torch.empty(4, S, B, dtype=torch.float32, device=device)
    winner = torch.empty(S, B, dtype=torch.int32, device=device)
    tokens = torch.empty(B, dtype=torch.int64, device=device)
    logprob = torch.empty(B, dtype=torch.float32, device=device)
    _draw_split_kernel[(min(launch.programs, -(-B // tiles.block) * S),)](
        hidden_BD, weight_VD, bias_V if bias_V is not None else weight_VD, key_B, partial, winner,
        B, V, D, vocabulary, hidden_BD.stride(0), weight_VD.stride(0), per_split, temperature or 1.0, softcap or 1.0,
        GREEDY=temperature == 0.0, BLOCK=tiles.block, BLOCK_D=tiles.block_d, HAS_BIAS=bias_V is not None,
        SOFTCAP=softcap is not None, INTERPRET=launch.interpret, num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )  # fmt: skip
    _draw_merge_kernel[(-(-B // 128),)](partial, winner, tokens, logprob, B, S, BLOCK=128)
    return tokens, logprob
