"""A segment table on the device that reads it: one int32 buffer, which is filled by one copy.

    header | items | entries | pages | position | row_partial        each from a multiple of 16 bytes on

The first entry of the header is the number of items. The rest has room for more than the table needs, so that a
captured graph can read another table from the same buffer: rows beyond the table's own see nothing.

Nothing here waits for the device. A copy starts from pinned memory, which the allocator does not hand out again before
the copies from it are done: the next table is prepared while the device still reads this one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from genssd import _core

HEADER = 4
ALIGNMENT = 4  # entries of 16 bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """How much a buffer has room for. item_rows: rows of one item."""

    items: int
    entries: int
    pages: int
    rows: int
    partials: int
    item_rows: int

    @staticmethod
    def required_by(table: _core.SegmentTable) -> Capacity:
        """What a table needs."""
        items = table.items
        return Capacity(
            items=len(items),
            entries=len(table.entries),
            pages=len(table.pages),
            rows=table.num_rows,
            partials=int(table.row_partial[-1]),
            item_rows=int(items[:, 4].max()) if len(items) else 0,
        )

    def covers(self, other: Capacity) -> bool:
        pairs = zip(self._growing(), other._growing(), strict=True)
        fixed = self.rows >= other.rows and self.item_rows >= other.item_rows
        return fixed and all(mine >= theirs for mine, theirs in pairs)

    def enlarge(self, other: Capacity, *, rows: int, item_rows: int) -> Capacity:
        """Room for both and so many rows, in sizes that are powers of two: it is outgrown rarely."""
        sizes = (1 << max(a, b, 1).bit_length() for a, b in zip(self._growing(), other._growing(), strict=True))
        items, entries, pages, partials = sizes
        return Capacity(items=items, entries=entries, pages=pages, rows=rows, partials=partials, item_rows=item_rows)

    @property
    def length(self) -> int:
        """int32 entries of the buffer."""
        return self.offsets[-1]

    @property
    def offsets(self) -> tuple[int, ...]:
        """Where each part begins, and the end."""
        found = [0]
        for size in (HEADER, 6 * self.items, 2 * self.entries, self.pages, self.rows, self.rows + 1):
            found.append(found[-1] + -(-size // ALIGNMENT) * ALIGNMENT)
        return tuple(found)

    def _growing(self) -> tuple[int, ...]:
        """What grows with the sequences."""
        return self.items, self.entries, self.pages, self.partials


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceTable:
    """buffer: int32 [capacity.length]. Has room for capacity.rows rows, and counts as having so many."""

    buffer: Tensor
    capacity: Capacity
    page_size: int
    window: int
    largest_page: int
    """Of the table that was there when it was made."""

    @staticmethod
    def upload(table: _core.SegmentTable, device: torch.device) -> DeviceTable:
        """Put a table on a device, in a buffer of its own, without waiting."""
        capacity = Capacity.required_by(table)
        host = allocate_host_buffer(capacity.length, torch.int32, device)
        write_table(table, capacity, host.numpy())
        return DeviceTable.from_buffer(host.to(device, non_blocking=True), capacity, table)

    @staticmethod
    def from_buffer(buffer: Tensor, capacity: Capacity, table: _core.SegmentTable) -> DeviceTable:
        """The view of a buffer that tables like this one are copied into."""
        return DeviceTable(
            buffer=buffer,
            capacity=capacity,
            page_size=table.page_size,
            window=table.window,
            largest_page=table.largest_page,
        )

    @property
    def num_rows(self) -> int:
        return self.capacity.rows

    @property
    def header(self) -> Tensor:
        return self._part(0, HEADER)

    @property
    def items(self) -> Tensor:
        """int32 [6 * items], as all parts one after the other."""
        return self._part(1, 6 * self.capacity.items)

    @property
    def entries(self) -> Tensor:
        return self._part(2, 2 * self.capacity.entries)

    @property
    def pages(self) -> Tensor:
        return self._part(3, self.capacity.pages)

    @property
    def position(self) -> Tensor:
        return self._part(4, self.capacity.rows)

    @property
    def row_partial(self) -> Tensor:
        return self._part(5, self.capacity.rows + 1)

    def _part(self, index: int, size: int) -> Tensor:
        start = self.capacity.offsets[index]
        return self.buffer[start : start + size]


def write_table(table: _core.SegmentTable, capacity: Capacity, into: NDArray[np.int32]) -> None:
    """Write a table into a buffer of capacity.length entries; rows beyond its own see nothing."""
    assert capacity.covers(Capacity.required_by(table)), "the table outgrew its buffer"
    into[0] = len(table.items)
    parts = (table.items.reshape(-1), table.entries.reshape(-1), table.pages, table.position, table.row_partial)
    offsets = capacity.offsets[1:]
    for start, part in zip(offsets, parts, strict=False):
        into[start : start + len(part)] = part
    rows, positions, partials = table.num_rows, offsets[3], offsets[4]
    into[positions + rows : positions + capacity.rows] = 0
    into[partials + rows : partials + capacity.rows + 1] = table.row_partial[-1]


def upload(array: NDArray[np.int32] | NDArray[np.int64], device: torch.device) -> Tensor:
    """A copy of an array on a device; the host does not wait for it."""
    host = allocate_host_buffer(len(array), torch.int32 if array.dtype == np.int32 else torch.int64, device)
    host.numpy()[:] = array
    return host.to(device, non_blocking=True)


def allocate_host_buffer(length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory of the host that a copy to the device can start from while the host goes on."""
    return torch.empty(length, dtype=dtype, pin_memory=device.type == "cuda")
