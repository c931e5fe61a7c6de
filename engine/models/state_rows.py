"""Hidden states as rows of the batches in which they were computed: a step takes and gives them without a copy of each.

Shapes:  C rows   N rows of a batch   D model width
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from genssd.kernels.device_table import upload


class StateRow(NamedTuple):
    """One row of a batch of hidden states. It keeps the whole batch alive."""

    states_ND: Tensor
    row: int

    def tensor(self) -> Tensor:
        """Return the row, [D], as a view."""
        return self.states_ND[self.row]

    def alone(self) -> StateRow:
        """Return a copy of the row that keeps no batch alive."""
        return self if len(self.states_ND) == 1 else StateRow(self.states_ND[self.row : self.row + 1].clone(), 0)


def rows_of(states_ND: Tensor) -> Iterator[StateRow]:
    """Yield the rows of a batch in order."""
    return (StateRow(states_ND, row) for row in range(len(states_ND)))


def gather(rows: Sequence[StateRow]) -> Tensor:
    """Return rows as one tensor, [C, D]: the batch itself where they are all its rows in order."""
    batch = rows[0].states_ND
    if any(row.states_ND is not batch for row in rows):
        return torch.stack([row.tensor() for row in rows])
    indices = [row.row for row in rows]
    if indices == list(range(len(batch))):
        return batch
    return batch.index_select(0, upload(np.array(indices), batch.device))
