"""Placement of new tokens in the cache: room on their paths, and the segment tables of what each of them reads."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import torch

from genssd.engine.cache.tree import BranchTree, Path
from genssd.engine.models.pages import PagePool
from genssd.kernels.attention import QUERY_VECTORS_PER_UNIT, SegmentTable, build_segment_table, choose_table_options


def rows_per_unit(group: int, device: torch.device) -> int:
    """Return how many rows read a segment together at most. group: number of query heads per kv head."""
    return max(1, QUERY_VECTORS_PER_UNIT[device.type] // group)


def append_tokens(
    tree: BranchTree[PagePool], paths: Sequence[Path], counts: Sequence[int], *, windows: Collection[int], group: int
) -> dict[int, SegmentTable]:
    """Append so many tokens to each path and return their segment table for each attention window.

    group: number of query heads per kv head. A path may come twice: its tokens follow each other. Raises CapacityError
    when the pool has too few pages.
    """
    first = []
    for path, count in zip(paths, counts, strict=True):
        first.append(path.length)
        tree.append(path, count)
    kv, page_size = tree.pool.kv, tree.pool.page_size
    kv_heads, head_dim = kv.shape[-2:]
    options = choose_table_options(kv.device, kv.dtype, (group * kv_heads, kv_heads, head_dim))
    page_tables = torch.from_numpy(tree.tables.rows)
    # through numpy, which reads lists three times as fast
    table_first_count = torch.from_numpy(np.array([[path.leaf.table for path in paths], first, counts], dtype=np.int32))
    return {
        window: build_segment_table(
            page_tables,
            *table_first_count,
            page_size=page_size,
            segment=-(-options.segment // page_size) * page_size,
            chain_programs=options.chain_programs,
            resume_tokens=options.resume_tokens,
            window=window,
            unit_rows=rows_per_unit(group, kv.device),
        )
        for window in windows
    }
