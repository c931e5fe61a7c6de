"""Segment tables in buffers: reading a buffer of any capacity back returns the table."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from genssd import _core
from genssd.kernels.attention import SegmentTable, build_segment_table, paged_attention
from genssd.kernels.device_table import ALIGNMENT, ENTRY, ITEM, ROW, UNIT, Capacity, DeviceTable, upload, write_table

CPU = torch.device("cpu")


def table_of(rows: int, window: int = 0, first: int = 20) -> SegmentTable:
    """Build the table of sequences of about 20 tokens, two per prompt."""
    pages = np.arange(rows * 8, dtype=np.int32).reshape(rows, 8)
    pages[1::2, :4] = pages[::2, :4][: rows // 2]
    starts = np.arange(rows, dtype=np.int32) % 5 + first
    return build_segment_table(
        *map(torch.from_numpy, (pages, np.arange(rows, dtype=np.int32), starts, np.ones(rows, dtype=np.int32))),
        page_size=4, segment=8, window=window, unit_rows=4,
    )  # fmt: skip


def assert_holds(there: DeviceTable, table: SegmentTable) -> None:
    records = _core.DeviceRecords(table)
    assert there.header[:2].tolist() == [len(records.items), len(records.units)]
    parts = {name: getattr(records, name) for name in ("items", "entries", "units", "rows")}
    for name, part in {**parts, "pages": table.pages, "position": table.position}.items():
        expected = torch.tensor(part).flatten()
        assert torch.equal(getattr(there, name)[: len(expected)], expected), name


@pytest.mark.parametrize("window", [0, 9])
@pytest.mark.parametrize("rows", [1, 2, 7])
def test_a_table_is_read_back(rows: int, window: int) -> None:
    table = table_of(rows, window)
    there = DeviceTable.upload(table, CPU)
    assert_holds(there, table)
    assert (there.num_rows, there.window, there.page_size) == (rows, window, 4)
    assert there.largest_page == table.largest_page
    assert there.capacity.item_rows == max(_core.DeviceRecords(table).items[:, 3], default=0)
    for part in (there.items, there.entries, there.units, there.rows, there.pages, there.position):
        assert part.data_ptr() % 16 == there.buffer.data_ptr() % 16


def test_a_buffer_is_filled_again_with_other_tables() -> None:
    capacity = Capacity.required_by(table_of(7)).enlarge(Capacity.required_by(table_of(3)), rows=8, item_rows=4)
    host = np.full(capacity.length, -9, dtype=np.int32)
    for rows in (7, 3, 5):
        table = table_of(rows)
        write_table(table, capacity, host)
        there = DeviceTable.from_buffer(torch.from_numpy(host), capacity, table)
        assert_holds(there, table)
        assert there.num_rows == 8
        # the rows that fill it up have no partial result, no segment, and stand at 0
        assert not bool(there.rows[ROW * rows :].any())
        assert not bool(there.position[rows:].any())


def test_a_table_that_does_not_fit_is_not_written() -> None:
    capacity = Capacity.required_by(table_of(3))
    with pytest.raises(AssertionError, match="outgrew"):
        write_table(table_of(7), capacity, np.zeros(10 * capacity.length, dtype=np.int32))


def test_growth_covers_both_and_is_rare() -> None:
    small = Capacity.required_by(table_of(3))
    grown = small.enlarge(small, rows=4, item_rows=4)
    assert grown.covers(small)
    assert not small.covers(grown)
    unmet = dict.fromkeys(small.__slots__, 10**6) | {"finishes": True}
    small = dataclasses.replace(small, finishes=False)
    assert all(not small.covers(dataclasses.replace(small, **{name: unmet[name]})) for name in small.__slots__)
    sizes, capacity = set(), grown
    for rows in range(3, 200):
        needed = Capacity.required_by(table_of(rows))
        if not capacity.covers(dataclasses.replace(needed, rows=0)):
            capacity = needed.enlarge(capacity, rows=rows, item_rows=4)
        assert capacity.covers(dataclasses.replace(needed, rows=0))
        sizes.add(capacity.partials)
    assert len(sizes) < 10


def test_parts_do_not_overlap() -> None:
    for rows in range(1, 9):
        capacity = Capacity.required_by(table_of(rows))
        offsets = capacity.offsets
        sizes = (ITEM * capacity.items, ENTRY * capacity.entries, UNIT * capacity.units, ROW * capacity.rows)
        lengths = (4, *sizes, capacity.pages, capacity.rows)
        for start, end, length in zip(offsets[:-1], offsets[1:], lengths, strict=True):
            assert start % ALIGNMENT == 0
            assert start + length <= end


def test_an_upload_is_a_copy() -> None:
    for dtype in (np.int32, np.int64):
        array = np.arange(5, dtype=dtype)
        there = upload(array, CPU)
        array[:] = 0
        assert there.tolist() == [0, 1, 2, 3, 4]
        assert there.dtype == torch.from_numpy(array).dtype


def test_a_device_table_is_refused_where_no_triton_kernel_runs() -> None:
    table = DeviceTable.upload(table_of(2), CPU)
    kv = torch.zeros(2, 16, 4, 1, 8)
    with pytest.raises(ValueError, match="takes the segment table itself"):
        paged_attention(torch.zeros(2, 1, 8), kv[0], kv[1], table, scale=1.0)
