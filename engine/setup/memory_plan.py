"""What an engine will take of the memory, computed from the configs and headers of its models before it is loaded.

    weights of all models  +  the computation  +  the caches, which share what is left

The numbers are those of loading.py: the same functions count the weights, the working memory and the pages.
tests/engine/test_memory_plan.py compares them with engines that were loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from genssd.engine.checkpoints.config import ModelConfig
from genssd.engine.checkpoints.parameters import count_cache_values, count_forward_values, count_weights
from genssd.engine.decoding.batching import choose_max_num_seqs
from genssd.engine.models.pages import page_size_of, pages_within
from genssd.engine.setup.memory import available_bytes, cache_budget, count_weight_bytes, count_working_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedModel:
    """The sizes of a model that the engine's own decoder will compute."""

    config: ModelConfig
    dtype: torch.dtype
    device: torch.device
    weight_bytes: int
    """Size of the weights in memory."""
    copied_bytes: int
    """Size of the copies that exist while the weights are loaded."""

    @staticmethod
    def read(directory: Path, dtype: torch.dtype, device: torch.device) -> PlannedModel:
        """Read config.json and the headers of the weight files. Raises CheckpointError on what cannot be used."""
        weights, copied = count_weight_bytes(directory, dtype)
        return PlannedModel(
            config=ModelConfig.load(directory), dtype=dtype, device=device, weight_bytes=weights, copied_bytes=copied
        )

    @property
    def kv_bytes_per_token(self) -> int:
        """Number of bytes that one token takes in the cache."""
        return count_cache_values(self.config) * self.dtype.itemsize

    @property
    def state_bytes(self) -> int:
        """Number of bytes that a path takes beside its tokens: none."""
        return 0


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """The division of a device's free memory between the models of an engine."""

    free_bytes: int
    """Memory of the device that is free now, or the part of it that one of several processes may take."""
    weight_bytes: Mapping[str, int]
    """Size of every model's weights."""
    loading_bytes: int
    """Memory that loading the weights takes at most: all weights and the copies of the largest tensor."""
    working_bytes: int
    """Memory that the largest forward pass and a decoding batch take."""
    cache_bytes: int
    """Size of all caches together."""
    cache_tokens: int
    """Number of tokens that every cache holds."""
    max_num_seqs: int
    """Maximum number of sequences decoded at once."""


def plan_memory(
    models: Mapping[str, PlannedModel],
    *,
    memory_bytes: int | None,
    free_fraction: float,
    max_num_seqs: int | None,
    threads: int,
    processes: int = 1,
) -> MemoryPlan:
    """Return the division of the memory that `LoadedModels.open_resources` will make after loading these models.

    The arguments are those of `Engine.from_pretrained`; threads: number of threads that will compute. processes: number
    of processes that divide the memory of a CPU; the plan is that of one. Raises CapacityError where nothing is left
    for the caches, or not even one page.
    """
    planned = list(models.values())
    device = planned[0].device
    if max_num_seqs is None:
        max_num_seqs = choose_max_num_seqs([count_weights(model.config) for model in planned], device, threads)
    working = max(
        count_working_bytes(count_forward_values(model.config), model.dtype, model.config.vocab_size, max_num_seqs)
        for model in planned
    )
    weights = {role: model.weight_bytes for role, model in models.items()}
    total = sum(weights.values())
    budget = memory_bytes
    free = available_bytes(device)
    of_others = free - free // processes
    if budget is None:
        budget = cache_budget(device, None, free_fraction, working_bytes=working, reserved_bytes=total + of_others)
    num_pages, _ = pages_within(budget, planned)[0]
    return MemoryPlan(
        free_bytes=free - of_others,
        weight_bytes=weights,
        loading_bytes=total + max(model.copied_bytes for model in planned),
        working_bytes=working,
        cache_bytes=budget,
        cache_tokens=num_pages * page_size_of(planned[0]),
        max_num_seqs=max_num_seqs,
    )
