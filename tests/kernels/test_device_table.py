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


def branches(prefix: int, rows: int, **options: int) -> SegmentTable:
    """Build the table of a decode step of branches of one sequence, each with 64 tokens of its own."""
    shared, pages = prefix // 64, np.zeros((rows, prefix // 64 + 1), dtype=np.int32)
    pages[:, :shared], pages[:, shared] = np.arange(shared), shared + np.arange(rows)
    numbers = np.arange(rows, dtype=np.int32), np.full(rows, prefix + 63, dtype=np.int32), np.ones(rows, dtype=np.int32)
    return build_segment_table(*map(torch.from_numpy, (pages, *numbers)), page_size=64, unit_rows=32, **options)


def read_segments(table: SegmentTable, records: _core.DeviceRecords) -> set[tuple[int, ...]]:
    """Return (row, slot, position, tokens, pages) of every segment of every item, however items are chained."""
    found = set()
    for page, high, entry, count, _, _, _, start in records.items.tolist():
        position, slot = start, 0
        while position < start + high:
            tokens = min(min(max(position, table.shortest), table.segment), start + high - position)
            at = page + (position - start) // table.page_size
            pages = records.pages[at : at + tokens // table.page_size].tolist()
            for row, partial, *_ in records.entries[entry : entry + count].tolist():
                found.add((row, partial + slot, position, tokens, *pages))
            position, slot = position + tokens, slot + 1
    return found


def busiest(records: _core.DeviceRecords, programs: int) -> int:
    """Return the time of the program of a kv head that works longest, in tiles of 64 tokens; an item begins with 5."""
    time = [0] * programs
    for i, high in enumerate(records.items[:, 1].tolist()):
        turn, place = divmod(i, programs)
        time[programs - 1 - place if turn % 2 else place] += 5 + high // 64
    return max(time)


@pytest.mark.parametrize(
    ("rows", "prefix", "segment", "before", "after"),
    [(64, 4096, 512, 20, 13), (64, 16384, 512, 59, 37), (64, 16384, 1024, 49, 37), (256, 4096, 512, 59, 37),
     (8, 4096, 512, 13, 13), (64, 512, 512, 9, 9), (8, 4096, 256, 14, 9), (512, 1024, 512, 36, 21)],
)  # fmt: skip
def test_chains_read_the_same_segments_and_keep_programs_equally_busy(
    rows: int, prefix: int, segment: int, before: int, after: int
) -> None:
    """An H200 runs 132 programs at once, 16 of each of 8 kv heads."""
    plain, chained = (branches(prefix, rows, segment=segment, chain_programs=count) for count in (0, 16))
    records = _core.DeviceRecords(plain), _core.DeviceRecords(chained)
    assert read_segments(plain, records[0]) == read_segments(chained, records[1])
    assert [busiest(part, 16) for part in records] == [before, after]
    if before == after:
        assert np.array_equal(records[0].items, records[1].items), "chains that win nothing are not made"


def test_shared_parts_are_what_rows_hold_in_the_same_pages() -> None:
    """Unfinished segments share the pages that a comparison of every pair of neighbours finds."""
    pages = np.arange(7 * 72, dtype=np.int32).reshape(7, 72)
    pages[1:, :64] = pages[0, :64]
    pages[1:4, 64:68] = pages[0, 64:68]  # four rows share 4 pages, two others 7, and one has all pages for itself
    pages[5, 64:71] = pages[4, 64:71]
    last = np.array([4399, 4352, 4380, 4361, 4570, 4575, 4100], dtype=np.int32)
    numbers = np.arange(7, dtype=np.int32), last, np.ones(7, dtype=np.int32)
    table = build_segment_table(
        *map(torch.from_numpy, (pages, *numbers)), page_size=64, segment=512, unit_rows=8, resume_tokens=64
    )
    records = _core.DeviceRecords(table)
    assert records.rows[:, 5].tolist() == [256] * 4 + [0] * 3, "two rows save too little"
    (item,) = [item for item in records.items.tolist() if item[7] == -1]
    assert item[1] == item[4] == 256
    assert records.pages[item[0] : item[0] + 4].tolist() == pages[0, 64:68].tolist()
    entries = records.entries[item[2] : item[2] + item[3], :3].tolist()
    assert entries == [[row, sum(records.rows[row, :2]), 255] for row in range(4)]
    slots = [slot for first, count, *_, resumed, _, _ in records.rows.tolist()
             for slot in range(first, first + count + (resumed > 0))]  # fmt: skip
    assert slots == list(range(records.num_partials)), "no slot is used twice"


def test_negative_numbers_of_programs_and_tokens_are_refused() -> None:
    for options in ({"chain_programs": -1}, {"resume_tokens": -64}):
        with pytest.raises(ValueError, match="chain_programs and resume_tokens must not be negative"):
            branches(512, 2, segment=512, **options)
