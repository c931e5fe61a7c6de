"""Triton kernel of `sample`.

The noise is Gumbel's, from Philox 4x32-10 with the row's key, and the token's id as counter: the same random bits as on
the CPU.

Shapes:  B rows   V vocabulary
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048  # entries of a row that a program holds at once


@triton.jit
def random_bits(key, v):
    """Return the first output word of Philox 4x32-10 (Salmon et al., 2011) with the counter v, uint32, like tl.philox.

    Products in 64 bits are one instruction each; tl.philox takes two for their halves.
    """
    k0, k1 = key.to(tl.uint32), (key >> 32).to(tl.uint32)
    c0 = v.to(tl.uint32)
    c1 = c0 * 0
    c2, c3 = c1, c1
    for _ in tl.static_range(10):
        a = c0.to(tl.uint64) * tl.full([], 0xD2511F53, tl.uint64)
        b = c2.to(tl.uint64) * tl.full([], 0xCD9E8D57, tl.uint64)
        c0 = (b >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (a >> 32).to(tl.uint32) ^ c3 ^ k1
        c1 = b.to(tl.uint32)
        c3 = a.to(tl.uint32)
        k0 += tl.full([], 0x9E3779B9, tl.uint32)
        k1 += tl.full([], 0xBB67AE85, tl.uint32)
    return c0


@triton.jit
def uniform(key, v):
    """Return a number in (0, 1) from the 32 random bits of (key, v), with full precision where it is small."""
    bits = random_bits(key, v)
    return tl.minimum((bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 1.0 - 5.9604644775390625e-8)


@triton.jit
def gumbel(u):
    """Return -log(-log(1 - u)). It is precise for small u, which yield the large noise that decides draws."""
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
                score += gumbel(uniform(seed, v))
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
