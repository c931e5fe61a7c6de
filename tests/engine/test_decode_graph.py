"""The parts of a captured step that need no GPU: buckets, and the layout of its inputs in one buffer."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from genssd import _core
from genssd.engine.models.decode_graph import BUCKETS, StepLayout, bucket_for
from genssd.kernels.attention import SegmentTable, build_segment_table


def tables_of(rows: int, first: int = 20) -> dict[int, SegmentTable]:
    pages = torch.arange(rows * 16, dtype=torch.int32).view(rows, 16)
    one = torch.ones(rows, dtype=torch.int32)
    return {
        window: build_segment_table(
            pages, torch.arange(rows, dtype=torch.int32), one * first, one, page_size=4, segment=8, window=window
        )
        for window in (0, 9)
    }


def test_buckets() -> None:
    assert [bucket_for(n) for n in (1, 3, 8, 33, 48, 49, 255, 256, 257)] == [1, 4, 8, 48, 48, 64, 256, 256, None]
    assert list(BUCKETS) == sorted(set(BUCKETS))


@pytest.mark.parametrize("rows", [1, 3, 8, 20])
def test_a_step_is_read_back(rows: int) -> None:
    bucket, tables, ids = bucket_for(rows), tables_of(rows), list(range(100, 100 + rows))
    assert bucket is not None
    layout = StepLayout.for_tables(bucket, 64, tables)
    host = np.full(layout.length, -9, dtype=np.int32)
    layout.pack(tables, host)
    ids_N, batch = layout.read(torch.from_numpy(host), tables)
    ids_N[:rows] = torch.tensor(ids)
    padding = bucket - rows
    assert ids_N.tolist() == ids + [0] * padding
    assert batch.slot_N.tolist() == tables[0].slot.tolist() + [-1] * padding
    assert batch.position_N.tolist() == tables[0].position.tolist() + [0] * padding
    for window, table in tables.items():
        table = batch.tables[window]
        assert table.window == window
        assert table.num_rows == bucket
        records = _core.DeviceRecords(tables[window])
        for name in ("items", "entries", "rows"):
            expected = getattr(records, name).reshape(-1)
            assert getattr(table, name)[: len(expected)].tolist() == expected.tolist()


def test_the_views_are_of_the_buffer() -> None:
    """A graph reads what is copied into the buffer later."""
    layout = StepLayout.for_tables(4, 64, tables_of(3))
    buffer = torch.zeros(layout.length, dtype=torch.int32)
    ids_N, batch = layout.read(buffer, tables_of(3))
    host = np.zeros(layout.length, dtype=np.int32)
    for first in (20, 13):
        layout.pack(tables_of(3, first), host)
        buffer.copy_(torch.from_numpy(host))
        ids_N[:3] = torch.tensor([7, 8, first])
        assert ids_N.tolist() == [7, 8, first, 0]
        assert batch.position_N.tolist() == [first] * 3 + [0]
    starts = {
        x.data_ptr() - buffer.data_ptr() for x in (ids_N, batch.slot_N, *(t.buffer for t in batch.tables.values()))
    }
    assert len(starts) == 4
    assert all(start % 16 == 0 for start in starts)


def test_a_layout_that_is_outgrown() -> None:
    layout = StepLayout.for_tables(4, 64, tables_of(3))
    assert layout.covers(tables_of(4))
    longer = tables_of(4, first=60)
    assert not layout.covers(longer)
    grown = StepLayout.for_tables(4, 64, longer, layout)
    assert grown.covers(longer)
    assert grown.covers(tables_of(4))
    assert all(grown.tables[window].covers(layout.tables[window]) for window in (0, 9))
