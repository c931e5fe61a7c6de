"""Triton functions of the noise of draws.

The noise is Gumbel's, from Philox 4x32-10 with the row's key: the same random bits as on the CPU. All four words of a
counter are used: token v takes word v // 16 % 4 of the counter v // 64 * 16 + v % 16.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def random_words(key, counter):
    """Return the four output words of Philox 4x32-10 (Salmon et al., 2011), uint32, like tl.philox.

    Products in 64 bits are one instruction each; tl.philox takes two for their halves.
    """
    k0, k1 = key.to(tl.uint32), (key >> 32).to(tl.uint32)
    c0 = counter.to(tl.uint32)
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
    return c0, c1, c2, c3


@triton.jit
def place_tokens(start, c, word: tl.constexpr):
    """Return the tokens that take a word of the counters start // 4 + c, which serve the tokens from start on.

    start: a multiple of 64. The four words of n counters, a multiple of 16, serve 4 n consecutive tokens.
    """
    return start + c // 16 * 64 + word * 16 + c % 16


@triton.jit
def to_uniform(bits):
    """Return numbers in (0, 1) from 32 random bits each, with full precision where they are small."""
    return tl.minimum((bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 1.0 - 5.9604644775390625e-8)


@triton.jit
def uniform(key, v):
    """Return the number in (0, 1) of (key, token v), for tokens in any order: one of four words that are computed."""
    c0, c1, c2, c3 = random_words(key, v // 64 * 16 + v % 16)
    word = v // 16 % 4
    return to_uniform(tl.where(word == 0, c0, tl.where(word == 1, c1, tl.where(word == 2, c2, c3))))


@triton.jit
def gumbel(u):
    """Return -log(-log(1 - u)). It is precise for small u, which yield the large noise that decides draws."""
    w = 1.0 - u
    # Kahan's log1p: the quotient corrects the rounding error of 1 - u
    t = tl.where(w == 1.0, u, -tl.log(w) * (u / tl.where(w == 1.0, 1.0, 1.0 - w)))
    return -tl.log(t)
