"""Triton kernels of `sample` and `linear_sample`.

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

BLOCK = 2048  # entries of a row that a program holds at once


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
def _ordered(z):
    """Return an int32 with the same order as the float32 z."""
    bits = tl.where(z == 0.0, 0.0, z).to(tl.int32, bitcast=True)  # -0 is 0
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _smallest_cut(x, V, temperature, peak, low, high, floor, bound, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """Return the smallest ordered value t in [low, high] such that the entries above t weigh less than bound together.

    An entry weighs 1 (COUNT) or e^(z - peak), and 0 below floor. Every pass tries three cuts and keeps a quarter of the
    range.
    """
    lane = tl.arange(0, BLOCK)
    while low < high:
        step = (high - low) // 4
        a, b, c = low + step, low + 2 * step, low + 3 * step
        cut_a, cut_b, cut_c = a.to(tl.int32), b.to(tl.int32), c.to(tl.int32)
        above_a = tl.zeros([BLOCK], tl.float32)
        above_b = tl.zeros([BLOCK], tl.float32)
        above_c = tl.zeros([BLOCK], tl.float32)
        for start in range(0, V, BLOCK):
            v = start + lane
            z = tl.load(x + v, mask=v < V, other=-float("inf")) / temperature
            key = _ordered(z)
            if COUNT:
                weight = tl.where((v < V) & (key >= floor), 1.0, 0.0)
            else:
                weight = tl.where((v < V) & (key >= floor), tl.exp(z - peak), 0.0)
            above_a += tl.where(key > cut_a, weight, 0.0)
            above_b += tl.where(key > cut_b, weight, 0.0)
            above_c += tl.where(key > cut_c, weight, 0.0)
        fits_a, fits_b, fits_c = tl.sum(above_a, 0) < bound, tl.sum(above_b, 0) < bound, tl.sum(above_c, 0) < bound
        high = tl.where(fits_a, a, tl.where(fits_b, b, tl.where(fits_c, c, high)))
        low = tl.where(fits_a, low, tl.where(fits_b, a + 1, tl.where(fits_c, b + 1, c + 1)))
    return low


@triton.jit
def _sample_kernel(
    logits, key, tokens,  # [B, V] int64 [B] int64 [B]
    V, stride, temperature, top_k, top_p, log_min_p,
    GREEDY: tl.constexpr, TOP_K: tl.constexpr, TOP_P: tl.constexpr, MIN_P: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Draw the token of one row: -1 where the row has a NaN, a +inf or no finite entry."""
    row = tl.program_id(0).to(tl.int64)
    x = logits + row * stride
    seed = tl.load(key + row)
    lane = tl.arange(0, BLOCK)
    highest = tl.full([BLOCK], -float("inf"), tl.float32)
    for start in range(0, V, BLOCK):
        v = start + lane
        z = tl.load(x + v, mask=v < V, other=-float("inf"))
        highest = tl.where((z != z) | (highest != highest), float("nan"), tl.maximum(highest, z))
    broken = tl.sum(((highest != highest) | (highest == float("inf"))).to(tl.int32), 0) > 0
    peak = tl.max(tl.where(highest != highest, -float("inf"), highest), 0) / temperature
    sound = (broken == 0) & (peak > -float("inf")) & (peak < float("inf"))
    if sound:
        high = _ordered(peak)
        floor = _ordered(peak * 0.0 - float("inf"))
        # the search runs in 64 bits: the range of all floats overflows 32
        if TOP_K:
            floor = _smallest_cut(
                x, V, temperature, peak, floor.to(tl.int64), high.to(tl.int64), floor, top_k.to(tl.float32), True, BLOCK
            ).to(tl.int32)
        if TOP_P:
            total = tl.zeros([BLOCK], tl.float32)
            for start in range(0, V, BLOCK):
                v = start + lane
                z = tl.load(x + v, mask=v < V, other=-float("inf")) / temperature
                total += tl.where(_ordered(z) >= floor, tl.exp(z - peak), 0.0)
            floor = _smallest_cut(
                x, V, temperature, peak, floor.to(tl.int64), high.to(tl.int64), floor, top_p * tl.sum(total, 0), False,
                BLOCK,
            ).to(tl.int32)  # fmt: skip
        if MIN_P:
            floor = tl.maximum(floor, _ordered(peak + log_min_p))
        best = tl.full([BLOCK], -float("inf"), tl.float32)
        chosen = tl.zeros([BLOCK], tl.int32)
        for start in range(0, V, BLOCK):
            v = start + lane
            z = tl.load(x + v, mask=v < V, other=-float("inf")) / temperature
            score = z
            if not GREEDY:
                score += _gumbel(seed, v)
            score = tl.where((_ordered(z) >= floor) & (z > -float("inf")), score, -float("inf"))
            chosen = tl.where(score > best, v, chosen)
            best = tl.maximum(best, score)
        top = tl.max(best, 0)
        tl.store(tokens + row, tl.min(tl.where(best == top, chosen, 0x7FFFFFFF), 0).to(tl.int64))
    else:
        tl.store(tokens + row, tl.full([], -1, tl.int64))


def sample_rows(
    logits_BV: Tensor,
    key_B: Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    log_min_p: float,
    *,
    block: int = BLOCK,
) -> Tensor:
    """Draw one token per row of logits, int64 [B]; -1 where a row has a NaN, a +inf or no finite entry."""
    B, V = logits_BV.shape
    tokens = torch.empty(B, dtype=torch.int64, device=logits_BV.device)
    greedy = temperature == 0.0
    _sample_kernel[(B,)](
        logits_BV, key_B, tokens, V, logits_BV.stride(0), 1.0 if greedy else temperature, top_k, top_p, log_min_p,
        GREEDY=greedy, TOP_K=0 < top_k < V and not greedy, TOP_P=top_p < 1.0 and not greedy,
        MIN_P=min_p > 0.0 and not greedy, BLOCK=block, num_warps=8,
    )  # fmt: skip
    return tokens


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
