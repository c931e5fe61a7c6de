"""Lays tokens out in the cache: makes room for them on their paths and describes them to the forward pass."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from genssd.engine.batch import Batch
from genssd.engine.tree import BranchTree, Path
from genssd.kernels.attention import SEGMENT, UNIT_ROWS, segment_table


def lay_out(
    tree: BranchTree, paths: Sequence[Path], counts: Sequence[int], *, windows: Collection[int], group: int
) -> Batch:
    """Append so many tokens to each path, and describe them. group: query heads per kv head.

    A path may come twice: its tokens follow each other. Raises CapacityError when the pool has too few pages.
    """
    first = []
    for path, count in zip(paths, counts, strict=True):
        first.append(path.length)
        tree.append(path, count)
    device, page_size = tree.pool.kv.device, tree.pool.page_size
    held = torch.from_numpy(tree.tables.rows)
    numbers = torch.tensor([[path.leaf.table for path in paths], first, counts], dtype=torch.int32)
    tables = {
        window: segment_table(
            held,
            *numbers,
            page_size=page_size,
            segment=-(-SEGMENT[device.type] // page_size) * page_size,
            window=window,
            unit_rows=max(1, UNIT_ROWS // group),
        )
        for window in windows
    }
    rows = next(iter(tables.values()))  # where rows lie is the same in all
    return Batch(
        position_N=torch.tensor(rows.position, device=device),
        slot_N=torch.tensor(rows.slot, device=device),
        tables=tables,
    )
