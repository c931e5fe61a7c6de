"""Triton functions of the noise of draws.

The noise is Gumbel's, from Philox 4x32-10 with the row's key, and the token's id as counter: the same random bits as on
the CPU.
"""

from __future__ import annotations

import triton
import triton.language as tl


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
