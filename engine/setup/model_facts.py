"""What a command asks of its models besides their work, wherever they run: here, or in other processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from genssd.engine.common.model_choices import Role
from genssd.engine.common.usage import CacheUse, Usage
from genssd.engine.models.launches import LaunchRecord
from genssd.engine.readers.pair_prompts import PairPrompt
from genssd.engine.readers.reading import Reader
from genssd.engine.readers.thinking_pair import ThinkingPair
from genssd.engine.served.record import ServerRecord
from genssd.engine.texts.text import Prompt, Tokenizer


class PromptReaders(Protocol):
    """Teachers, a student or both, as far as they read prompts: what is known without their weights."""

    @property
    def reader(self) -> Reader:
        """How the student reads the teacher's tokens."""
        ...

    @property
    def teachers(self) -> Sequence[PromptReaders]:
        """Each of several teachers with the student; of one teacher or none, these ones alone."""
        ...

    def tokenizer(self, model: Role) -> Tokenizer:
        """Return the tokenizer of a model."""
        ...

    def encode_pair(self, prompt: Prompt) -> PairPrompt:
        """Return a prompt as the search gives it to teacher and student. Raises InputError where one cannot read it."""
        ...


class ModelCounts(Protocol):
    """What models report of themselves while they work."""

    @property
    def usage(self) -> Usage:
        """Numbers of tokens that the models have processed so far."""
        ...

    @property
    def cache_use(self) -> CacheUse:
        """Pages and bytes of all caches."""
        ...

    @property
    def threads(self) -> int:
        """Number of CPU threads that compute; of several processes, of all together."""
        ...

    @property
    def server(self) -> ServerRecord | None:
        """The server that runs a teacher, and what it has done; None where none does."""
        ...

    @property
    def launches(self) -> LaunchRecord | None:
        """Configurations of the GPU kernels; None on a CPU, and where no engine computes."""
        ...


class ModelFacts(PromptReaders, ModelCounts, Protocol):
    """Teachers, a student or both: tokenizers, sizes, identities, and counts of what they have done.

    `Engine` is one. The docstrings of `LoadedEngine` say more.
    """

    @property
    def fingerprints(self) -> Mapping[Role, str]:
        """Identification of each checkpoint; of several teachers, of the first one."""
        ...

    @property
    def teachers(self) -> Sequence[ModelFacts]:
        """The facts of each of several teachers with the student; of one teacher or none, these ones alone."""
        ...

    @property
    def thinking(self) -> ThinkingPair:
        """What the chat templates of teacher and student do about thoughts."""
        ...

    def positions(self, model: Role) -> int:
        """Return the number of positions of a model."""
        ...

    def vocabulary(self, model: Role) -> int:
        """Return the number of token ids that a model's head has."""
        ...

    def max_sequence_length(self, model: Role) -> int:
        """Return the maximum number of tokens in prompt and response."""
        ...
