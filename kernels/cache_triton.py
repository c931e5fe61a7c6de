"""Triton kernels of `write_kv` and `copy_pages`: each byte is read once and written once.

Shapes:  N rows   H query heads   G kv heads   K = H + 2 G   E head dim   P pages   S page size   L layers
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
    qkv, cos, sin, slot, q_norm, k_norm,  # [N, K, E] [N, E / 2] [N, E / 2] int64 [N] [E] [E]
    q, k_pages, v_pages,  # [N, H, E] [P, S, G, E] [P, S, G, E]
    H, G, S, stride_n, stride_h, stride_cos, stride_sin, stride_page, stride_slot, stride_group, eps,
    E: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Write HEADS heads of one row, be they queries, keys or values. The two halves of a head are loaded separately,
    because rotation combines them."""
    row = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    e = tl.arange(0, HALF)[None, :]
    inside = e < E // 2
    valid = (head < H + 2 * G) & inside
    dtype = q.dtype.element_ty
    from_row = qkv + row * stride_n + head * stride_h + e
    first = tl.load(from_row, mask=valid, other=0.0).to(tl.float32)
    second = tl.load(from_row + E // 2, mask=valid, other=0.0).to(tl.float32)
    a, b = first, second
    if NORM:
        of_q, of_k = (head < H) & inside, (head >= H) & inside
        w_a = tl.load(q_norm + e, mask=of_q, other=0.0) + tl.load(k_norm + e, mask=of_k, other=0.0)
        w_b = tl.load(q_norm + E // 2 + e, mask=of_q, other=0.0) + tl.load(k_norm + E // 2 + e, mask=of_k, other=0.0)
        scale = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / E + eps)[:, None]
        a = (w_a.to(tl.float32) * (a * scale).to(dtype).to(tl.float32)).to(dtype).to(tl.float32)
        b = (w_b.to(tl.float32) * (b * scale).to(dtype).to(tl.float32)).to(dtype).to(tl.float32)
    c = tl.load(cos + row * stride_cos + e, mask=inside, other=0.0)
    s = tl.load(sin + row * stride_sin + e, mask=inside, other=0.0)
    turned_a, turned_b = (a * c - b * s).to(dtype), (b * c + a * s).to(dtype)

    to_q = q + (row * H + head) * E + e
    tl.store(to_q, turned_a, mask=valid & (head < H))
    tl.store(to_q + E // 2, turned_b, mask=valid & (head < H))
    at = tl.load(slot + row)
    if at >= 0:
        to_page = (at // S) * stride_page + (at % S) * stride_slot + e
        to_k = k_pages + to_page + (head - H) * stride_group
        of_k = valid & (head >= H) & (head < H + G)
        tl.store(to_k, turned_a, mask=of_k)
        tl.store(to_k + E // 2, turned_b, mask=of_k)
        to_v = v_pages + to_page + (head - H - G) * stride_group
        of_v = valid & (head >= H + G)
        tl.store(to_v, first.to(dtype), mask=of_v)
        tl.store(to_v + E // 2, second.to(dtype), mask=of_v)


def choose_tiling(width: int) -> tuple[int, int]:
    """Return how many entries of half a head a program holds, and its number of warps: eight entries per thread."""
    half = int(triton.next_power_of_2(width // 2))
    return half, max(1, HEADS * half // 256)


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
    half, num_warps = choose_tiling(E)
    _write_kernel[(N, -(-K // HEADS))](
        qkv_NKE, cos, sin, slot_N.contiguous(), *norms, q_NHE, k_pages_PSGE, v_pages_PSGE,
        heads, k_pages_PSGE.shape[2], k_pages_PSGE.shape[1], qkv_NKE.stride(0), qkv_NKE.stride(1),
        cos.stride(0), sin.stride(0), *k_pages_PSGE.stride()[:3], eps,
        E=E, HALF=half, HEADS=HEADS, NORM=q_norm is not None, num_warps=num_warps,
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
