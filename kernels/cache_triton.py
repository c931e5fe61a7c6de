"""Triton kernels of `write_kv` and `copy_pages`: each byte is read once and written once.

Shapes:  N rows   H query heads   G kv heads   K = H + 2 G   E head dim   P pages   S page size   L layers
         R rotary width, at most E
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

HEADS = 8  # heads of one row that a program writes
BLOCK = 4096  # entries of a page that a program copies


@triton.jit
def _write_kernel(
    qkv, cos, sin, slot, q_norm, k_norm,  # [N, K, E] [N, R / 2] [N, R / 2] int64 [N] [E] [E]
    q, k_pages, v_pages,  # [N, H, E] [P, S, G, E] [P, S, G, E]
    H, G, S, stride_n, stride_h, stride_cos, stride_sin, stride_page, stride_slot, stride_group, eps, offset,
    E: tl.constexpr, R: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr, HEADS: tl.constexpr, NORM: tl.constexpr,
    OFFSET: tl.constexpr,
):  # fmt: skip
    """Write HEADS heads of one row, be they queries, keys or values. The two halves of what is rotated are loaded
    separately, because rotation combines them; then the rest of a head, which it leaves alone.

    HALF, REST: powers of two that R / 2 and E - R fit in; REST is 0 where there is no rest. OFFSET: whether `offset` is
    added to the norms' weights, and their products rounded once.
    """
    row = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    e = tl.arange(0, HALF)[None, :]
    inside = e < R // 2
    valid = (head < H + 2 * G) & inside
    dtype = q.dtype.element_ty
    from_row = qkv + row * stride_n + head * stride_h
    first = tl.load(from_row + e, mask=valid, other=0.0).to(tl.float32)
    second = tl.load(from_row + R // 2 + e, mask=valid, other=0.0).to(tl.float32)
    a, b = first, second
    if REST:
        r = R + tl.arange(0, REST)[None, :]
        valid_rest = (head < H + 2 * G) & (r < E)
        rest = tl.load(from_row + r, mask=valid_rest, other=0.0).to(tl.float32)
        kept = rest
    if NORM:
        squares = tl.sum(a * a, 1) + tl.sum(b * b, 1)
        if REST:
            squares += tl.sum(rest * rest, 1)
        scale = tl.rsqrt(squares / E + eps)[:, None]
        a = _weigh(a * scale, q_norm, k_norm, e, inside, head, H, offset, dtype, OFFSET)
        b = _weigh(b * scale, q_norm, k_norm, R // 2 + e, inside, head, H, offset, dtype, OFFSET)
        if REST:
            kept = _weigh(rest * scale, q_norm, k_norm, r, r < E, head, H, offset, dtype, OFFSET)
    c = tl.load(cos + row * stride_cos + e, mask=inside, other=0.0)
    s = tl.load(sin + row * stride_sin + e, mask=inside, other=0.0)
    turned_a, turned_b = (a * c - b * s).to(dtype), (b * c + a * s).to(dtype)

    to_q = q + (row * H + head) * E
    tl.store(to_q + e, turned_a, mask=valid & (head < H))
    tl.store(to_q + R // 2 + e, turned_b, mask=valid & (head < H))
    if REST:
        tl.store(to_q + r, kept.to(dtype), mask=valid_rest & (head < H))
    at = tl.load(slot + row)
    if at >= 0:
        to_page = (at // S) * stride_page + (at % S) * stride_slot
        to_k = k_pages + to_page + (head - H) * stride_group
        is_k, is_v = (head >= H) & (head < H + G), head >= H + G
        tl.store(to_k + e, turned_a, mask=valid & is_k)
        tl.store(to_k + R // 2 + e, turned_b, mask=valid & is_k)
        to_v = v_pages + to_page + (head - H - G) * stride_group
        tl.store(to_v + e, first.to(dtype), mask=valid & is_v)
        tl.store(to_v + R // 2 + e, second.to(dtype), mask=valid & is_v)
        if REST:
            tl.store(to_k + r, kept.to(dtype), mask=valid_rest & is_k)
            tl.store(to_v + r, rest.to(dtype), mask=valid_rest & is_v)


@triton.jit
def _weigh(
    unit, q_norm, k_norm, e, inside, head, H, offset,
    dtype: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """Return the normalised entries e of heads, times the weight of a query's or a key's norm, as float32."""
    of_q, of_k = (head < H) & inside, (head >= H) & inside
    w = tl.load(q_norm + e, mask=of_q, other=0.0) + tl.load(k_norm + e, mask=of_k, other=0.0)
    if OFFSET:
        return ((w.to(tl.float32) + offset) * unit).to(dtype).to(tl.float32)
    return (w.to(tl.float32) * unit.to(dtype).to(tl.float32)).to(dtype).to(tl.float32)


def choose_tiling(width: int, rotary_width: int) -> tuple[int, int, int]:
    """Return how many entries of half of what is rotated, and of the rest of a head, a program holds, and its number of
    warps: eight entries of half a head per thread."""
    half = int(triton.next_power_of_2(rotary_width // 2))
    rest = int(triton.next_power_of_2(width - rotary_width)) if rotary_width < width else 0
    return half, rest, max(1, HEADS * int(triton.next_power_of_2(width // 2)) // 256)


def write_kv_rows(
    qkv_NKE: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_pages_PSGE: Tensor,
    v_pages_PSGE: Tensor,
    slot_N: Tensor,
    heads: int,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    norm_offset: float | None = None,
) -> Tensor:
    """Compute `cache.write_kv` on a CUDA device.

    Rows and heads of qkv, and pages, slots and heads of the cache, may have any stride. Raises ValueError unless the
    entries of each head are contiguous in the pages.
    """
    N, K, E = qkv_NKE.shape
    if qkv_NKE.stride(2) != 1:
        qkv_NKE = qkv_NKE.contiguous()
    if k_pages_PSGE.stride(3) != 1:
        raise ValueError("write_kv: the entries of each head must be contiguous in the pages")
    q_NHE = torch.empty(N, heads, E, dtype=qkv_NKE.dtype, device=qkv_NKE.device)
    norms = (qkv_NKE, qkv_NKE) if q_norm is None or k_norm is None else (q_norm.contiguous(), k_norm.contiguous())
    cos, sin = cos if cos.stride(1) == 1 else cos.contiguous(), sin if sin.stride(1) == 1 else sin.contiguous()
    rotary_width = 2 * cos.shape[1]
    half, rest, num_warps = choose_tiling(E, rotary_width)
    _write_kernel[(N, -(-K // HEADS))](
        qkv_NKE, cos, sin, slot_N.contiguous(), *norms, q_NHE, k_pages_PSGE, v_pages_PSGE,
        heads, k_pages_PSGE.shape[2], k_pages_PSGE.shape[1], qkv_NKE.stride(0), qkv_NKE.stride(1),
        cos.stride(0), sin.stride(0), *k_pages_PSGE.stride()[:3], eps,
        float(norm_offset or 0.0), E=E, R=rotary_width, HALF=half, REST=rest, HEADS=HEADS, NORM=q_norm is not None,
        OFFSET=norm_offset is not None, num_warps=num_warps,
    )  # fmt: skip
    return q_NHE


@triton.jit
def _copy_kernel(
    kv, source, destination,  # [L, 2, P, S * G * E] int64 [N] int64 [N]
    P, entries,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Copy BLOCK entries of one page, of the keys or the values of one layer, in whatever order they lie in memory.

    entries: S * G * E, entries of a page.
    """
    n, layer = tl.program_id(0), tl.program_id(1).to(tl.int64)
    at = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    first = layer * P
    from_page, to_page = first + tl.load(source + n), first + tl.load(destination + n)
    piece = tl.load(kv + from_page * entries + at, mask=at < entries)
    tl.store(kv + to_page * entries + at, piece, mask=at < entries)


def copy_page_rows(kv_L2PSGE: Tensor, source_N: Tensor, destination_N: Tensor, *, block: int = BLOCK) -> None:
    """Compute `cache.copy_pages` on a CUDA device, for a cache whose pages follow each other in memory."""
    L, _, P, *page = kv_L2PSGE.shape
    entries = page[0] * page[1] * page[2]
    _copy_kernel[(len(source_N), 2 * L, -(-entries // block))](
        kv_L2PSGE, source_N.contiguous(), destination_N.contiguous(), P, entries, BLOCK=block, num_warps=8
    )
