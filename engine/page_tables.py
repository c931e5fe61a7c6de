"""Which pages hold a sequence: one row of page numbers per node of the branch tree, in one matrix.

The matrix is what the segment table of a batch is built from, so a step never turns lists into arrays.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class PageTables:
    """`rows`: int32 [rows, width]. A row is free or taken; what it holds beyond its sequence's end means nothing."""

    def __init__(self) -> None:
        self.rows = np.zeros((16, 64), dtype=np.int32)
        self._free = list(range(15, -1, -1))

    @property
    def num_taken(self) -> int:
        return len(self.rows) - len(self._free)

    def take(self) -> int:
        """A free row."""
        if not self._free:
            count = len(self.rows)
            self.rows = np.concatenate((self.rows, np.zeros_like(self.rows)))
            self._free = list(range(2 * count - 1, count - 1, -1))
        return self._free.pop()

    def put(self, row: int) -> None:
        """Give a row back; a negative one is none."""
        if row >= 0:
            self._free.append(row)

    def write(self, row: int, start: int, pages: Sequence[int]) -> None:
        """Set the pages from index start on."""
        end = start + len(pages)
        if end > self.rows.shape[1]:
            more = max(end, 2 * self.rows.shape[1]) - self.rows.shape[1]
            self.rows = np.pad(self.rows, ((0, 0), (0, more)))
        self.rows[row, start:end] = pages

    def copy(self, source: int, destination: int, count: int) -> None:
        """Copy the first pages of one row to another."""
        self.rows[destination, :count] = self.rows[source, :count]

    def page(self, row: int, index: int) -> int:
        return int(self.rows[row, index])

    def pages(self, row: int, count: int) -> list[int]:
        """The first pages of a row."""
        found: list[int] = self.rows[row, :count].tolist()
        return found
