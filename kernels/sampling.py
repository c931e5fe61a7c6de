"""Sampling of one token per row with counter-based noise, from logits or directly from a head.

    token = argmax_v z_v / temperature + g_v        g_v ~ Gumbel(0, 1), a function of (key of the row, v) alone

The argmax of logits plus Gumbel noise is an exact draw from their softmax. The order of the filters is that of
transformers' logits processors: temperature, then top-k, top-p, min-p; ties at a boundary are kept. Without filters the
logits need not be stored: `linear_sample` draws while it computes them.

Shapes:  B rows   V vocabulary   D model width
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from genssd import _core
from genssd.kernels.head import check_head, check_positive, iter_slices, row_logsumexp, squash
from genssd.kernels.linear import linear
from genssd.kernels.logprob import LOGITS_BYTES, NonFiniteLogits
from genssd.kernels.native import detach, has_native_kernels, runs_natively
from genssd.kernels.options import check_options
from genssd.kernels.threads import num_threads
from genssd.kernels.weight import PackedWeight, Weight, cells_of


class Draw(NamedTuple):
    """Tokens drawn from a head."""

    tokens: Tensor
    """The token of every row, int64 [B]."""
    logprob: Tensor
    """Log-probability of every token at temperature 1, float32 [B]."""


def sample(
    logits_BV: Tensor,
    key_B: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    checked: bool = True,
) -> Tensor:
    """Draw one token id per row from softmax(logits / temperature) after the filters; return int64 [B].

    logits_BV: float32, before temperature; -inf bans a token. key_B: int64, the 64 bits that the row's noise depends
    on. temperature 0 takes the largest logit (of a tie, the one with the lowest id); top_k 0, top_p 1 and min_p 0 are
    no filters. Raises ValueError on an option out of range and, where checked, NonFiniteLogits on a row with a NaN, a
    +inf or no finite logit. Without checked the host does not wait for the device, and such a row gets the token -1.
    """
    check_options(temperature, top_k, top_p, min_p)
    if logits_BV.ndim != 2 or key_B.shape != logits_BV.shape[:1] or key_B.dtype != torch.int64:
        raise ValueError(
            f"sample: logits {tuple(logits_BV.shape)} must be [B, V] and key int64 [B], not {key_B.dtype} "
            f"{tuple(key_B.shape)}"
        )
    tokens: Tensor = _sample(logits_BV, key_B, temperature, top_k, top_p, min_p)
    if checked:
        _require_drawn("sample", tokens)
    return tokens


def linear_sample(
    hidden_BD: Tensor,
    weight_VD: Weight,
    key_B: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    vocabulary: int | None = None,
    checked: bool = True,
) -> Draw:
    """Draw one token per row from softmax(z / temperature) without storing the head's logits z (see head.py).

    The tokens equal those of `sample` on these logits. key_B: int64, the 64 bits that the row's noise depends on.
    vocabulary: only ids below it are drawn, because the rest of the head is padding; the log-probability counts the
    full head. Raises ValueError on shapes that do not agree and on an option out of range and, where checked,
    NonFiniteLogits on a row with a NaN, a +inf or no finite logit. Without checked the host does not wait for the
    device, and such a row gets the token -1 and the log-probability NaN.
    """
    check_head("linear_sample", hidden_BD, weight_VD)
    check_options(temperature, 0, 1.0, 0.0)
    check_positive("linear_sample", softcap=softcap)
    V = weight_VD.shape[0]
    if key_B.shape != hidden_BD.shape[:1] or key_B.dtype != torch.int64:
        raise ValueError(
            f"linear_sample: key must be int64 [{hidden_BD.shape[0]}], not {key_B.dtype} {tuple(key_B.shape)}"
        )
    if bias is not None and bias.shape != weight_VD.shape[:1]:
        raise ValueError(f"linear_sample: bias must be [{V}], not {tuple(bias.shape)}")
    if vocabulary is not None and not 0 < vocabulary <= V:
        raise ValueError(f"linear_sample: vocabulary must be in 1..{V}, not {vocabulary}")
    options = (key_B, bias, temperature, softcap, vocabulary or V)
    if isinstance(weight_VD, PackedWeight):
        draw = Draw(*_draw_natively(hidden_BD.contiguous(), weight_VD, *options))
    else:
        draw = Draw(*_linear_sample(hidden_BD, weight_VD, *options))
    if checked:
        _require_drawn("linear_sample", draw.tokens)
    return draw


@torch.library.custom_op("genssd::sample", mutates_args=())
def _sample(logits_BV: Tensor, key_B: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> Tensor:
    if runs_natively(logits_BV) and logits_BV.dtype == torch.float32:
        tokens = torch.empty_like(key_B, memory_format=torch.contiguous_format)
        # the logarithm is rounded to float32 as in keep_likely; the 0 of a min_p close to 1 would mean no filter
        log_min_p = min(float(torch.log(torch.tensor(min_p))), -1e-30) if min_p > 0.0 else 0.0
        _core.sample(logits_BV, key_B.contiguous(), temperature, top_k, top_p, log_min_p, tokens, num_threads())
        return tokens
    sound_B = logits_BV.amax(dim=1).isfinite()
    z = logits_BV
    if temperature > 0.0:
        z = logits_BV / temperature
        if top_k or top_p < 1.0 or min_p > 0.0:
            z = keep_likely(z, top_k, top_p, min_p)
        z = z + gumbel_noise(key_B, z.shape[1])
    return z.argmax(dim=1).masked_fill(~sound_B, -1)


@_sample.register_kernel("cuda")
def _sample_triton(
    logits_BV: Tensor, key_B: Tensor, temperature: float, top_k: int, top_p: float, min_p: float
) -> Tensor:
    from genssd.kernels.filter_triton import choose_filter_tiles, sample_rows

    log_min_p = math.log(min_p) if min_p > 0.0 else 0.0
    logits_BV = logits_BV.float()
    if logits_BV.stride(1) != 1:
        logits_BV = logits_BV.contiguous()
    tiles = choose_filter_tiles(logits_BV.device, logits_BV.shape[1], len(logits_BV))
    return sample_rows(logits_BV, key_B, temperature, top_k, top_p, min_p, log_min_p, tiles=tiles)


@_sample.register_fake
def _(logits_BV: Tensor, key_B: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> Tensor:
    return torch.empty_like(key_B)


@torch.library.custom_op("genssd::linear_sample", mutates_args=())
def _linear_sample(
    hidden_BD: Tensor,
    weight_VD: Tensor,
    key_B: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    vocabulary: int,
) -> tuple[Tensor, Tensor]:
    if runs_natively(hidden_BD, weight_VD, bias):
        return _draw_natively(hidden_BD, weight_VD, key_B, bias, temperature, softcap, vocabulary)
    B, V = len(hidden_BD), len(weight_VD)
    tokens, logprob = torch.empty_like(key_B), hidden_BD.new_empty(B, dtype=torch.float32)
    rows = max(1, LOGITS_BYTES // (4 * V))
    x_CV = hidden_BD.new_empty(min(rows, B), V, dtype=torch.float32)
    for start in range(0, B, rows):
        block = slice(start, min(start + rows, B))
        z = linear(hidden_BD[block], weight_VD, out=x_CV[: block.stop - start])
        if bias is not None:
            z += bias
        z = squash(z, 1.0, softcap)
        logsumexp = row_logsumexp(z, 1.0, None)
        for part in iter_slices(len(z), V):
            drawn = _sample(z[part, :vocabulary], key_B[block][part], temperature, 0, 1.0, 0.0)
            tokens[block][part] = drawn.masked_fill(~logsumexp[part].isfinite(), -1)
            chosen = z[part].gather(1, drawn.clamp_min(0)[:, None])[:, 0] - logsumexp[part]
            logprob[block][part] = chosen.masked_fill(tokens[block][part] < 0, torch.nan)
    return tokens, logprob


def _draw_natively(
    hidden_BD: Tensor,
    weight_VD: Weight,
    key_B: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    vocabulary: int,
) -> tuple[Tensor, Tensor]:
    tokens = torch.empty_like(key_B, memory_format=torch.contiguous_format)
    logprob = hidden_BD.new_empty(len(hidden_BD), dtype=torch.float32)
    _core.linear_sample(
        hidden_BD.detach(), cells_of(weight_VD), weight_VD.shape[0], key_B.contiguous(), detach(bias),
        temperature, softcap or 0.0, vocabulary, tokens, logprob, num_threads(),
    )  # fmt: skip
    return tokens, logprob


@_linear_sample.register_kernel("cuda")
def _linear_sample_triton(
    hidden_BD: Tensor,
    weight_VD: Tensor,
    key_B: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    vocabulary: int,
) -> tuple[Tensor, Tensor]:
    from genssd.kernels.draw_triton import choose_draw_tiling, draw_rows
    from genssd.kernels.head_triton import choose_launch

    hidden_BD, weight_VD = hidden_BD.contiguous(), weight_VD.contiguous()
    return draw_rows(
        hidden_BD,
        weight_VD,
        key_B,
        bias,
        temperature,
        softcap,
        vocabulary,
        launch=choose_launch(hidden_BD, weight_VD, "logits"),
        tiling=choose_draw_tiling(hidden_BD.device, len(weight_VD), len(hidden_BD)),
    )


@_linear_sample.register_fake
def _(hidden_BD: Tensor, weight_VD: Tensor, key_B: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(key_B), hidden_BD.new_empty(hidden_BD.shape[0], dtype=torch.float32)


def _require_drawn(function: str, token_B: Tensor) -> None:
    """Raise NonFiniteLogits, naming the function and the first row without a token. The host waits for the device."""
    if bool((token_B < 0).any()):
        raise NonFiniteLogits(function, int((token_B < 0).nonzero()[0]))


def keep_likely(z_BV: Tensor, top_k: int, top_p: float, min_p: float) -> Tensor:
    """Return the logits with -inf for the tokens that top-k, top-p and min-p remove, applied in that order.

    Each filter renormalises over the tokens that the filters before it kept.
    """
    sorted_BV = z_BV.sort(dim=1, descending=True).values
    kept_BV = torch.ones_like(sorted_BV, dtype=torch.bool)
    if 0 < top_k < z_BV.shape[1]:
        kept_BV &= sorted_BV >= sorted_BV[:, top_k - 1 : top_k]
    if top_p < 1.0:
        p_BV = sorted_BV.masked_fill(~kept_BV, -torch.inf).softmax(dim=1)
        before_BV = p_BV.cumsum(dim=1) - p_BV  # probability of the tokens before each; the first is always kept
        kept_BV &= before_BV < top_p
    # every filter keeps a prefix of the sorted row, so the last kept value is the threshold; ties with it are kept
    threshold_B1 = sorted_BV.masked_fill(~kept_BV, torch.inf).amin(dim=1, keepdim=True)
    if min_p > 0.0:
        # p >= min_p * p_max is z >= z_max + log(min_p)
        floor_B1 = sorted_BV[:, :1] + torch.log(torch.tensor(min_p, dtype=z_BV.dtype)).to(z_BV.device)
        threshold_B1 = torch.maximum(threshold_B1, floor_B1)
    return z_BV.masked_fill(z_BV < threshold_B1, -torch.inf)


def gumbel_noise(key_B: Tensor, vocabulary: int) -> Tensor:
    """Return Gumbel(0, 1) noise, float32 [B, vocabulary], whose entry (b, v) depends on (key_B[b], v) alone."""
    if key_B.device.type != "cpu" or not has_native_kernels():
        return gumbel_reference(key_B, vocabulary)
    noise = torch.empty(key_B.shape[0], vocabulary)
    _core.gumbel_noise(key_B.contiguous(), noise, num_threads())
    return noise


def gumbel_reference(key_B: Tensor, vocabulary: int) -> Tensor:
    """Compute `gumbel_noise` in plain torch."""
    v_V = torch.arange(vocabulary, device=key_B.device)
    # all four words of a counter are used, each by 16 tokens side by side
    words_4BV = torch.stack(philox_reference(key_B[:, None], (v_V // 64 * 16 + v_V % 16)[None, :]))
    bits = words_4BV.gather(0, (v_V // 16 % 4).expand(1, len(key_B), -1))[0]
    u = (bits.double() + 0.5) * 2.0**-32
    return (-torch.log(-torch.log1p(-u))).float()


def philox_reference(key: Tensor, counter: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the four output words of Philox 4x32-10 (Salmon et al., 2011), int64 in [0, 2^32).

    key, counter: int64, which broadcast.
    """
    low = 0xFFFFFFFF
    c0, c1 = counter & low, (counter >> 32) & low
    c2 = c3 = torch.zeros_like(c0)
    k0, k1 = key & low, (key >> 32) & low
    for _ in range(10):
        # the product of two 32-bit words wraps in int64, but its 64 bits are right
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = ((b >> 32) & low) ^ c1 ^ k0, b & low, ((a >> 32) & low) ^ c3 ^ k1, a & low
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return c0, c1, c2, c3
