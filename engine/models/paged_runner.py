"""The engine's own decoder over a paged cache: all branches of a call are computed in one packed forward pass.

Shapes:  N packed tokens   M tokens whose hidden states are returned   D model width
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path as FilePath

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from genssd.engine.cache.tree import BranchTree, Path
from genssd.engine.common.model_choices import Role
from genssd.engine.common.usage import Usage
from genssd.engine.models.decode_graph import DecodeGraphs, StagedStep, bucket_for
from genssd.engine.models.forward_batch import ForwardBatch
from genssd.engine.models.layers import DenseWeights
from genssd.engine.models.model import Decoder
from genssd.engine.models.pages import PagePool
from genssd.engine.models.runner import Runner, no_up_projection
from genssd.engine.models.segments import append_tokens
from genssd.kernels.device_table import upload

Prepared = ForwardBatch | StagedStep
"""A forward pass without the ids of its tokens."""


class PagedRunner(Runner[Prepared]):
    """The runner of a Decoder. On the CPU the bits of a branch's numbers depend on that branch alone."""

    tree: BranchTree[PagePool]

    def __init__(
        self,
        role: Role,
        directory: FilePath,
        decoder: Decoder,
        pool: PagePool,
        *,
        usage: Usage | None = None,
        threads: int | None = None,
    ) -> None:
        super().__init__(role, directory, BranchTree(pool), usage=usage, threads=threads)
        self._decoder = decoder
        self._graphs = DecodeGraphs(decoder, pool.kv) if pool.kv.is_cuda else None
        self.runs_ahead = pool.kv.is_cuda

    @property
    def decoder(self) -> Decoder:
        """The weights of the model."""
        return self._decoder

    def prepare(
        self, paths: Sequence[Path], counts: Sequence[int], *, output: NDArray[np.int64] | None = None
    ) -> Prepared:
        """Make room for the tokens, as `Runner.prepare` does, and tabulate what each of them reads."""
        c, kv = self.decoder.config, self.tree.pool.kv
        tables = append_tokens(
            self.tree,
            paths,
            counts,
            windows=set(c.windows),
            group=c.num_attention_heads // c.num_key_value_heads,
        )
        is_decode_step = max(counts) == 1 and output is None
        if self._graphs is not None and is_decode_step and bucket_for(len(counts)) is not None:
            return self._graphs.stage(tables)
        return ForwardBatch.from_tables(tables, kv.device, output)

    def run(self, prepared: Prepared, ids: Sequence[int] | Tensor) -> Tensor:
        """Compute the tokens of a prepared pass, as `Runner.run` does."""
        kv = self.tree.pool.kv
        self._usage.computed_tokens += len(ids)
        ids_N = ids if isinstance(ids, Tensor) else upload(np.array(ids), kv.device)
        if isinstance(prepared, ForwardBatch):
            return self.decoder.forward(ids_N, prepared, kv)
        assert self._graphs is not None
        return self._graphs.forward(prepared, ids_N)

    def run_observed(self, prepared: Prepared, ids: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Compute the tokens of a prepared pass and observe the last up projection, as `Runner.run_observed` does."""
        if not isinstance(self.decoder.layers[-1].mlp, DenseWeights):
            raise no_up_projection(self)
        assert isinstance(prepared, ForwardBatch)
        kv = self.tree.pool.kv
        self._usage.computed_tokens += len(ids)
        observed: list[Tensor] = []
        states_ND = self.decoder.forward(upload(np.array(ids), kv.device), prepared, kv, observed=observed)
        return states_ND, observed[0]
