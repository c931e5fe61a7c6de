"""Operators on the paged key-value cache: writing a layer's keys and values, and copying pages.

Shapes:  N rows   H query heads   G kv heads   K = H + 2 G   E head dim   P pages   S page size   L layers
         R rotary width, at most E   C, v cells of a packed key and numbers of a cell (packed_keys.py)
"""

from __future__ import annotations

import torch
from torch import Tensor

from genssd import _core
from genssd.kernels.inference import refuse_gradients
from genssd.kernels.native import detach, runs_natively
from genssd.kernels.norm import rms_norm_reference
from genssd.kernels.packed_keys import numbers_per_cell
from genssd.kernels.rotary import rotary
from genssd.kernels.threads import num_threads


def write_kv(
    qkv_NKE: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_pages: Tensor,
    v_pages_PSGE: Tensor,
    slot_N: Tensor,
    *,
    heads: int,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
    norm_offset: float | None = None,
) -> Tensor:
    """Store each row's rotated keys and its values at slot_N; return the rotated queries, [N, heads, E], contiguous.

    k_pages: keys as rows, [P, S, G, E], or packed, [P, G, C, S, v], which the native kernels write (packed_keys.py).
    qkv_NKE: query heads first, then key heads, then value heads; in the dtype of the pages. cos, sin: float32
    [N, R / 2], see rotary.rotary_angles; they rotate the first R numbers of every query and key head, and the others
    stay as they are. q_norm, k_norm: [E], weights of a root-mean-square norm of every head before its rotation; both or
    neither must be given. norm_offset: the offset of these norms, see norm.rms_norm. slot_N: int64, page * S + offset;
    slots that are not negative must be distinct and inside the cache, which a CUDA device does not check. A row whose
    slot is negative is padding and writes nothing.
    Raises ValueError on shapes or dtypes that do not agree, and where a gradient is required and a native or Triton
    kernel would run, because these record none.
    """
    _check(qkv_NKE, cos, sin, k_pages, v_pages_PSGE, slot_N, heads, q_norm, k_norm)
    if qkv_NKE.is_cuda and qkv_NKE.dtype != torch.float64:
        # imported here, because Triton need not be installed where there is no GPU
        from genssd.kernels.cache_triton import write_kv_rows

        refuse_gradients("write_kv", qkv_NKE, q_norm, k_norm)
        return write_kv_rows(qkv_NKE, cos, sin, k_pages, v_pages_PSGE, slot_N, heads, q_norm, k_norm, eps, norm_offset)
    can_write = k_pages.ndim == 5 and k_pages.is_contiguous() and slot_N.is_contiguous()
    if can_write and runs_natively(qkv_NKE, k_pages, v_pages_PSGE):
        refuse_gradients("write_kv", qkv_NKE, q_norm, k_norm)
        q = qkv_NKE.new_empty(qkv_NKE.shape[0], heads, qkv_NKE.shape[2])
        _core.write_kv(
            qkv_NKE.contiguous(), cos.contiguous(), sin.contiguous(), k_pages, v_pages_PSGE, slot_N,
            detach(q_norm), detach(k_norm), eps, norm_offset, q, num_threads(),
        )  # fmt: skip
        return q
    return write_kv_reference(
        qkv_NKE,
        cos,
        sin,
        k_pages,
        v_pages_PSGE,
        slot_N,
        heads=heads,
        q_norm=q_norm,
        k_norm=k_norm,
        eps=eps,
        norm_offset=norm_offset,
    )


