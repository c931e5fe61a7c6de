"""Decode steps as captured CUDA graphs: a step is one copy and one launch for all layers.

A graph is captured for a bucket of rows and reads all its inputs from one buffer on the device:

    ids | slots | the segment table of every window        int32 entries; ids and slots are int64, two entries each

Rows that pad the bucket have the id 0 and a negative slot: they write nothing into the cache, read nothing from it,
and their hidden states are cut off. A step whose tables outgrow the buffer captures the graph anew, in a larger one.

Shapes:  N rows   D model width
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from genssd.engine.models.forward_batch import ForwardBatch
from genssd.engine.models.model import Decoder
from genssd.engine.models.segments import rows_per_unit
from genssd.kernels.attention import SegmentTable
from genssd.kernels.device_table import ALIGNMENT, Capacity, DeviceTable, allocate_host_buffer, write_table

BUCKETS = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256)
"""Numbers of rows that a captured step can have."""


def bucket_for(rows: int) -> int | None:
    """Return the smallest bucket that has room for so many rows, None where none has."""
    index = bisect_left(BUCKETS, rows)
    return BUCKETS[index] if index < len(BUCKETS) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class StepLayout:
    """The places of a step's inputs in its buffer."""

    rows: int
    """Number of rows in the bucket."""
    tables: Mapping[int, Capacity]
    """Room for the segment table of each attention window."""

    @staticmethod
    def for_tables(
        rows: int, item_rows: int, tables: Mapping[int, SegmentTable], before: StepLayout | None = None
    ) -> StepLayout:
        """Make a layout with room for tables of this size, and for all that an earlier layout had room for.

        item_rows: maximum number of rows in a work item of the table.
        """
        needed = {window: Capacity.required_by(table) for window, table in tables.items()}
        earlier = needed if before is None else before.tables
        return StepLayout(
            rows=rows,
            tables={
                window: size.enlarge(earlier[window], rows=rows, item_rows=item_rows) for window, size in needed.items()
            },
        )

    def covers(self, tables: Mapping[int, SegmentTable]) -> bool:
        """Return whether the tables fit into the buffer."""
        return all(self.tables[window].covers(Capacity.required_by(table)) for window, table in tables.items())

    @property
    def length(self) -> int:
        """Number of int32 entries in the buffer."""
        return 2 * self._int64_width + sum(capacity.length for capacity in self.tables.values())

    def pack(self, tables: Mapping[int, SegmentTable], into: NDArray[np.int32]) -> None:
        """Write a step without its ids into a buffer of the host."""
        self._int64(into, 0)[:] = 0
        slot_N, slots = self._int64(into, 1), next(iter(tables.values())).slot
        slot_N[:] = -1
        slot_N[: len(slots)] = slots
        for window, start in self._starts().items():
            write_table(tables[window], self.tables[window], into[start : start + self.tables[window].length])

    def read(self, buffer: Tensor, tables: Mapping[int, SegmentTable]) -> tuple[Tensor, ForwardBatch]:
        """Return the ids and the batch of the forward pass as views of the buffer.

        tables: segment tables of the size of those that will lie in it.
        """
        parts = (buffer[i * self._int64_width :][: 2 * self.rows].view(torch.int64) for i in (0, 1))
        ids_N, slot_N = parts
        on_device = {
            window: DeviceTable.from_buffer(
                buffer[start : start + self.tables[window].length], self.tables[window], tables[window]
            )
            for window, start in self._starts().items()
        }
        position_N = next(iter(on_device.values())).position
        return ids_N, ForwardBatch(position_N=position_N, slot_N=slot_N, tables=on_device)

    @property
    def _int64_width(self) -> int:
        """Number of int32 entries that the ids take, and the slots as well."""
        return -(-2 * self.rows // ALIGNMENT) * ALIGNMENT

    def _int64(self, buffer: NDArray[np.int32], part: int) -> NDArray[np.int64]:
        start = part * self._int64_width
        return buffer[start : start + 2 * self.rows].view(np.int64)

    def _starts(self) -> dict[int, int]:
        """Return the index at which the table of each window begins."""
        starts, start = {}, 2 * self._int64_width
        for window, capacity in self.tables.items():
            starts[window] = start
            start += capacity.length
        return starts


@dataclass(frozen=True, slots=True)
class StagedStep:
    """A step in the host's memory, without its ids."""

    layout: StepLayout
    tables: Mapping[int, SegmentTable]
    host: Tensor


@dataclass(frozen=True, slots=True)
class _Captured:
    """A captured graph, its input buffer, the ids in it, and its output."""

    layout: StepLayout
    buffer: Tensor
    ids_N: Tensor
    graph: torch.cuda.CUDAGraph
    hidden_ND: Tensor


class DecodeGraphs:
    """The captured steps of one decoder over one cache, [L, 2, P, S, G, E]; both must keep their addresses.

    Once a bucket is captured a step does not wait for the device: its inputs are packed into pinned memory, which the
    allocator does not reuse before the copy from it is done, while the device may still compute the step before.
    """

    def __init__(self, decoder: Decoder, kv: Tensor) -> None:
        self._decoder = decoder
        self._kv = kv
        self._captured: dict[int, _Captured] = {}
        # graphs never run at once, so they share their memory
        self._pool = torch.cuda.graph_pool_handle()

    def stage(self, tables: Mapping[int, SegmentTable]) -> StagedStep:
        """Pack a step of one token for each of at most BUCKETS[-1] sequences; the device may still compute another."""
        count = next(iter(tables.values())).num_rows
        rows = bucket_for(count)
        assert rows is not None, "more rows than the largest bucket"
        step = self._captured.get(rows)
        layout = None if step is None else step.layout
        if layout is None or not layout.covers(tables):
            c = self._decoder.config
            item_rows = rows_per_unit(c.num_attention_heads // c.num_key_value_heads, self._kv.device)
            layout = StepLayout.for_tables(rows, item_rows, tables, layout)
        host = allocate_host_buffer(layout.length, torch.int32, self._kv.device)
        layout.pack(tables, host.numpy())
        return StagedStep(layout, tables, host)

    @torch.inference_mode()
    def forward(self, staged: StagedStep, ids_N: Tensor) -> Tensor:
        """Compute a staged step and return its hidden states, [N, D]. ids: int64, on the device."""
        layout = staged.layout
        step = self._captured.get(layout.rows)
        if step is None or step.layout is not layout:
            step = self._captured[layout.rows] = self._capture(staged, ids_N)
        else:
            step.buffer.copy_(staged.host, non_blocking=True)
            step.ids_N[: len(ids_N)].copy_(ids_N)
        step.graph.replay()
        return step.hidden_ND[: len(ids_N)].clone()  # the next replay overwrites it

    def _capture(self, staged: StagedStep, drawn_N: Tensor) -> _Captured:
        """Capture a step as a graph. Waits for the device."""
        buffer = staged.host.to(self._kv.device)
        ids_N, batch = staged.layout.read(buffer, staged.tables)
        ids_N[: len(drawn_N)].copy_(drawn_N)
        # once without capture, which compiles the kernels; the graph writes the same into the cache again
        side = torch.cuda.Stream(self._kv.device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream(self._kv.device))
        with torch.cuda.stream(side):
            self._decoder.forward(ids_N, batch, self._kv)
        torch.cuda.current_stream(self._kv.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            hidden_ND = self._decoder.forward(ids_N, batch, self._kv)
        return _Captured(staged.layout, buffer, ids_N, graph, hidden_ND)
