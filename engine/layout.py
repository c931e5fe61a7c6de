"""Lays tokens out in the cache: makes room for them on their paths and finds what each of them reads."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import torch

from genssd.engine.tree import BranchTree, Path
from genssd.kernels.attention import QUERY_VECTORS_PER_UNIT, SEGMENT_TOKENS, SegmentTable, build_segment_table


def unit_rows(group: int, device: torch.device) -> int:
    """Rows that read a segment together at most. group: query heads per kv head."""
    return max(1, QUERY_VECTORS_PER_UNIT[device.type] // group)


def lay_out(
    tree: BranchTree, paths: Sequence[Path], counts: Sequence[int], *, windows: Collection[int], group: int
) -> dict[int, SegmentTable]:
    """Append so many tokens to each path; return their table for each window. group: query heads per kv head.

    A path may come twice: its tokens follow each other. Raises CapacityError when the pool has too few pages.
    """
    first = []
    for path, count in zip(paths, counts, strict=True):
        first.append(path.length)
        tree.append(path, count)
    device, page_size = tree.pool.kv.device, tree.pool.page_size
    held = torch.from_numpy(tree.tables.rows)
    # by way of numpy, which reads lists three times as fast
    numbers = torch.from_numpy(np.array([[path.leaf.table for path in paths], first, counts], dtype=np.int32))
    return {
        window: build_segment_table(
            held,
            *numbers,
            page_size=page_size,
            segment=-(-SEGMENT_TOKENS[device.type] // page_size) * page_size,
            window=window,
            unit_rows=unit_rows(group, device),
        )
        for window in windows
    }
