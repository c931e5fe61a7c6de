"""Triton kernels of `attention_mass`, forward and backward.

With I[h, a, b] = exp(scale q k - lse[h, a]) and D[a, b] = dA[step of a, word of b] (0 where a has no step, or b no
word),

    row_mass[a, j] = 1 / H sum over h and b of word j of I[h, a, b]
    A[i, j] = sum over a of step i of row_mass[a, j]
    delta[h, a] = sum over b of I[h, a, b] D[a, b]
    dscore[h, a, b] = I[h, a, b] (D[a, b] - delta[h, a]) / H

Rows without a step cost nothing. Keys without a word cost nothing except in the log-sum-exp and in the gradients, which
compute I again. One program computes each sum, in order, so all results have the same bits in every run.

Shapes:  T tokens   H query heads   G kv heads   E head dim   S steps   W words   R rows that have a step
         C columns (keys) that have a word
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from genssd.kernels.head_triton import rescale, safe_peak

HEADROOM = 8192.0
"""The largest absolute value of dA is scaled into [HEADROOM, 2 HEADROOM), so that float16 holds dscore, which is at
most twice as large and mostly much smaller."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MassTiles:
    """Sizes of one configuration of the kernels. interpret: whether Triton's interpreter runs them."""

    own: int
    """Rows that a program computes; for the gradient of k, keys."""
    step: int
    """Keys that a program loads at a time; for the gradient of k, rows."""
    words: int
    """Words of a tile of row masses."""
    num_warps: int
    num_stages: int
    interpret: bool = False


MASS = MassTiles(own=64, step=32, words=16, num_warps=4, num_stages=2)
MASS_WIDE = MassTiles(own=64, step=32, words=16, num_warps=8, num_stages=2)
GRADIENT_NARROW = MassTiles(own=64, step=16, words=16, num_warps=4, num_stages=2)
GRADIENT = MassTiles(own=64, step=32, words=16, num_warps=8, num_stages=2)
GRADIENT_WIDE = MassTiles(own=64, step=16, words=16, num_warps=8, num_stages=2)


def choose_tiles(width: int, *, gradient: bool) -> MassTiles:
    """Return the shipped configuration for bfloat16 and float16. width: head dim, at most attention_mass.MAX_WIDTH."""
    if not gradient:
        return MASS if width <= 128 else MASS_WIDE
    return GRADIENT_NARROW if width <= 64 else GRADIENT if width <= 128 else GRADIENT_WIDE


@triton.jit
def _vectors(x, at, kept, stride, E: tl.constexpr, BLOCK_E: tl.constexpr, INTERPRET: tl.constexpr):
    """Load the vectors of x with the indices `at`, [len(at), BLOCK_E], zeros where not kept and beyond E."""
    e = tl.arange(0, BLOCK_E)[None, :]
    tile = tl.load(x + at.to(tl.int64)[:, None] * stride + e, mask=kept[:, None] & (e < E), other=0.0)
    if INTERPRET:  # the interpreter would multiply the bits of bf16 as integers
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def _upstream(d_mass, row, column, W):
    """Load D for steps `row` and words `column`, which broadcast; 0 for word -1, a key without a word."""
    return tl.load(d_mass + row * W + column, mask=column >= 0, other=0.0)


