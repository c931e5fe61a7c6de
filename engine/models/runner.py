"""A model with its cache: extends any number of branches. The interface between a model and the rest of the engine.

`paged_runner.PagedRunner` runs the engine's own decoder, `transformers_runner.TransformersRunner` a class of
transformers.

Shapes:  N packed tokens   M tokens whose hidden states are returned   D model width   V vocabulary
         F feed-forward width
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path as FilePath
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from genssd.engine.cache.page_list import PageList
from genssd.engine.cache.tree import BranchTree, Path
from genssd.engine.common.errors import InputError
from genssd.engine.common.model_choices import Role
from genssd.engine.common.usage import Usage
from genssd.engine.models.language_model import LanguageModel

P = TypeVar("P")
"""A forward pass without the ids of its tokens, as a runner prepares it."""

MAX_ROWS = 2048
"""Maximum number of tokens in one forward pass."""


class _Piece(NamedTuple):
    """The tokens of one path that one forward pass computes."""

    path: int
    """Index of the path in the call."""
    ids: Sequence[int]
    num_states: int
    """How many of the last hidden states are returned."""


class Runner(ABC, Generic[P]):
    """One model over the branch tree of its cache. `directory` is used in messages only.

    usage: counts of the engine that the model belongs to; None for counts of its own.
    """

    runs_ahead = False
    """Whether the host is free while the model computes, so that the next step is best prepared meanwhile."""

    def __init__(
        self,
        role: Role,
        directory: FilePath,
        tree: BranchTree[PageList],
        *,
        usage: Usage | None = None,
        threads: int | None = None,
    ) -> None:
        self.role = role
        self.directory = directory
        self.tree = tree
        self.threads = threads
        """Number of threads that compute; None for the default of `threads.effective_threads`."""
        self._usage = usage or Usage()

    @property
    def longest_piece(self) -> int:
        """Maximum number of tokens of one path in a forward pass: longer inputs are cut at multiples of it."""
        return MAX_ROWS // 2

    @property
    def sharing_unit(self) -> int:
        """Number of tokens at whose multiples a prompt can be divided, between pages and without a change of bits."""
        return self.tree.pool.page_size

    @property
    @abstractmethod
    def decoder(self) -> LanguageModel:
        """The weights of the model."""

    @abstractmethod
    def prepare(self, paths: Sequence[Path], counts: Sequence[int], *, output: NDArray[np.int64] | None = None) -> P:
        """Make room for so many tokens on each path, MAX_ROWS at most in all. The token ids need not be known yet.

        A path may come twice: its tokens follow each other. output: indices of the tokens whose hidden states are
        returned; None returns all. Raises CapacityError when the pool has too few pages.
        """

    @abstractmethod
    def run(self, prepared: P, ids: Sequence[int] | Tensor) -> Tensor:
        """Compute the tokens of a prepared pass and return the hidden states that it asks for, [M, D].

        ids: those of the tokens, or int64 [N] on the runner's device, which the host need not know yet.
        """

    def extend(
        self, paths: Sequence[Path], tokens: Sequence[Sequence[int]], *, last: Sequence[int] | None = None
    ) -> list[Tensor]:
        """Append tokens to each of the distinct paths; return their hidden states, [len(tokens[i]), D] each.

        last: return only the last[i] last states of path i, [last[i], D]; the other tokens are not computed to the end.
        Long inputs are cut at absolute positions, so a prefix is computed in the same pieces with or without the tokens
        after it. A branch's numbers do not depend on which others are in the call: on the CPU to the bit, elsewhere up
        to the rounding of matrix products. Raises CapacityError when the pool has too few pages.
        """
        hidden: list[list[Tensor]] = [[] for _ in paths]
        batch: list[_Piece] = []
        rows, longest = 0, self.longest_piece
        for i, ids in enumerate(tokens):
            first, start = paths[i].length, 0
            while start < len(ids):
                piece = ids[start : start + longest - (first + start) % longest]
                if rows + len(piece) > MAX_ROWS:
                    self._forward(paths, batch, hidden)
                    batch, rows = [], 0
                start += len(piece)
                num_states = len(piece) if last is None else max(0, start - max(start - len(piece), len(ids) - last[i]))
                batch.append(_Piece(i, piece, num_states))
                rows += len(piece)
        if batch:
            self._forward(paths, batch, hidden)
        return [parts[0] if len(parts) == 1 else torch.cat(parts) for parts in hidden]

    @abstractmethod
    def run_observed(self, prepared: P, ids: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Compute the tokens of a prepared pass of one path; return their hidden states, [N, D], and what the up
        projection of the last layer gives for them, [N, F], in the model's dtype.

        Raises InputError on a model without such a projection, as one of experts.
        """

    def extend_observed(self, path: Path, ids: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
        """Append tokens to an empty path; yield, piece by piece, what `run_observed` returns.

        Raises CapacityError when the pool has too few pages.
        """
        for start in range(0, len(ids), self.longest_piece):
            piece = ids[start : start + self.longest_piece]
            prepared = self.prepare([path], [len(piece)], output=np.arange(len(piece)))
            yield self.run_observed(prepared, piece)

    @property
    def max_sequence_length(self) -> int:
        """Maximum number of tokens in a sequence: the model's positions, or what the cache holds."""
        num_cached = (self.tree.pool.num_pages - 2) * self.tree.pool.page_size
        return min(self.decoder.config.max_position_embeddings, num_cached)

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """Return the logits of the next tokens, float32 [N, V]."""
        return self.decoder.head.logits(hidden_ND)

    def _forward(self, paths: Sequence[Path], batch: Sequence[_Piece], hidden: list[list[Tensor]]) -> None:
        """Compute some pieces in one pass; append the hidden states of each to those of its path."""
        counts = [len(piece.ids) for piece in batch]
        output = None
        if any(piece.num_states < len(piece.ids) for piece in batch):
            ends = np.cumsum(counts)
            output = np.concatenate([np.arange(end - p.num_states, end) for end, p in zip(ends, batch, strict=True)])
        prepared = self.prepare([paths[piece.path] for piece in batch], counts, output=output)
        out_MD = self.run(prepared, [token for piece in batch for token in piece.ids])
        for piece, part in zip(batch, torch.split(out_MD, [piece.num_states for piece in batch]), strict=True):
            hidden[piece.path].append(part)


ModelRunner = Runner[Any]
"""A runner whose prepared passes nobody looks into."""


def no_up_projection(runner: ModelRunner) -> InputError:
    """Return the error of a model in which `Runner.run_observed` finds nothing to observe."""
    return InputError(
        f"{runner.directory}: the last layer has no single up projection (mlp.up_proj), whose activations are asked for"
    )
