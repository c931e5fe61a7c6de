"""The models of worker processes as the command sees them: tokenizers here, everything else from what workers say."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from genssd.distill.pool.messages import Counts, PairSizes, Ready
from genssd.engine.common.errors import InputError
from genssd.engine.common.model_choices import Role
from genssd.engine.common.usage import CacheUse, Usage
from genssd.engine.models.launches import LaunchRecord
from genssd.engine.readers.pair_prompts import PairEncoder, PairPrompt
from genssd.engine.readers.reading import Reader
from genssd.engine.readers.thinking_pair import ThinkingPair, compare_thinking
from genssd.engine.served.record import ServerRecord
from genssd.engine.texts.text import Prompt, Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalTokens:
    """What this process itself knows of a teacher, a student or both."""

    tokenizers: Mapping[Role, Tokenizer]
    """Tokenizers, rendering chats as the workers do."""
    reader: Reader
    """How the student reads the teacher's tokens."""


class RemoteTeacher:
    """The `ModelFacts` of one teacher and the student of a pool. index: of the teacher among the pool's."""

    def __init__(self, pool: RemoteModels, index: int) -> None:
        self._pool = pool
        self._index = index

    @property
    def _tokens(self) -> LocalTokens:
        return self._pool.tokens[self._index]

    @property
    def _sizes(self) -> list[PairSizes]:
        """What each worker says of these models."""
        return [ready.pairs[self._index] for ready in self._pool.ready.values()]

    @property
    def usage(self) -> Usage:
        """What all workers have done, and what is still to come of the work."""
        return self._pool.count_usage()

    @property
    def cache_use(self) -> CacheUse:
        """Pages and bytes of the caches of all workers."""
        uses = [counts.cache_use for counts in list(self._pool.counts.values())]
        names = [field.name for field in dataclasses.fields(CacheUse)]
        return CacheUse(**{name: sum(getattr(use, name) for use in uses) for name in names})

    @property
    def server(self) -> ServerRecord | None:
        """The server that runs a teacher, with what it has done for all workers; None where none does."""
        return self._pool.count_server()

    @property
    def threads(self) -> int:
        """Number of CPU threads of all workers together."""
        return sum(ready.threads for ready in self._pool.ready.values())

    @property
    def fingerprints(self) -> Mapping[Role, str]:
        """Identification of each checkpoint: 16 hex digits."""
        return self._sizes[0].fingerprints

    @property
    def launches(self) -> LaunchRecord | None:
        """Configurations of the GPU kernels, which are the same in all workers; None on a CPU."""
        return next(iter(self._pool.ready.values())).launches

    @property
    def teachers(self) -> Sequence[RemoteTeacher]:
        """This teacher alone."""
        return (self,)

    @property
    def reader(self) -> Reader:
        """How the student reads the teacher's tokens."""
        return self._tokens.reader

    @cached_property
    def thinking(self) -> ThinkingPair:
        """What the chat templates of the two models do about thoughts."""
        return compare_thinking(self._pairs)

    def positions(self, model: Role) -> int:
        """Return the number of positions of a model."""
        return self._sizes[0].positions[model]

    def vocabulary(self, model: Role) -> int:
        """Return the number of token ids that a model's head has."""
        return self._sizes[0].vocabulary[model]

    def max_sequence_length(self, model: Role) -> int:
        """Return the maximum number of tokens in prompt and response in every worker."""
        return min(sizes.max_sequence_length[model] for sizes in self._sizes)

    def tokenizer(self, model: Role) -> Tokenizer:
        """Return the tokenizer of a model."""
        return self._tokens.tokenizers[model]

    def encode_pair(self, prompt: Prompt) -> PairPrompt:
        """Return a prompt as the search gives it to teacher and student. Raises InputError where one cannot read it."""
        return self._pairs.encode(prompt)

    @cached_property
    def _pairs(self) -> PairEncoder:
        return PairEncoder(self.tokenizer("teacher"), self.tokenizer("student"), self.reader)


