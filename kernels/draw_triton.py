"""Triton kernels of `linear_sample`: the logits of a block of rows, then one pass over them that draws.

The logits of a few hundred rows stay in or near the L2 cache, and noise takes so many registers that a kernel which
makes it under the product's tiles would spill them. The noise is Gumbel's, from Philox 4x32-10 with the row's key, and
the token's id as counter: the same random bits as on the CPU.

Shapes:  B rows   V vocabulary   D model width   S splits
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from genssd.kernels import tune_file, tuned
from genssd.kernels.head_triton import (
    HeadLaunch,
    describe,
    finish_logits,
    multiply_by_library,
    multiply_tile,
    place_of,
    rescale,
    safe_peak,
)
from genssd.kernels.noise_triton import gumbel, place_tokens, random_words, to_uniform

LOG2_E = tl.constexpr(1.4426950408889634)
LOGITS_BYTES = 256 << 20  # largest size of the float32 logits of one block of rows
MERGED_SPLITS = 32  # splits that a merging program reads at once
MERGED_ROWS = 4


# code specialised on the number of rows might round differently
@triton.jit(do_not_specialize=("B", "group"))
def _logits_kernel(
    hidden, weight, bias,  # [B, D] [V, D] [V]
    logits,  # [B, V]
    B, V, D, stride_b, stride_v, stride_z, group, softcap,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, DESCRIPTORS: tl.constexpr,
    HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    blocks, tiles = tl.cdiv(B, BLOCK_N), tl.cdiv(V, BLOCK_V)
    for task in range(tl.program_id(0), blocks * tiles, tl.num_programs(0)):
        tile, block = place_of(task, blocks, tiles, group)
        x = multiply_tile(
            hidden, weight, block * BLOCK_N, tile * BLOCK_V, B, V, D, stride_b, stride_v,
            BLOCK_N, BLOCK_V, BLOCK_D, DESCRIPTORS, INTERPRET,
        )  # fmt: skip
        z = finish_logits(x, bias, tile * BLOCK_V, V, 1.0, softcap, BLOCK_V, HAS_BIAS, False, SOFTCAP)
        b = block * BLOCK_N + tl.arange(0, BLOCK_N)
        v = tile * BLOCK_V + tl.arange(0, BLOCK_V)
        tl.store(logits + b.to(tl.int64)[:, None] * stride_z + v[None, :], z, mask=(b < B)[:, None] & (v < V)[None, :])


def write_logits(
    hidden_BD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, softcap: float | None, *, launch: HeadLaunch
) -> Tensor:
    """Return the logits at temperature 1, float32 [B, V].

    A row's bits depend on that row alone, unless the launch takes the library's product.
    """
    if launch.library:
        x = multiply_by_library(hidden_BD, weight_VD)
        x = x if bias_V is None else x.add_(bias_V)
        return x if softcap is None else x.div_(softcap).tanh_().mul_(softcap)
    B, D = hidden_BD.shape
    V, tiles = weight_VD.shape[0], launch.tiles
    stride = -(-V // 4) * 4
    logits_BV = torch.empty(B, stride, dtype=torch.float32, device=hidden_BD.device)[:, :V]
    blocks = -(-B // tiles.block_n)
    _logits_kernel[(min(launch.programs, blocks * -(-V // tiles.block_v)),)](
        describe(hidden_BD, tiles.block_n, tiles), describe(weight_VD, tiles.block_v, tiles),
        bias_V if bias_V is not None else weight_VD, logits_BV,
        B, V, D, hidden_BD.stride(0), weight_VD.stride(0), stride, min(launch.group, blocks), softcap or 1.0,
        BLOCK_N=tiles.block_n, BLOCK_V=tiles.block_v, BLOCK_D=tiles.block_d, DESCRIPTORS=tiles.descriptors,
        HAS_BIAS=bias_V is not None, SOFTCAP=softcap is not None, INTERPRET=launch.interpret,
        num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip
    return logits_BV


@triton.jit(do_not_specialize=("B", "vocabulary"))
def _draw_split_kernel(
    logits, key,  # [B, V] int64 [B]
    partial, winner,  # [4, S, B] int32 [S, B]
    B, V, vocabulary, stride, temperature,
    GREEDY: tl.constexpr, SCALED: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute, for one row and split, the peak and sum of the softmax, the best noisy logit, its token and logit.

    The noise g = -log(-log(1 - u)) is at most -log(u), because -log(1 - u) >= u. So an entry whose e^(z / temperature)
    is less than u times e^(best score) cannot win, and a block in which none can is left after its random bits.
    """
    row, split, splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    z_row = logits + row.to(tl.int64) * stride
    seed = tl.load(key + row)
    lane = tl.arange(0, BLOCK)
    begin, end = split * SPLIT, tl.minimum((split + 1) * SPLIT, V)
    highest = tl.full([BLOCK], -float("inf"), tl.float32)
    for start in range(begin, end, BLOCK):
        v = start + lane
        highest = tl.maximum(highest, tl.load(z_row + v, mask=v < end, other=-float("inf")))
    peak = tl.max(highest, 0)
    base = safe_peak(peak)
    c = tl.arange(0, BLOCK // 4)  # each serves four tokens with the words of its counter
    total = tl.zeros([BLOCK // 4], tl.float32)
    best = tl.full([BLOCK // 4], -float("inf"), tl.float32)
    z_best = tl.zeros([BLOCK // 4], tl.float32)
    token = tl.full([BLOCK // 4], 0x7FFFFFFF, tl.int32)
    bound = tl.zeros([], tl.float32)  # e^(best score - base / temperature), a little less for rounding
    for start in range(begin, end, BLOCK):
        if not GREEDY:
            words = random_words(seed, start // 4 + c)
        possible = tl.zeros([BLOCK // 4], tl.int32)
        for word in tl.static_range(4):
            v = place_tokens(start, c, word)
            z = tl.load(z_row + v, mask=v < end, other=-float("inf"))
            e = tl.exp2((z - base) * LOG2_E)
            total += e
            kept = (v < vocabulary) & (z > -float("inf"))
            if GREEDY:
                better = kept & (z > best)
                best = tl.where(better, z, best)
                z_best = best
                token = tl.where(better, v, token)
            else:
                weight = tl.exp2((z - base) * (LOG2_E / temperature)) if SCALED else e
                possible |= (kept & (weight >= to_uniform(words[word]) * bound)).to(tl.int32)
        if not GREEDY:  # noqa: SIM102  (decided when the kernel is compiled)
            if tl.max(possible, 0) > 0:
                for word in tl.static_range(4):
                    v = place_tokens(start, c, word)
                    z = tl.load(z_row + v, mask=v < end, other=-float("inf"))
                    score = z / temperature + gumbel(to_uniform(words[word]))
                    better = (v < vocabulary) & (z > -float("inf")) & (score > best)
                    best = tl.where(better, score, best)
                    z_best = tl.where(better, z, z_best)
                    token = tl.where(better, v, token)
                bound = tl.exp(tl.max(best, 0) - base / temperature) * 0.9999
    at = split * B + row
    size = splits * B
    tl.store(partial + at, peak)
    tl.store(partial + size + at, tl.sum(total, 0))
    score = tl.max(best, 0)
    first = tl.min(tl.where(best == score, token, 0x7FFFFFFF), 0)
    tl.store(partial + 2 * size + at, score)
    tl.store(partial + 3 * size + at, tl.max(tl.where(token == first, z_best, -float("inf")), 0))
    tl.store(winner + at, first)


@triton.jit(do_not_specialize=("B", "S"))
def _draw_merge_kernel(
    partial, winner,  # [4, S, B] int32 [S, B]
    tokens, logprob,  # int64 [B] [B]
    B, S, ROWS: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    size = S * B
    peak = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    best = tl.full([ROWS], -float("inf"), tl.float32)
    z_token = tl.zeros([ROWS], tl.float32)
    token = tl.full([ROWS], -1, tl.int32)
    for first in range(0, S, BLOCK_S):
        s = first + tl.arange(0, BLOCK_S)
        at = s[:, None] * B + b[None, :]
        read = (s < S)[:, None] & (b < B)[None, :]
        split_peak = tl.load(partial + at, mask=read, other=-float("inf"))
        split_total = tl.load(partial + size + at, mask=read, other=0.0)
        score = tl.load(partial + 2 * size + at, mask=read, other=-float("inf"))
        new_peak = tl.maximum(peak, tl.max(split_peak, 0))
        base = safe_peak(new_peak)
        parts = tl.sum(split_total * rescale(split_peak, base[None, :]), 0)
        total = total * rescale(peak, base) + parts
        peak = new_peak
        highest = tl.max(score, 0)
        candidate = tl.load(winner + at, mask=read, other=0x7FFFFFFF)
        lowest = tl.min(tl.where(score == highest[None, :], candidate, 0x7FFFFFFF), 0)
        z = tl.load(partial + 3 * size + at, mask=read, other=-float("inf"))
        z_highest = tl.max(tl.where((candidate == lowest[None, :]) & (score == highest[None, :]), z, -float("inf")), 0)
        better = highest > best
        best = tl.where(better, highest, best)
        token = tl.where(better, lowest, token)
        z_token = tl.where(better, z_highest, z_token)
    lse = peak + tl.log(total)
    # a NaN or an infinity anywhere in the row has reached its log-sum-exp
    sound = (lse == lse) & (lse > -float("inf")) & (lse < float("inf"))
    tl.store(tokens + b, tl.where(sound, token, -1).to(tl.int64), mask=b < B)
    tl.store(logprob + b, tl.where(sound, z_token - lse, float("nan")), mask=b < B)


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawTiling:
    """Sizes of the pass over logits that draws. split: entries of a row that a program takes. block: at once."""

    split: int
    block: int
    num_warps: int

    @staticmethod
    def from_values(values: tune_file.Configuration) -> DrawTiling:
        """Build from the values of a tune file. Raises ValueError where they are not those of this class."""
        return tuned.build_from(DrawTiling, values)

    def values(self) -> dict[str, int]:
        """Return the values of the tune file."""
        return dataclasses.asdict(self)


DRAW_TILING = DrawTiling(split=4096, block=256, num_warps=1)


def choose_draw_tiling(device: torch.device, vocabulary: int, rows: int) -> DrawTiling:
    """Return the sizes of the pass that draws on a device: what was tuned for it, else the shipped ones."""
    shape = (vocabulary,)
    return tuned.find("draw", torch.float32, shape, device, rows, DrawTiling.from_values) or DRAW_TILING


def draw_from_logits(
    logits_BV: Tensor, key_B: Tensor, temperature: float, vocabulary: int, *, tiling: DrawTiling | None = None
) -> tuple[Tensor, Tensor]:
    """Draw one token per row among the first `vocabulary` ids of float32 logits; see `draw_rows`."""
    B, V = logits_BV.shape
    tiling = tiling or DRAW_TILING
    S = -(-V // tiling.split)
    partial = torch.empty(4, S, B, dtype=torch.float32, device=logits_BV.device)
    winner = torch.empty(S, B, dtype=torch.int32, device=logits_BV.device)
    tokens = torch.empty(B, dtype=torch.int64, device=logits_BV.device)
    logprob = torch.empty(B, dtype=torch.float32, device=logits_BV.device)
    _draw_split_kernel[(B, S)](
        logits_BV, key_B, partial, winner, B, V, vocabulary, logits_BV.stride(0), temperature or 1.0,
        GREEDY=temperature == 0.0, SCALED=temperature != 1.0, SPLIT=tiling.split, BLOCK=tiling.block,
        num_warps=tiling.num_warps,
    )  # fmt: skip
    _draw_merge_kernel[(-(-B // MERGED_ROWS),)](
        partial, winner, tokens, logprob, B, S, ROWS=MERGED_ROWS, BLOCK_S=MERGED_SPLITS
    )
    return tokens, logprob


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
    tiling: DrawTiling | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw tokens from a head: int64 [B], -1 where the logits are not finite, and log-probabilities, float32 [B]."""
    rows = max(1, LOGITS_BYTES // (4 * weight_VD.shape[0]))
    draws = [
        draw_from_logits(
            write_logits(hidden_BD[start : start + rows], weight_VD, bias_V, softcap, launch=launch),
            key_B[start : start + rows],
            temperature,
            vocabulary,
            tiling=tiling,
        )
        for start in range(0, max(1, len(hidden_BD)), rows)
    ]
    return draws[0] if len(draws) == 1 else (torch.cat([d[0] for d in draws]), torch.cat([d[1] for d in draws]))
