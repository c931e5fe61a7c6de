"""Decode steps as captured CUDA graphs: a step is one copy and one launch, however many layers there are.

A graph is captured for a bucket of rows and reads all its inputs from one buffer on the device:

    ids | slots | the segment table of every window        int32 entries; ids and slots are int64, two entries each

Rows that fill the bucket up have the id 0 and a negative slot: they write nothing into the cache, see nothing, and
their hidden states are cut off. A step whose tables outgrow the buffer captures the graph anew, in a larger one.

Shapes:  N rows   D model width
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from genssd.engine.batch import Batch
from genssd.engine.layout import unit_rows
from genssd.engine.model import Decoder
from genssd.kernels.attention import SegmentTable
from genssd.kernels.device_table import ALIGNMENT, Capacity, DeviceTable, allocate_host_buffer, write_table

BUCKETS = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256)


def bucket_for(rows: int) -> int | None:
    """The smallest bucket that has room for so many rows, None where none has."""
    at = bisect_left(BUCKETS, rows)
    return BUCKETS[at] if at < len(BUCKETS) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class StepLayout:
    """Where the inputs of a step lie in its buffer. rows: of the bucket. tables: by window."""

    rows: int
    tables: Mapping[int, Capacity]

    @staticmethod
    def of(
        rows: int, item_rows: int, tables: Mapping[int, SegmentTable], before: StepLayout | None = None
    ) -> StepLayout:
        """Room for tables like these, and for all that there was room for before. item_rows: of an item at most."""
        needed = {window: Capacity.required_by(table) for window, table in tables.items()}
        known = needed if before is None else before.tables
        return StepLayout(
            rows=rows,
            tables={
                window: size.enlarge(known[window], rows=rows, item_rows=item_rows) for window, size in needed.items()
            },
        )

    def covers(self, tables: Mapping[int, SegmentTable]) -> bool:
        return all(self.tables[window].covers(Capacity.required_by(table)) for window, table in tables.items())

    @property
    def length(self) -> int:
        """int32 entries of the buffer."""
        return 2 * self._wide + sum(capacity.length for capacity in self.tables.values())

    def pack(self, tables: Mapping[int, SegmentTable], into: NDArray[np.int32]) -> None:
        """Write a step, but for its ids, into a buffer of the host."""
        slot_N, slots = self._int64(into, 1), next(iter(tables.values())).slot
        slot_N[:] = -1
        slot_N[: len(slots)] = slots
        for window, start in self._starts().items():
            write_table(tables[window], self.tables[window], into[start : start + self.tables[window].length])

    def pack_ids(self, ids: Sequence[int], into: NDArray[np.int32]) -> None:
        """Write the ids of a step into a buffer of the host."""
        ids_N = self._int64(into, 0)
        ids_N[:] = 0
        ids_N[: len(ids)] = ids

    def read(self, buffer: Tensor, tables: Mapping[int, SegmentTable]) -> tuple[Tensor, Batch]:
        """ids and what else the forward pass needs, as views of the buffer; tables: like those that will lie there."""
        parts = (buffer[i * self._wide :][: 2 * self.rows].view(torch.int64) for i in (0, 1))
        ids_N, slot_N = parts
        there = {
            window: DeviceTable.from_buffer(
                buffer[start : start + self.tables[window].length], self.tables[window], tables[window]
            )
            for window, start in self._starts().items()
        }
        return ids_N, Batch(position_N=next(iter(there.values())).position, slot_N=slot_N, tables=there)

    @property
    def _wide(self) -> int:
        """Entries of the ids, and of the slots."""
        return -(-2 * self.rows // ALIGNMENT) * ALIGNMENT

    def _int64(self, buffer: NDArray[np.int32], part: int) -> NDArray[np.int64]:
        start = part * self._wide
        return buffer[start : start + 2 * self.rows].view(np.int64)

    def _starts(self) -> dict[int, int]:
        """Where the table of each window begins."""
        found, start = {}, 2 * self._wide
        for window, capacity in self.tables.items():
            found[window] = start
            start += capacity.length
        return found


@dataclass(frozen=True, slots=True)
class StagedStep:
    """A step in memory of the host, but for its ids."""

    layout: StepLayout
    tables: Mapping[int, SegmentTable]
    host: Tensor


@dataclass(frozen=True, slots=True)
class _Captured:
    layout: StepLayout
    buffer: Tensor
    graph: torch.cuda.CUDAGraph
    hidden_ND: Tensor


class DecodeGraphs:
    """The captured steps of one decoder over one cache, [L, 2, P, S, G, E], which both must stay where they are.

    Once a bucket is captured a step does not wait for the device: its inputs are packed into pinned memory, which the
    allocator does not hand out again before the copy from it is done, while the device may still be at the step before.
    """

    def __init__(self, decoder: Decoder, kv: Tensor) -> None:
        self._decoder = decoder
        self._kv = kv
        self._captured: dict[int, _Captured] = {}
        # graphs never run at once, so they share their memory
        self._pool = torch.cuda.graph_pool_handle()

    def stage(self, tables: Mapping[int, SegmentTable]) -> StagedStep:
        """Lay a step out, for one token of each of at most BUCKETS[-1] sequences. The device may be at another."""
        count = next(iter(tables.values())).num_rows
        rows = bucket_for(count)
        assert rows is not None, "more rows than the largest bucket"
        step = self._captured.get(rows)
        layout = None if step is None else step.layout
        if layout is None or not layout.covers(tables):
            c = self._decoder.config
            item_rows = unit_rows(c.num_attention_heads // c.num_key_value_heads, self._kv.device)
            layout = StepLayout.of(rows, item_rows, tables, layout)
        host = allocate_host_buffer(layout.length, torch.int32, self._kv.device)
        layout.pack(tables, host.numpy())
        return StagedStep(layout, tables, host)

    @torch.inference_mode()
    def forward(self, staged: StagedStep, ids: Sequence[int]) -> Tensor:
        """As Decoder.forward: hidden states [N, D]."""
        layout = staged.layout
        layout.pack_ids(ids, staged.host.numpy())
        step = self._captured.get(layout.rows)
        if step is None or step.layout is not layout:
            step = self._captured[layout.rows] = self._capture(staged)
        else:
            step.buffer.copy_(staged.host, non_blocking=True)
        step.graph.replay()
        return step.hidden_ND[: len(ids)].clone()  # the next replay writes over it

    def _capture(self, staged: StagedStep) -> _Captured:
        """Waits for the device."""
        buffer = staged.host.to(self._kv.device)
        ids_N, batch = staged.layout.read(buffer, staged.tables)
        # once without capture, which compiles the kernels; what it writes into the cache the graph writes again
        side = torch.cuda.Stream(self._kv.device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream(self._kv.device))
        with torch.cuda.stream(side):
            self._decoder.forward(ids_N, batch, self._kv)
        torch.cuda.current_stream(self._kv.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            hidden_ND = self._decoder.forward(ids_N, batch, self._kv)
        return _Captured(staged.layout, buffer, graph, hidden_ND)