class RemoteModels(RemoteTeacher):
    """The `ModelFacts` of a pool of workers, whose counts are the sums over all of them.

    tokens: of each teacher and the student, in the order of the teachers; one entry where there is no teacher.
    """

    def __init__(self, tokens: Sequence[LocalTokens]) -> None:
        super().__init__(self, 0)
        self.tokens = tokens
        self.ready: dict[Hashable, Ready] = {}
        """What the workers say of their engines."""
        self.counts: dict[Hashable, Counts] = {}
        """What the workers have done."""
        self._past_server: ServerRecord | None = None
        """What the server has done for workers that ended."""
        self._total = Usage()
        """What all workers have done, those that ended included. It is kept, not summed up anew: the budget is compared
        with it after every message, of which there are as many more as there are workers."""
        self.to_come = (0, 0)
        """Number of items of the work that no worker has begun, and the tokens that each may sample at most."""

    @cached_property
    def teachers(self) -> Sequence[RemoteTeacher]:
        """Each of the teachers with the student."""
        return [RemoteTeacher(self, index) for index in range(len(self.tokens))]

    def add(self, worker: Hashable, ready: Ready) -> None:
        """Take what a worker says of its models.

        Raises InputError where they are not those that other workers have loaded.
        """
        for one, other in zip(ready.pairs, next(iter(self.ready.values()), ready).pairs, strict=True):
            if one.fingerprints != other.fingerprints:
                raise InputError(
                    "a process has loaded other models than the ones before "
                    f"({_list_fingerprints(one)}; {_list_fingerprints(other)}): they were replaced while the command "
                    "ran; put them back and go on with --resume"
                )
        self.ready[worker] = ready
        self.count(worker, Counts(Usage(), ready.cache_use, ready.server))
        if self._past_server is None and ready.server is not None:
            self._past_server = dataclasses.replace(ready.server, requests=0, repeats=0)

    def count(self, worker: Hashable, counts: Counts) -> None:
        """Take what a worker has done so far."""
        before = self.counts.get(worker)
        self._total = _add(self._total, counts.usage, instead_of=Usage() if before is None else before.usage)
        self.counts[worker] = counts

    def remove(self, worker: Hashable) -> None:
        """Forget a worker that ended, but not what it has done; what it had begun is planned by another one."""
        counts = self.counts.pop(worker, None)
        if counts is not None:
            usage = counts.usage
            done = dataclasses.replace(
                usage, planned_prompts=usage.finished_prompts, planned_tokens=usage.sampled_tokens
            )
            self._total = _add(self._total, done, instead_of=usage)
            if self._past_server is not None and counts.server is not None:
                self._past_server = _add_requests(self._past_server, counts.server)
        if len(self.ready) > 1:
            self.ready.pop(worker, None)

    def count_usage(self) -> Usage:
        """Return what all workers have done, and what is still to come of the work."""
        usage = self._total
        num_items, most_tokens = self.to_come
        return dataclasses.replace(
            usage,
            planned_prompts=usage.planned_prompts + num_items,
            planned_tokens=usage.planned_tokens + num_items * most_tokens,
        )

    def count_server(self) -> ServerRecord | None:
        """Return the server that runs a teacher, with what it has done for all workers."""
        record = self._past_server
        for counts in list(self.counts.values()):
            if record is not None and counts.server is not None:
                record = _add_requests(record, counts.server)
        return record


def _add_requests(one: ServerRecord, other: ServerRecord) -> ServerRecord:
    """Return the first record with the requests of both."""
    return dataclasses.replace(one, requests=one.requests + other.requests, repeats=one.repeats + other.repeats)


def _list_fingerprints(sizes: PairSizes) -> str:
    return ", ".join(f"{role} {fingerprint}" for role, fingerprint in sizes.fingerprints.items())


_COUNTS = tuple(field.name for field in dataclasses.fields(Usage))


def _add(total: Usage, usage: Usage, *, instead_of: Usage) -> Usage:
    """Return a total in which some counts take the place of others."""
    return Usage(**{name: getattr(total, name) + getattr(usage, name) - getattr(instead_of, name) for name in _COUNTS})
