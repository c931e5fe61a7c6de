"""One model with its cache: extends any number of branches in one packed forward pass.

Shapes:  N packed tokens   B branches   W pages per branch   D model width   V vocabulary
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path as FilePath
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from genssd.engine.model import Decoder
from genssd.engine.pages import PagePool
from genssd.engine.tree import BranchTree, Path
from genssd.kernels.attention import AttentionPlan

Role = Literal["teacher", "student"]

MAX_ROWS = 2048  # tokens of one forward pass; longer inputs go in several, in order


class ModelRunner:
    """A decoder over a branch tree. `directory` is for messages."""

    def __init__(self, role: Role, directory: FilePath, decoder: Decoder, pool: PagePool) -> None:
        self.role = role
        self.directory = directory
        self.decoder = decoder
        self.tree = BranchTree(pool)

    def extend(self, paths: Sequence[Path], tokens: Sequence[Sequence[int]]) -> list[Tensor]:
        """Append tokens to each of the distinct paths; return their hidden states, [len(tokens[i]), D] each.

        A branch's numbers do not depend on which others are in the call, up to the rounding of matrix products.
        """
        hidden: list[list[Tensor]] = [[] for _ in paths]
        batch: list[tuple[int, Sequence[int]]] = []
        room = MAX_ROWS
        for i, ids in enumerate(tokens):
            start = 0
            while start < len(ids):
                piece = ids[start : start + room]
                batch.append((i, piece))
                start += len(piece)
                room -= len(piece)
                if room == 0:
                    self._forward(paths, batch, hidden)
                    batch, room = [], MAX_ROWS
        if batch:
            self._forward(paths, batch, hidden)
        return [parts[0] if len(parts) == 1 else torch.cat(parts) for parts in hidden]

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """float32 [N, V]."""
        return self.decoder.logits(hidden_ND)

    def _forward(
        self, paths: Sequence[Path], batch: list[tuple[int, Sequence[int]]], hidden: list[list[Tensor]]
    ) -> None:
        ids: list[int] = []
        slots: list[int] = []
        positions: list[int] = []
        counts = [len(piece) for _, piece in batch]
        for i, piece in batch:
            first = paths[i].length
            slots += self.tree.append(paths[i], len(piece))
            positions += range(first, first + len(piece))
            ids += piece
        tables = [paths[i].table for i, _ in batch]
        table_BW = np.zeros((len(batch), max(map(len, tables))), dtype=np.int32)
        for row, table in zip(table_BW, tables, strict=True):
            row[: len(table)] = table
        device = self.decoder.embedding.device
        plan = AttentionPlan(
            page_table_BW=torch.from_numpy(table_BW).to(device),
            row_sequence_N=torch.from_numpy(np.repeat(np.arange(len(batch), dtype=np.int32), counts)).to(device),
            row_position_N=torch.tensor(positions, dtype=torch.int32, device=device),
        )
        out_ND = self.decoder.forward(
            torch.tensor(ids, device=device), torch.tensor(slots, device=device), plan, self.tree.pool.kv
        )
        for (i, _), part in zip(batch, torch.split(out_ND, counts), strict=True):
            hidden[i].append(part)
