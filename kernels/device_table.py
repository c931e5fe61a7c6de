"""Segment tables in device memory: each is one int32 buffer, which one copy fills.

    header | items | entries | pages | position | row_partial        each begins at a multiple of 16 bytes

The first entry of the header is the number of items. The other parts can be larger than a table requires, so that a
captured graph can read another table from the same buffer: rows after the table's own see no position.

No function of this file waits for the device. A copy starts from pinned memory, which the allocator does not reuse
before the copies from it are done: the next table is prepared while the device still reads this one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from genssd import _core

HEADER = 4  # int32 entries of the header
ALIGNMENT = 4  # int32 entries of 16 bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """Sizes that the parts of a buffer have room for. item_rows: largest number of rows of one item."""

    items: int
    entries: int
    pages: int
    rows: int
    partials: int
    item_rows: int

    @staticmethod
    def required_by(table: _core.SegmentTable) -> Capacity:
        """Return the sizes that a table requires."""
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
        """Return whether every size is at least that of the other capacity."""
        pairs = zip(self._growing_sizes(), other._growing_sizes(), strict=True)
        fixed = self.rows >= other.rows and self.item_rows >= other.item_rows
        return fixed and all(size >= required for size, required in pairs)

    def enlarge(self, other: Capacity, *, rows: int, item_rows: int) -> Capacity:
        """Return a capacity for both, with the given rows and item_rows and powers of two for the other sizes.

        Powers of two make it rare that a search outgrows its buffer.
        """
        pairs = zip(self._growing_sizes(), other._growing_sizes(), strict=True)
        sizes = (1 << max(a, b, 1).bit_length() for a, b in pairs)
        items, entries, pages, partials = sizes
        return Capacity(items=items, entries=entries, pages=pages, rows=rows, partials=partials, item_rows=item_rows)

    @property
    def length(self) -> int:
        """Number of int32 entries of the buffer."""
        return self.offsets[-1]

    @property
    def offsets(self) -> tuple[int, ...]:
        """Index of the first entry of each part, then the length of the buffer."""
        bounds = [0]
        for size in (HEADER, 6 * self.items, 2 * self.entries, self.pages, self.rows, self.rows + 1):
            bounds.append(bounds[-1] + -(-size // ALIGNMENT) * ALIGNMENT)
        return tuple(bounds)

    def _growing_sizes(self) -> tuple[int, ...]:
        """Return the sizes that grow with the length of the sequences."""
        return self.items, self.entries, self.pages, self.partials


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceTable:
    """Segment table in one buffer on a device. It counts as having capacity.rows rows, even where it holds fewer."""

    buffer: Tensor
    """int32 [capacity.length]."""
    capacity: Capacity
    page_size: int
    window: int
    largest_page: int
    """Largest page number of the table that it was made for."""

    @staticmethod
    def upload(table: _core.SegmentTable, device: torch.device) -> DeviceTable:
        """Copy a table into a new buffer on a device, without waiting for the copy."""
        capacity = Capacity.required_by(table)
        host = allocate_host_buffer(capacity.length, torch.int32, device)
        write_table(table, capacity, host.numpy())
        return DeviceTable.from_buffer(host.to(device, non_blocking=True), capacity, table)

    @staticmethod
    def from_buffer(buffer: Tensor, capacity: Capacity, table: _core.SegmentTable) -> DeviceTable:
        """Return the view of a buffer into which tables of this table's page size and window are copied."""
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
        """The items, int32 [6 * items]: like all parts, without a second dimension."""
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
    """Write a table into a host buffer of capacity.length entries; rows after the table's own see no position."""
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
    """Copy an array to a device, without waiting for the copy, and return it as a tensor of the same dtype."""
    host = allocate_host_buffer(len(array), torch.int32 if array.dtype == np.int32 else torch.int64, device)
    host.numpy()[:] = array
    return host.to(device, non_blocking=True)


def allocate_host_buffer(length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Allocate host memory, pinned for a CUDA device: a copy from it does not make the host wait."""
    return torch.empty(length, dtype=dtype, pin_memory=device.type == "cuda")
