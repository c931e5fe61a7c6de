"""Segment tables in device memory: each is one int32 buffer, which one copy fills.

    header | items | entries | units | rows | pages | position        each begins at a multiple of 16 bytes

header      number of items, number of units
items       items whose partial results are stored, the longest first: page index, number of tokens up to the last that
            some row sees (high), index of the first entry, number of entries, number of tokens up to the last that
            every row sees (full_high), first token that some row sees (low) and that every row sees (full_low),
            position of its first token (-1: a shared part of unfinished segments). An item is a segment, a shared part,
            or a chain: segments that follow each other, and that the same rows read completely
entries     of the items: row, slot of its first partial result (those of a chain follow it), last token of the item
            that it sees
units       units whose rows are consecutive rows of one sequence, the longest first: page index, position of the first
            token of the first page, first row, its position, number of rows
rows        every row: its first partial result, how many it has (-1: a unit computes the row), and its last segment
            where no other row reads all of it: page index, tokens (0: it is an item), first token that the row sees,
            number of tokens of the shared part that it begins with, whose sums are in the slot after the row's partial
            results
pages       page numbers
position    position of every row

The parts can be larger than a table requires, so that a captured graph can read another table from the same buffer:
rows after the table's own see no position.

No function of this file waits for the device. A copy starts from pinned memory, which the allocator does not reuse
before the copies from it are done: the next table is prepared while the device still reads this one.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from genssd import _core

HEADER, ITEM, ENTRY, UNIT, ROW = 4, 8, 4, 8, 8  # int32 entries of the header and of a record of each part
ALIGNMENT = 4  # int32 entries of 16 bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class TableOptions:
    """What the segment tables of a model are made with; see `attention.build_segment_table`."""

    segment: int
    chain_programs: int = 0
    resume_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """Sizes that the parts of a buffer have room for.

    item_rows, unit_rows: largest number of rows of one item and of one unit. finishes: whether a row exists that no
    unit computes.
    """

    items: int
    entries: int
    units: int
    pages: int
    rows: int
    partials: int
    item_rows: int
    unit_rows: int
    finishes: bool

    @staticmethod
    def required_by(table: _core.SegmentTable) -> Capacity:
        """Return the sizes that a table requires."""
        records = _core.DeviceRecords(table)
        return Capacity(
            items=len(records.items),
            entries=len(records.entries),
            units=len(records.units),
            pages=len(records.pages),
            rows=table.num_rows,
            partials=records.num_partials,
            item_rows=records.largest_item,
            unit_rows=records.largest_unit,
            finishes=records.has_other_rows,
        )

    def covers(self, other: Capacity) -> bool:
        """Return whether every size is at least that of the other capacity."""
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return all(size >= required for size, required in pairs)

    def enlarge(self, other: Capacity, *, rows: int, item_rows: int) -> Capacity:
        """Return a capacity for both, with the given rows and item_rows and powers of two for the other sizes.

        Powers of two make it rare that a search outgrows its buffer.
        """
        pairs = zip(self._growing_sizes(), other._growing_sizes(), strict=True)
        sizes = (1 << max(a, b, 1).bit_length() for a, b in pairs)
        items, entries, pages, partials = sizes
        return Capacity(
            items=items, entries=entries, units=max(self.units, other.units), pages=pages, rows=rows,
            partials=partials, item_rows=item_rows, unit_rows=max(self.unit_rows, other.unit_rows), finishes=True,
        )  # fmt: skip

    @property
    def length(self) -> int:
        """Number of int32 entries of the buffer."""
        return self.offsets[-1]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of int32 entries of each part."""
        return (
            HEADER, ITEM * self.items, ENTRY * self.entries, UNIT * self.units, ROW * self.rows, self.pages, self.rows,
        )  # fmt: skip

    @property
    def offsets(self) -> tuple[int, ...]:
        """Index of the first entry of each part, then the length of the buffer."""
        bounds = [0]
        for size in self.sizes:
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
    segment: int
    """Tokens of a segment, except for the shorter ones before the first multiple."""
    shortest: int
    """Tokens of the first segment."""
    chained: bool
    """Whether an item can be several segments."""
    resume_tokens: int
    """Tokens of which the shared part of unfinished segments is a multiple; 0: none is shared."""
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
            segment=table.segment,
            shortest=table.shortest,
            chained=table.chain_programs > 0 and table.window == 0,
            resume_tokens=0 if table.window else table.resume_tokens,
            largest_page=table.largest_page,
        )

    @property
    def num_rows(self) -> int:
        return self.capacity.rows

    @property
    def header(self) -> Tensor:
        return self._part(0)

    @property
    def items(self) -> Tensor:
        """The items, int32 [ITEM * items]: like all parts, without a second dimension."""
        return self._part(1)

    @property
    def entries(self) -> Tensor:
        return self._part(2)

    @property
    def units(self) -> Tensor:
        return self._part(3)

    @property
    def rows(self) -> Tensor:
        return self._part(4)

    @property
    def pages(self) -> Tensor:
        return self._part(5)

    @property
    def position(self) -> Tensor:
        return self._part(6)

    def _part(self, index: int) -> Tensor:
        start = self.capacity.offsets[index]
        return self.buffer[start : start + self.capacity.sizes[index]]


def write_table(table: _core.SegmentTable, capacity: Capacity, into: NDArray[np.int32]) -> None:
    """Write a table into a host buffer of capacity.length entries; rows after the table's own see no position."""
    assert capacity.covers(Capacity.required_by(table)), "the table outgrew its buffer"
    records, offsets, rows = _core.DeviceRecords(table), capacity.offsets, table.num_rows
    into[:HEADER] = (len(records.items), len(records.units), 0, 0)
    parts = (records.items, records.entries, records.units, records.rows, records.pages, table.position)
    for start, part in zip(offsets[1:], parts, strict=False):
        into[start : start + part.size] = part.reshape(-1)
    into[offsets[4] + ROW * rows : offsets[4] + ROW * capacity.rows] = 0
    into[offsets[6] + rows : offsets[6] + capacity.rows] = 0


def upload(array: NDArray[np.int32] | NDArray[np.int64], device: torch.device) -> Tensor:
    """Copy an array to a device, without waiting for the copy, and return it as a tensor of the same dtype."""
    host = allocate_host_buffer(len(array), torch.int32 if array.dtype == np.int32 else torch.int64, device)
    host.numpy()[:] = array
    return host.to(device, non_blocking=True)


def allocate_host_buffer(length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Allocate host memory, pinned for a CUDA device: a copy from it does not make the host wait."""
    return torch.empty(length, dtype=dtype, pin_memory=device.type == "cuda")