def write_kv_reference(
    qkv_NKE: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_pages: Tensor,
    v_pages_PSGE: Tensor,
    slot_N: Tensor,
    *,
    heads: int,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
    norm_offset: float | None = None,
) -> Tensor:
    """Compute `write_kv` in plain torch."""
    page_size, kv_heads = v_pages_PSGE.shape[1:3]
    q, k, v = torch.split(qkv_NKE, [heads, kv_heads, kv_heads], dim=1)
    if q_norm is not None and k_norm is not None:
        q = rms_norm_reference(q, q_norm, eps, offset=norm_offset)
        k = rms_norm_reference(k, k_norm, eps, offset=norm_offset)
    kept = slot_N >= 0
    page, offset = torch.div(slot_N[kept], page_size, rounding_mode="floor"), slot_N[kept] % page_size
    keys = rotary(k, cos, sin)[kept]
    if k_pages.ndim == 5:
        k_pages[page, :, :, offset] = keys.reshape(*keys.shape[:2], -1, numbers_per_cell(keys.dtype))
    else:
        k_pages[page, offset] = keys
    v_pages_PSGE[page, offset] = v[kept]
    return rotary(q, cos, sin).contiguous()


def copy_pages(kv_L2PSGE: Tensor, source_N: Tensor, destination_N: Tensor) -> None:
    """Copy the keys and values of all layers from each source page to the destination page of the same index.

    source_N, destination_N: int64; a destination must be neither a source nor another destination.
    """
    if kv_L2PSGE.is_cuda and (kv_L2PSGE.is_contiguous() or kv_L2PSGE.transpose(3, 4).is_contiguous()):
        from genssd.kernels.cache_triton import copy_page_rows

        copy_page_rows(kv_L2PSGE, source_N, destination_N)
    elif runs_natively(kv_L2PSGE) and kv_L2PSGE.is_contiguous():
        _core.copy_pages(kv_L2PSGE, source_N.contiguous(), destination_N.contiguous(), num_threads())
    else:
        copy_pages_reference(kv_L2PSGE, source_N, destination_N)


def copy_pages_reference(kv_L2PSGE: Tensor, source_N: Tensor, destination_N: Tensor) -> None:
    """Compute `copy_pages` in plain torch."""
    kv_L2PSGE.index_copy_(2, destination_N, kv_L2PSGE.index_select(2, source_N))


def _check(
    qkv_NKE: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_pages: Tensor,
    v_pages_PSGE: Tensor,
    slot_N: Tensor,
    heads: int,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
) -> None:
    P, S, kv_heads, width = v_pages_PSGE.shape
    rows, in_cell = qkv_NKE.shape[0], numbers_per_cell(qkv_NKE.dtype)
    as_rows = k_pages.shape == v_pages_PSGE.shape and k_pages.stride() == v_pages_PSGE.stride()
    packed = k_pages.shape == (P, kv_heads, width // in_cell, S, in_cell)
    if not (as_rows or packed) or not qkv_NKE.dtype == k_pages.dtype == v_pages_PSGE.dtype:
        raise ValueError(
            "write_kv: pages of keys, as rows or packed, and values must agree in shape, strides and dtype, and qkv in "
            "dtype"
        )
    if qkv_NKE.shape[1:] != (heads + 2 * kv_heads, width) or width % 2:
        raise ValueError(
            f"write_kv: qkv must be [N, {heads} + 2 * {kv_heads}, {width}], of even width, not {tuple(qkv_NKE.shape)}"
        )
    fits = cos.ndim == 2 and len(cos) == rows and 1 <= cos.shape[1] <= width // 2
    if not fits or sin.shape != cos.shape or not cos.dtype == sin.dtype == torch.float32:
        raise ValueError(
            f"write_kv: cos and sin must be float32 [{rows}, up to {width // 2}], not {list(cos.shape)} and "
            f"{list(sin.shape)}"
        )
    if slot_N.shape != (rows,) or slot_N.dtype != torch.int64:
        raise ValueError(f"write_kv: slot must be int64 [{rows}], not {slot_N.dtype} {tuple(slot_N.shape)}")
    if (q_norm is None) != (k_norm is None):
        raise ValueError("write_kv: q_norm and k_norm must be given together")
    for name, norm in (("q_norm", q_norm), ("k_norm", k_norm)):
        if norm is not None and (norm.shape != (width,) or norm.dtype != qkv_NKE.dtype):
            raise ValueError(
                f"write_kv: {name} must be {qkv_NKE.dtype} [{width}], not {norm.dtype} {tuple(norm.shape)}"
            )