@triton.jit
def _lse_kernel(
    q, k, rows, lse,  # [T, H, E] [T, G, E] int32 [R] [T, H]
    R, H, GROUP, stride_qt, stride_qh, stride_kt, stride_kh, scale,
    E: tl.constexpr, BLOCK_E: tl.constexpr, OWN: tl.constexpr, STEP: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Compute the log-sum-exp of a block of rows for one head, over each row's own key and those before it.

    GROUP: query heads per kv head.
    """
    head = tl.program_id(1).to(tl.int64)
    r = tl.program_id(0) * OWN + tl.arange(0, OWN)
    a = tl.load(rows + r, mask=r < R, other=-1)
    q_tile = _vectors(q + head * stride_qh, a, a >= 0, stride_qt, E, BLOCK_E, INTERPRET)
    k += (head // GROUP) * stride_kh
    last = tl.max(a, 0)
    peak = tl.full([OWN], -float("inf"), tl.float32)
    total = tl.zeros([OWN], tl.float32)
    for start in range(0, last + 1, STEP):
        b = start + tl.arange(0, STEP)
        k_tile = _vectors(k, b, b <= last, stride_kt, E, BLOCK_E, INTERPRET)
        s = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee") * scale
        s = tl.where(b[None, :] <= a[:, None], s, -float("inf"))
        new_peak = tl.maximum(peak, tl.max(s, 1))
        base = safe_peak(new_peak)
        total = rescale(peak, base) * total + tl.sum(tl.exp(s - base[:, None]), 1)
        peak = new_peak
    tl.store(lse + a.to(tl.int64) * H + head, peak + tl.log(total), mask=a >= 0)


@triton.jit
def _row_mass_kernel(
    q, k, rows, columns, word, word_start, lse,  # [T, H, E] [T, G, E] int32 [R] [C] [T] [W + 1] [T, H]
    row_mass,  # [R, W]
    R, H, W, GROUP, stride_qt, stride_qh, stride_kt, stride_kh, scale,
    E: tl.constexpr, BLOCK_E: tl.constexpr, OWN: tl.constexpr, STEP: tl.constexpr, BLOCK_W: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """Compute the row masses of a block of rows and a block of words.

    columns are sorted by word: those of word w are columns[word_start[w]:word_start[w + 1]].
    """
    r = tl.program_id(0) * OWN + tl.arange(0, OWN)
    a = tl.load(rows + r, mask=r < R, other=-1)
    first = tl.program_id(1) * BLOCK_W
    w = first + tl.arange(0, BLOCK_W)
    end = tl.load(word_start + tl.minimum(first + BLOCK_W, W))
    total = tl.zeros([OWN, BLOCK_W], tl.float32)
    for start in range(tl.load(word_start + first), end, STEP):
        c = start + tl.arange(0, STEP)
        b = tl.load(columns + c, mask=c < end, other=0)
        word_b = tl.load(word + b, mask=c < end, other=-1)
        visible = (b[None, :] <= a[:, None]) & (c < end)[None, :]
        mass = tl.zeros([OWN, STEP], tl.float32)
        for head in range(0, H):
            q_tile = _vectors(q + head * stride_qh, a, a >= 0, stride_qt, E, BLOCK_E, INTERPRET)
            k_tile = _vectors(k + (head // GROUP) * stride_kh, b, c < end, stride_kt, E, BLOCK_E, INTERPRET)
            s = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee") * scale
            normalizer = tl.load(lse + a.to(tl.int64) * H + head, mask=a >= 0, other=0.0)
            mass += tl.where(visible, tl.exp(s - normalizer[:, None]), 0.0)
        word_one_hot = (word_b[:, None] == w[None, :]).to(tl.float32)
        total = tl.dot(mass, word_one_hot, total, input_precision="ieee")
    tl.store(row_mass + r.to(tl.int64)[:, None] * W + w[None, :], total / H, mask=(r < R)[:, None] & (w < W)[None, :])


@triton.jit
def _sum_steps_kernel(
    row_mass, order, step_start, mass,  # [R, W] int32 [R] [S + 1] [S, W]
    W,
    BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Sum the row masses of one step for a block of words.

    The rows of step s are order[step_start[s]:step_start[s + 1]].
    """
    step = tl.program_id(0)
    w = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    end = tl.load(step_start + step + 1)
    total = tl.zeros([BLOCK_R, BLOCK_W], tl.float32)
    for start in range(tl.load(step_start + step), end, BLOCK_R):
        n = start + tl.arange(0, BLOCK_R)
        r = tl.load(order + n, mask=n < end, other=0).to(tl.int64)
        total += tl.load(row_mass + r[:, None] * W + w[None, :], mask=(n < end)[:, None] & (w < W)[None, :], other=0.0)
    tl.store(mass + step.to(tl.int64) * W + w, tl.sum(total, 0), mask=w < W)


@triton.jit
def _dq_kernel(
    q, k, rows, columns, step, word, lse,  # [T, H, E] [T, G, E] int32 [R] [C] [T] [T] [T, H]
    d_mass, unit, delta, dq,  # [S, W] [1] [T, H] [T, H, E]
    R, C, H, W, GROUP, stride_qt, stride_qh, stride_kt, stride_kh, scale,
    E: tl.constexpr, BLOCK_E: tl.constexpr, OWN: tl.constexpr, STEP: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Compute delta and dq of a block of rows for one head: delta from the keys that have a word, then dq from all."""
    head = tl.program_id(1).to(tl.int64)
    r = tl.program_id(0) * OWN + tl.arange(0, OWN)
    a = tl.load(rows + r, mask=r < R, other=-1)
    step_a = tl.load(step + a, mask=a >= 0, other=0)
    q_tile = _vectors(q + head * stride_qh, a, a >= 0, stride_qt, E, BLOCK_E, INTERPRET)
    at = a.to(tl.int64) * H + head
    normalizer = tl.load(lse + at, mask=a >= 0, other=0.0)
    k += (head // GROUP) * stride_kh
    d_row = tl.zeros([OWN], tl.float32)
    for start in range(0, C, STEP):
        c = start + tl.arange(0, STEP)
        b = tl.load(columns + c, mask=c < C, other=0)
        word_b = tl.load(word + b, mask=c < C, other=-1)
        k_tile = _vectors(k, b, c < C, stride_kt, E, BLOCK_E, INTERPRET)
        s = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee") * scale
        p = tl.where(b[None, :] <= a[:, None], tl.exp(s - normalizer[:, None]), 0.0)
        d_row += tl.sum(p * _upstream(d_mass, step_a[:, None], word_b[None, :], W), 1)
    tl.store(delta + at, d_row, mask=a >= 0)

    last = tl.max(a, 0)
    total = tl.zeros([OWN, BLOCK_E], tl.float32)
    for start in range(0, last + 1, STEP):
        b = start + tl.arange(0, STEP)
        word_b = tl.load(word + b, mask=b <= last, other=-1)
        k_tile = _vectors(k, b, b <= last, stride_kt, E, BLOCK_E, INTERPRET)
        s = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee") * scale
        p = tl.where(b[None, :] <= a[:, None], tl.exp(s - normalizer[:, None]), 0.0)
        ds = p * (_upstream(d_mass, step_a[:, None], word_b[None, :], W) - d_row[:, None])
        total = tl.dot(ds.to(k.dtype.element_ty).to(k_tile.dtype), k_tile, total, input_precision="ieee")
    e = tl.arange(0, BLOCK_E)[None, :]
    out = total * (scale / H * tl.load(unit))
    tl.store(dq + at[:, None] * E + e, out.to(dq.dtype.element_ty), mask=(a >= 0)[:, None] & (e < E))


@triton.jit
def _dk_kernel(
    q, k, rows, first_row, step, word, lse,  # [T, H, E] [T, G, E] int32 [R] [T / OWN] [T] [T] [T, H]
    d_mass, unit, delta, dk,  # [S, W] [1] [T, H] [T, G, E]
    T, R, G, W, GROUP, stride_qt, stride_qh, stride_kt, stride_kh, scale,
    E: tl.constexpr, BLOCK_E: tl.constexpr, OWN: tl.constexpr, STEP: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Compute dk of a block of keys for one kv head, from the rows at or after its first key, head by head in order."""
    block, group = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b = block * OWN + tl.arange(0, OWN)
    word_b = tl.load(word + b, mask=b < T, other=-1)
    k_tile = _vectors(k + group * stride_kh, b, b < T, stride_kt, E, BLOCK_E, INTERPRET)
    first = tl.load(first_row + block)
    H = G * GROUP
    total = tl.zeros([OWN, BLOCK_E], tl.float32)
    for head in range(group * GROUP, (group + 1) * GROUP):
        for start in range(first, R, STEP):
            r = start + tl.arange(0, STEP)
            a = tl.load(rows + r, mask=r < R, other=-1)
            step_a = tl.load(step + a, mask=a >= 0, other=0)
            at = a.to(tl.int64) * H + head
            normalizer = tl.load(lse + at, mask=a >= 0, other=0.0)
            d_row = tl.load(delta + at, mask=a >= 0, other=0.0)
            q_tile = _vectors(q + head * stride_qh, a, a >= 0, stride_qt, E, BLOCK_E, INTERPRET)
            s = tl.dot(k_tile, tl.trans(q_tile), input_precision="ieee") * scale
            p = tl.where(b[:, None] <= a[None, :], tl.exp(s - normalizer[None, :]), 0.0)
            ds = p * (_upstream(d_mass, step_a[None, :], word_b[:, None], W) - d_row[None, :])
            total = tl.dot(ds.to(q.dtype.element_ty).to(q_tile.dtype), q_tile, total, input_precision="ieee")
    e = tl.arange(0, BLOCK_E)[None, :]
    out = total * (scale / H * tl.load(unit))
    to_k = dk + (b.to(tl.int64)[:, None] * G + group) * E + e
    tl.store(to_k, out.to(dk.dtype.element_ty), mask=(b < T)[:, None] & (e < E))


def _group_by(index_N: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Sort places of index by their value (-1..count-1), in a stable order; return them, int32 [N], and the bounds.

    bounds: int32 [count + 1]; the places of value v are order[bounds[v]:bounds[v + 1]].
    """
    order_N = torch.argsort(index_N, stable=True)
    start = torch.searchsorted(index_N[order_N], torch.arange(count + 1, device=index_N.device))
    return order_N.int(), start.int()


def compute_mass(
    q_THE: Tensor,
    k_TGE: Tensor,
    step_T: Tensor,
    word_T: Tensor,
    steps: int,
    words: int,
    scale: float,
    *,
    tiles: MassTiles,
) -> tuple[Tensor, Tensor]:
    """Compute the attention mass A, float32 [S, W], and the log-sum-exp of the rows that have a step on a CUDA device.

    The log-sum-exp is float32 [T, H], 0 in other rows.
    """
    T, H, E = q_THE.shape
    rows_R = (step_T >= 0).nonzero()[:, 0]
    columns_T, word_start = _group_by(word_T, words)
    order_R, step_start = _group_by(step_T[rows_R], steps)
    R, device = len(rows_R), q_THE.device
    lse_TH = torch.zeros(T, H, dtype=torch.float32, device=device)
    row_mass_RW = torch.empty(R, words, dtype=torch.float32, device=device)
    mass_SW = torch.empty(steps, words, dtype=torch.float32, device=device)
    rows_R, word_T, blocks = rows_R.int(), word_T.int(), -(-R // tiles.own)
    common = (H // k_TGE.shape[1], q_THE.stride(0), q_THE.stride(1), k_TGE.stride(0), k_TGE.stride(1), scale)
    options = launch_options(E, tiles)
    _lse_kernel[(blocks, H)](q_THE, k_TGE, rows_R, lse_TH, R, H, *common, **options)
    _row_mass_kernel[(blocks, -(-words // tiles.words))](
        q_THE, k_TGE, rows_R, columns_T, word_T, word_start, lse_TH, row_mass_RW, R, H, words, *common,
        BLOCK_W=tiles.words, **options,
    )  # fmt: skip
    _sum_steps_kernel[(steps, -(-words // 64))](
        row_mass_RW, order_R, step_start, mass_SW, words, BLOCK_R=32, BLOCK_W=64, num_warps=4
    )
    return mass_SW, lse_TH


def compute_mass_gradients(
    d_mass_SW: Tensor,
    q_THE: Tensor,
    k_TGE: Tensor,
    step_T: Tensor,
    word_T: Tensor,
    lse_TH: Tensor,
    scale: float,
    *,
    tiles: MassTiles,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of q and k, in their dtypes, of a loss whose gradient in the attention mass is d_mass."""
    (T, H, E), G, words = q_THE.shape, k_TGE.shape[1], d_mass_SW.shape[1]
    rows_R, columns_C = (step_T >= 0).nonzero()[:, 0], (word_T >= 0).nonzero()[:, 0]
    R, C, device = len(rows_R), len(columns_C), q_THE.device
    first_key = torch.arange(0, T, tiles.own, device=device)
    first_row = torch.searchsorted(rows_R, first_key).int()
    # a power of two, so that scaling does not round
    unit = torch.exp2(d_mass_SW.abs().amax().clamp_min(1e-30).log2().floor()) / HEADROOM
    d_mass_SW = (d_mass_SW / unit).contiguous()
    delta_TH = torch.empty(T, H, dtype=torch.float32, device=device)
    dq_THE = torch.zeros(T, H, E, dtype=q_THE.dtype, device=device)
    dk_TGE = torch.empty(T, G, E, dtype=k_TGE.dtype, device=device)
    rows_R, columns_C, step_T, word_T = rows_R.int(), columns_C.int(), step_T.int(), word_T.int()
    common = (H // G, q_THE.stride(0), q_THE.stride(1), k_TGE.stride(0), k_TGE.stride(1), scale)
    options = launch_options(E, tiles)
    _dq_kernel[(-(-R // tiles.own), H)](
        q_THE, k_TGE, rows_R, columns_C, step_T, word_T, lse_TH, d_mass_SW, unit, delta_TH, dq_THE,
        R, C, H, words, *common, **options,
    )  # fmt: skip
    _dk_kernel[(len(first_key), G)](
        q_THE, k_TGE, rows_R, first_row, step_T, word_T, lse_TH, d_mass_SW, unit, delta_TH, dk_TGE,
        T, R, G, words, *common, **options,
    )  # fmt: skip
    return dq_THE, dk_TGE


def launch_options(width: int, tiles: MassTiles) -> dict[str, int | bool]:
    """Return the constants and launch options of the kernels over tiles of scores."""
    return {
        "E": width,
        "BLOCK_E": max(16, triton.next_power_of_2(width)),
        "OWN": tiles.own,
        "STEP": tiles.step,
        "INTERPRET": tiles.interpret,
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
    }
