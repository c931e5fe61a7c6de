"""One model with its cache: extends any number of branches in one packed forward pass.

Shapes:  N packed tokens   M those whose states are wanted   D model width   V vocabulary
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path as FilePath
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from genssd.engine.batch import Batch
from genssd.engine.decode_graph import DecodeGraphs, StagedStep, bucket_for
from genssd.engine.layout import lay_out
from genssd.engine.model import Decoder
from genssd.engine.pages import PagePool
from genssd.engine.tree import BranchTree, Path
from genssd.kernels.device_table import upload

Role = Literal["teacher", "student"]

Prepared = Batch | StagedStep
"""A forward pass, but for the ids of its tokens."""

MAX_ROWS = 2048  # tokens of one forward pass; a sequence is cut at multiples of half of it


class _Piece(NamedTuple):
    """What one forward pass computes of one path. path: its index. wanted: so many of the last hidden states."""

    path: int
    ids: Sequence[int]
    wanted: int


class ModelRunner:
    """A decoder over a branch tree. `directory` is for messages."""

    def __init__(self, role: Role, directory: FilePath, decoder: Decoder, pool: PagePool) -> None:
        self.role = role
        self.directory = directory
        self.decoder = decoder
        self.tree = BranchTree(pool)
        self._graphs = DecodeGraphs(decoder, pool.kv) if pool.kv.is_cuda else None
        self.runs_ahead = pool.kv.is_cuda
        """Whether the host is free while the model computes, so that the next step is best prepared meanwhile."""

    def extend(
        self, paths: Sequence[Path], tokens: Sequence[Sequence[int]], *, last: Sequence[int] | None = None
    ) -> list[Tensor]:
        """Append tokens to each of the distinct paths; return their hidden states, [len(tokens[i]), D] each.

        last: of path i the last[i] last states are enough, [last[i], D]; the other tokens are not computed to the end.
        Long inputs are cut at absolute positions, so a prefix is computed in the same pieces whether what follows it is
        there or not. A branch's numbers do not depend on which others are in the call: on the CPU to the bit, elsewhere
        up to the rounding of matrix products.
        """
        hidden: list[list[Tensor]] = [[] for _ in paths]
        batch: list[_Piece] = []
        rows, longest = 0, MAX_ROWS // 2
        for i, ids in enumerate(tokens):
            first, start = paths[i].length, 0
            while start < len(ids):
                piece = ids[start : start + longest - (first + start) % longest]
                if rows + len(piece) > MAX_ROWS:
                    self._forward(paths, batch, hidden)
                    batch, rows = [], 0
                start += len(piece)
                wanted = len(piece) if last is None else max(0, start - max(start - len(piece), len(ids) - last[i]))
                batch.append(_Piece(i, piece, wanted))
                rows += len(piece)
        if batch:
            self._forward(paths, batch, hidden)
        return [parts[0] if len(parts) == 1 else torch.cat(parts) for parts in hidden]

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """float32 [N, V]."""
        return self.decoder.logits(hidden_ND)

    def prepare(
        self, paths: Sequence[Path], counts: Sequence[int], *, wanted: NDArray[np.int64] | None = None
    ) -> Prepared:
        """Make room for so many tokens on each path, MAX_ROWS at most in all, and find what each of them reads.

        What the tokens are need not be known yet. wanted: the rows whose hidden states are asked for; None: all. Raises
        CapacityError when the pool has too few pages.
        """
        c, kv = self.decoder.config, self.tree.pool.kv
        tables = lay_out(
            self.tree,
            paths,
            counts,
            windows=set(c.windows),
            group=c.num_attention_heads // c.num_key_value_heads,
        )
        one_each = max(counts) == 1 and wanted is None
        if self._graphs is not None and one_each and bucket_for(len(counts)) is not None:
            return self._graphs.stage(tables)
        return Batch.of(tables, kv.device, wanted)

    def run(self, prepared: Prepared, ids: Sequence[int]) -> Tensor:
        """Compute the tokens that room was made for: the hidden states that are wanted, [M, D]."""
        kv = self.tree.pool.kv
        if isinstance(prepared, Batch):
            return self.decoder.forward(upload(np.array(ids), kv.device), prepared, kv)
        assert self._graphs is not None
        return self._graphs.forward(prepared, ids)

    def _forward(self, paths: Sequence[Path], batch: Sequence[_Piece], hidden: list[list[Tensor]]) -> None:
        counts = [len(piece.ids) for piece in batch]
        wanted = None
        if any(piece.wanted < len(piece.ids) for piece in batch):
            ends = np.cumsum(counts)
            wanted = np.concatenate([np.arange(end - p.wanted, end) for end, p in zip(ends, batch, strict=True)])
        prepared = self.prepare([paths[piece.path] for piece in batch], counts, wanted=wanted)
        out_MD = self.run(prepared, [token for piece in batch for token in piece.ids])
        for piece, part in zip(batch, torch.split(out_MD, [piece.wanted for piece in batch]), strict=True):
            hidden[piece.path].append(part)
