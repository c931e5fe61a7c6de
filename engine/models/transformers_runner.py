"""Runs a model of transformers: one path at a time, so that a branch's bits do not depend on which others are computed.

The branch tree counts tokens and pages as for the engine's own decoder; its pages hold no tensors here. Beside it every
path has a cache of transformers (path_cache.py). Paths with the same tokens have one cache together; the first that
goes on while others are there gets a copy. Nothing is cut back: what is needed again is computed from its tokens.

Shapes:  N tokens   M tokens whose hidden states are returned   D model width
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path as FilePath
from weakref import WeakKeyDictionary, WeakSet

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache

from genssd.engine.cache.page_list import PageList
from genssd.engine.cache.path_cache import fork_cache
from genssd.engine.cache.tree import BranchTree, Path
from genssd.engine.common.model_choices import Role
from genssd.engine.common.usage import Usage
from genssd.engine.host.threads import effective_threads
from genssd.engine.models.runner import Runner, no_up_projection
from genssd.engine.models.transformers_loading import layers_of
from genssd.engine.models.transformers_model import TransformersModel
from genssd.kernels.threads import torch_threads

LONGEST_PIECE = 256
"""Maximum number of tokens in one call of a model. A prefix that prompts share ends where a piece ends, because the
bits of a prompt depend on its pieces."""
UP_PROJECTION = "mlp.up_proj"
"""End of the name of a layer's up projection in transformers."""


class HeldCache:
    """A cache, the paths that end where it ends, and its number of tokens."""

    def __init__(self, cache: DynamicCache, length: int) -> None:
        self.cache = cache
        self.length = length
        self.holders: WeakSet[Path] = WeakSet()
        """Paths that exist; those that were garbage-collected are gone."""


class CacheTree(BranchTree[PageList]):
    """A branch tree whose paths have caches of transformers.

    A cache is freed with the last path that holds it, whether that was dropped or collected.
    """

    def __init__(self, pages: PageList, model: TransformersModel) -> None:
        super().__init__(pages)
        self._model = model
        self._held: WeakKeyDictionary[Path, HeldCache] = WeakKeyDictionary()

    def fork(self, path: Path) -> Path:
        """Return a second path with the same tokens, which holds the same cache until one of them goes on."""
        forked = super().fork(path)
        held = self._held.get(path)
        if held is not None:
            self._hold(forked, held)
        return forked

    def drop(self, path: Path) -> None:
        """Forget a path with its hold on its cache."""
        self.release(path)
        super().drop(path)

    def release(self, path: Path) -> None:
        """Give up a path's hold on its cache."""
        held = self._held.pop(path, None)
        if held is not None:
            held.holders.discard(path)

    def own_cache(self, path: Path, length: int) -> HeldCache:
        """Return the cache of a path with so many tokens that no other path holds: its own, a copy, or an empty one."""
        held = self._held.get(path)
        if held is None:
            assert length == 0, "the cache of a path was lost in a forward pass that failed"
            held = self._hold(path, HeldCache(self._model.make_cache(), 0))
        elif len(held.holders) > 1:
            self.release(path)
            held = self._hold(path, HeldCache(fork_cache(held.cache), held.length))
        assert held.length == length, "a cache does not end where its path does"
        return held

    def _hold(self, path: Path, held: HeldCache) -> HeldCache:
        held.holders.add(path)
        self._held[path] = held
        return held


@dataclass(frozen=True, slots=True, kw_only=True)
class PathSteps:
    """A forward pass without the ids of its tokens."""

    steps: Sequence[tuple[Path, int, int]]
    """Path, number of its tokens before, and number of new ones, in the order of the ids."""
    output: NDArray[np.int64] | None
    """Indices of the tokens whose hidden states are returned; None for all."""


class TransformersRunner(Runner[PathSteps]):
    """The runner of a TransformersModel. pages: those of its cache, without tensors."""

    tree: CacheTree

    def __init__(
        self,
        role: Role,
        directory: FilePath,
        model: TransformersModel,
        pages: PageList,
        *,
        usage: Usage | None = None,
        threads: int | None = None,
    ) -> None:
        super().__init__(role, directory, CacheTree(pages, model), usage=usage, threads=threads)
        self._model = model

    @property
    def longest_piece(self) -> int:
        """Maximum number of tokens of one path in a forward pass: longer inputs are cut at multiples of it."""
        return min(LONGEST_PIECE, super().longest_piece)

    @property
    def sharing_unit(self) -> int:
        """Number of tokens at whose multiples a prompt can be divided, between pages and without a change of bits."""
        return math.lcm(self.tree.pool.page_size, self.longest_piece)

    @property
    def decoder(self) -> TransformersModel:
        """The weights of the model."""
        return self._model

    def prepare(
        self, paths: Sequence[Path], counts: Sequence[int], *, output: NDArray[np.int64] | None = None
    ) -> PathSteps:
        """Make room for the tokens, as `Runner.prepare` does."""
        steps = []
        for path, count in zip(paths, counts, strict=True):
            steps.append((path, path.length, count))
            self.tree.append(path, count)
        return PathSteps(steps=steps, output=output)

    def run(self, prepared: PathSteps, ids: Sequence[int] | Tensor) -> Tensor:
        """Compute the tokens of a prepared pass, as `Runner.run` does, one path after the other on torch's threads."""
        self._usage.computed_tokens += len(ids)
        ids_N = torch.as_tensor(ids, dtype=torch.int64, device=self._model.device)
        parts_ND, start = [], 0
        with torch.inference_mode(), torch_threads(effective_threads(self.threads)):
            for path, length, count in prepared.steps:
                parts_ND.append(self._extend(path, length, ids_N[start : start + count]))
                start += count
        states_ND = torch.cat(parts_ND)
        if prepared.output is None:
            return states_ND
        return states_ND[torch.from_numpy(prepared.output).to(states_ND.device)]

    def run_observed(self, prepared: PathSteps, ids: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Compute the tokens of a prepared pass and observe the last up projection, as `Runner.run_observed` does."""
        last = layers_of(self._model.module)[-1]
        found = [module for name, module in last.named_modules() if name.endswith(UP_PROJECTION)]
        if len(found) != 1:
            raise no_up_projection(self)
        parts_NF: list[Tensor] = []
        hook = found[0].register_forward_hook(lambda module, inputs, output: parts_NF.append(output.flatten(0, -2)))
        try:
            states_ND = self.run(prepared, ids)
        finally:
            hook.remove()
        return states_ND, torch.cat(parts_NF)

    def _extend(self, path: Path, length: int, ids_N: Tensor) -> Tensor:
        held = self.tree.own_cache(path, length)
        try:
            states_ND = self._model.forward(ids_N, held.cache, is_first=length == 0)
        except BaseException:
            self.tree.release(path)  # it may hold a part of the tokens
            raise
        held.length += len(ids_N)
        return states_ND
