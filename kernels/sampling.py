"""Draw one token per row of logits with counter-based noise.

    token = argmax_v z_v / temperature + g_v        g_v ~ Gumbel(0, 1), a function of (key of the row, v) alone

The argmax of logits plus Gumbel noise is an exact draw from their softmax. The order of the filters is that of
transformers' logits processors: temperature, then top-k, top-p, min-p; ties at a boundary are kept.

Shapes:  B rows   V vocabulary
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from genssd import _core
from genssd.kernels.logprob import NonFiniteLogits


def sample(
    logits_BV: Tensor,
    key_B: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> Tensor:
    """Return one token id per row, int64 [B].

    logits_BV: float32 raw logits; -inf bans a token. key_B: int64, the 64 bits that the row's noise depends on.
    temperature 0 takes the largest logit (the lowest id of a tie); top_k 0, top_p 1 and min_p 0 filter nothing.
    Raises ValueError on an option outside its range, NonFiniteLogits on a row with a NaN, a +inf or no finite logit.
    """
    check_options(temperature, top_k, top_p, min_p)
    peak_B = logits_BV.amax(dim=1)
    if not bool(peak_B.isfinite().all()):
        row = int((~peak_B.isfinite()).nonzero()[0])
        raise NonFiniteLogits("sample", row)
    if temperature == 0.0:
        return logits_BV.argmax(dim=1)
    z = logits_BV / temperature
    if top_k or top_p < 1.0 or min_p > 0.0:
        z = keep_likely(z, top_k, top_p, min_p)
    return (z + gumbel_noise(key_B, z.shape[1])).argmax(dim=1)


def check_options(temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    """Raise ValueError naming the option that is out of range."""
    if not 0.0 <= temperature < math.inf:
        raise ValueError(f"temperature must be >= 0 and finite, not {temperature}")
    if top_k < 0:
        raise ValueError(f"top_k must be >= 0 (0 keeps all tokens), not {top_k}")
    if not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_p must be in (0, 1], not {top_p}")
    if not 0.0 <= min_p < 1.0:
        raise ValueError(f"min_p must be in [0, 1), not {min_p}")


def keep_likely(z_BV: Tensor, top_k: int, top_p: float, min_p: float) -> Tensor:
    """Set to -inf what top-k, top-p and min-p remove, in that order, each over what the one before left."""
    sorted_BV = z_BV.sort(dim=1, descending=True).values
    kept_BV = torch.ones_like(sorted_BV, dtype=torch.bool)
    if 0 < top_k < z_BV.shape[1]:
        kept_BV &= sorted_BV >= sorted_BV[:, top_k - 1 : top_k]
    if top_p < 1.0:
        p_BV = sorted_BV.masked_fill(~kept_BV, -torch.inf).softmax(dim=1)
        before_BV = p_BV.cumsum(dim=1) - p_BV  # mass of the strictly earlier tokens; the first always stays
        kept_BV &= before_BV < top_p
    # every filter keeps a prefix of the sorted row, so the last kept value is the threshold; ties with it stay
    threshold_B1 = sorted_BV.masked_fill(~kept_BV, torch.inf).amin(dim=1, keepdim=True)
    if min_p > 0.0:
        # p >= min_p * p_max is z >= z_max + log(min_p)
        floor_B1 = sorted_BV[:, :1] + torch.log(torch.tensor(min_p, dtype=z_BV.dtype)).to(z_BV.device)
        threshold_B1 = torch.maximum(threshold_B1, floor_B1)
    return z_BV.masked_fill(z_BV < threshold_B1, -torch.inf)


def gumbel_noise(key_B: Tensor, vocabulary: int) -> Tensor:
    """Gumbel(0, 1) noise, float32 [B, vocabulary]: entry (b, v) depends on (key_B[b], v) alone."""
    if key_B.device.type != "cpu":
        return gumbel_reference(key_B, vocabulary)
    noise = torch.empty(key_B.shape[0], vocabulary)
    _core.gumbel_noise(key_B.contiguous(), noise, torch.get_num_threads())
    return noise


def gumbel_reference(key_B: Tensor, vocabulary: int) -> Tensor:
    """The same noise in plain torch."""
    bits = philox_reference(key_B[:, None], torch.arange(vocabulary, device=key_B.device)[None, :])
    u = (bits.double() + 0.5) * 2.0**-32
    return (-torch.log(-torch.log1p(-u))).float()


def philox_reference(key: Tensor, counter: Tensor) -> Tensor:
    """First output word of Philox 4x32-10 (Salmon et al. 2011), in [0, 2^32). key, counter: int64, broadcast."""
    low = 0xFFFFFFFF
    c0, c1 = counter & low, (counter >> 32) & low
    c2 = c3 = torch.zeros_like(c0)
    k0, k1 = key & low, (key >> 32) & low
    for _ in range(10):
        # the product of two 32-bit words wraps in int64, but its 64 bits are right
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = ((b >> 32) & low) ^ c1 ^ k0, b & low, ((a >> 32) & low) ^ c3 ^ k1, a & low
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return c0
