"""The page tables of one model: one row of page numbers per node of the branch tree, in one matrix.

The segment table of a batch is built from the matrix, so a step never turns lists into arrays.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class PageTables:
    """A matrix of page numbers, `rows`, int32 [rows, width].

    A row is free or taken; its values beyond the end of its sequence are undefined.
    """

    def __init__(self) -> None:
        self.rows = np.zeros((16, 64), dtype=np.int32)
        self._free = list(range(15, -1, -1))

    @property
    def num_taken(self) -> int:
        """Number of rows in use."""
        return len(self.rows) - len(self._free)

    def take(self) -> int:
        """Take a free row and return its index."""
        if not self._free:
            count = len(self.rows)
            self.rows = np.concatenate((self.rows, np.zeros_like(self.rows)))
            self._free = list(range(2 * count - 1, count - 1, -1))
        return self._free.pop()

    def put(self, row: int) -> None:
        """Return a row to the free ones; do nothing for a negative index."""
        if row >= 0:
            self._free.append(row)

    def write(self, row: int, start: int, pages: Sequence[int]) -> None:
        """Set the pages of a row from index start on."""
        end = start + len(pages)
        if end > self.rows.shape[1]:
            num_new = max(end, 2 * self.rows.shape[1]) - self.rows.shape[1]
            self.rows = np.pad(self.rows, ((0, 0), (0, num_new)))
        self.rows[row, start:end] = pages

    def copy(self, source: int, destination: int, count: int) -> None:
        """Copy the first pages of one row to another."""
        self.rows[destination, :count] = self.rows[source, :count]

    def page(self, row: int, index: int) -> int:
        """Return one page of a row."""
        return int(self.rows[row, index])

    def pages(self, row: int, count: int) -> list[int]:
        """Return the first pages of a row."""
        pages: list[int] = self.rows[row, :count].tolist()
        return pages
