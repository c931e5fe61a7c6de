"""Writes into a paged key-value cache.

Shapes:  N rows   P pages   S page size   G kv heads   E head dim   L layers
"""

from __future__ import annotations

from torch import Tensor


def write_kv(k_NGE: Tensor, v_NGE: Tensor, k_pages_PSGE: Tensor, v_pages_PSGE: Tensor, slot_N: Tensor) -> None:
    """Store each row's key and value at slot_N (int64; slot = page * page_size + offset). Slots must be distinct."""
    k_pages_PSGE.flatten(0, 1).index_copy_(0, slot_N, k_NGE)
    v_pages_PSGE.flatten(0, 1).index_copy_(0, slot_N, v_NGE)


def copy_pages(kv_L2PSGE: Tensor, source_N: Tensor, destination_N: Tensor) -> None:
    """Copy whole pages, keys and values of all layers; destinations (int64) must be distinct and not be sources."""
    kv_L2PSGE.index_copy_(2, destination_N, kv_L2PSGE.index_select(2, source_N))
