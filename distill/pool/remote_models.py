"""The models of worker processes as the command sees them: tokenizers here, everything else from what workers say."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Mapping
from functools import cached_property

from genssd.distill.pool.messages import Counts, Ready
from genssd.engine.launches import LaunchRecord
from genssd.engine.pair_prompts import PairEncoder, PairPrompt
from genssd.engine.reading import Reader
from genssd.engine.runner import Role
from genssd.engine.text import Prompt, Tokenizer
from genssd.engine.usage import CacheUse, Usage


class RemoteModels:
    """The `ModelFacts` of a pool of workers, whose counts are the sums over all of them.

    tokenizers: rendering chats as the workers do. reader: how the student reads the teacher's tokens.
    """

    server = None

    def __init__(self, tokenizers: Mapping[Role, Tokenizer], reader: Reader) -> None:
        self._tokenizers = tokenizers
        self._reader = reader
        self._ready: dict[Hashable, Ready] = {}
        self._counts: dict[Hashable, Counts] = {}
        self._past = Usage()
        """What workers that ended have done."""
        self.to_come = (0, 0)
        """Number of items of the work that no worker has begun, and the tokens that each may sample at most."""

    def add(self, worker: Hashable, ready: Ready) -> None:
        """Take what a worker says of its engine."""
        self._ready[worker] = ready
        self._counts[worker] = Counts(Usage(), ready.cache_use)

    def count(self, worker: Hashable, counts: Counts) -> None:
        """Take what a worker has done so far."""
        self._counts[worker] = counts

    def remove(self, worker: Hashable) -> None:
        """Forget a worker that ended, but not what it has done; what it had begun is planned by another one."""
        counts = self._counts.pop(worker, None)
        if counts is not None:
            usage = counts.usage
            done = dataclasses.replace(
                usage, planned_prompts=usage.finished_prompts, planned_tokens=usage.sampled_tokens
            )
            self._past = _add(self._past, done)
        if len(self._ready) > 1:
            self._ready.pop(worker, None)

    @property
    def usage(self) -> Usage:
        """What all workers have done, and what is still to come of the work."""
        usage = self._past
        for counts in list(self._counts.values()):
            usage = _add(usage, counts.usage)
        num_items, most_tokens = self.to_come
        return dataclasses.replace(
            usage,
            planned_prompts=usage.planned_prompts + num_items,
            planned_tokens=usage.planned_tokens + num_items * most_tokens,
        )

    @property
    def cache_use(self) -> CacheUse:
        """Pages and bytes of the caches of all workers."""
        uses = [counts.cache_use for counts in list(self._counts.values())]
        names = [field.name for field in dataclasses.fields(CacheUse)]
        return CacheUse(**{name: sum(getattr(use, name) for use in uses) for name in names})

    @property
    def threads(self) -> int:
        """Number of CPU threads of all workers together."""
        return sum(ready.threads for ready in self._ready.values())

    @property
    def fingerprints(self) -> Mapping[Role, str]:
        """Identification of every checkpoint: 16 hex digits."""
        return next(iter(self._ready.values())).fingerprints

    @property
    def launches(self) -> LaunchRecord | None:
        """Configurations of the GPU kernels, which are the same in all workers; None on a CPU."""
        return next(iter(self._ready.values())).launches

    @property
    def reader(self) -> Reader:
        """How the student reads the teacher's tokens."""
        return self._reader

    def positions(self, model: Role) -> int:
        """Return the number of positions of a model."""
        return next(iter(self._ready.values())).positions[model]

    def vocabulary(self, model: Role) -> int:
        """Return the number of token ids that a model's head has."""
        return next(iter(self._ready.values())).vocabulary[model]

    def max_sequence_length(self, model: Role) -> int:
        """Return the maximum number of tokens in prompt and response in every worker."""
        return min(ready.max_sequence_length[model] for ready in self._ready.values())

    def tokenizer(self, model: Role) -> Tokenizer:
        """Return the tokenizer of a model."""
        return self._tokenizers[model]

    def encode_pair(self, prompt: Prompt) -> PairPrompt:
        """Return a prompt as the search gives it to teacher and student. Raises InputError where one cannot read it."""
        return self._pair_encoder.encode(prompt)

    @cached_property
    def _pair_encoder(self) -> PairEncoder:
        return PairEncoder(self._tokenizers["teacher"], self._tokenizers["student"])


def _add(one: Usage, other: Usage) -> Usage:
    """Return the sums of all counts."""
    names = [field.name for field in dataclasses.fields(Usage)]
    return Usage(**{name: getattr(one, name) + getattr(other, name) for name in names})
