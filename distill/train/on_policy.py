"""On-policy training: the student under training writes the completions itself (GKD, 2306.13649).

Our engine runs on the trainer's own weights: the parameters are views of the engine's stacked matrices, so an optimizer
step is seen at once and nothing is copied. What is drawn depends on the seed, the step and the weights alone.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from genssd.distill.data.examples import Example
from genssd.engine.config import ModelConfig
from genssd.engine.engine import Engine
from genssd.engine.errors import InputError
from genssd.engine.model import Decoder
from genssd.engine.sampling import Sampling
from genssd.engine.text import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutOptions:
    """How the student writes while it is trained."""

    max_tokens: int = 512
    """Of a completion."""
    sampling: Sampling = field(default_factory=Sampling)
    memory_bytes: int | None = None
    """Of the key-value cache; None: a third of what is free."""

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise InputError(f"rollout.max_tokens must be at least 1, not {self.max_tokens}")


class Rollouts:
    """Replaces the completions of some optimizer steps by the student's own."""

    def __init__(
        self,
        model: Any,
        source: Path,
        tokenizer: Tokenizer,
        options: RolloutOptions,
        *,
        share: float,
        seed: int,
        max_length: int,
    ) -> None:
        """share: the probability with which a step is on-policy. max_length: of prompt and completion. The model's
        parameters become views."""
        self._options = options
        self._share = share
        self._seed = seed
        self._max_length = max_length
        tensors: dict[str, Tensor] = {name: p.data for name, p in model.state_dict(keep_vars=True).items()}
        decoder = Decoder.from_tensors(ModelConfig.load(source), tensors, source)
        for name, view in decoder.stacked().items():
            model.get_parameter(name).data = view
        # messages about its cache name memory_bytes: it is rollout.memory_bytes here
        self._engine = Engine.from_decoder("student", decoder, tokenizer, memory_bytes=options.memory_bytes)

    def due(self, step: int) -> bool:
        """Whether a step is on-policy."""
        return random.Random(f"{self._seed}:{step}:rollout").random() < self._share

    def write(self, examples: Sequence[Example], step: int, mine: Sequence[int]) -> list[Example]:
        """Some of a step's examples, by index, with completions that the student writes now.

        Equal prompts draw different completions, whoever writes them.
        """
        written = self._engine.iter_generate(
            [example.input_ids[: example.num_prompt] for example in examples],
            model="student",
            sampling=self._options.sampling,
            max_tokens=self._options.max_tokens,
            seed=self._seed + step,
            skip=frozenset(range(len(examples))) - frozenset(mine),
            labels=[example.where for example in examples],
        )
        found = {index: completion.token_ids for index, (completion,) in written}
        return [self._with(examples[i], found[i]) for i in mine]

    def _with(self, example: Example, token_ids: Sequence[int]) -> Example:
        ids = (*example.input_ids[: example.num_prompt], *token_ids)[: self._max_length]
        return replace(example, input_ids=ids, chunk_weights=(), topk=None)
