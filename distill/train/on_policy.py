"""On-policy training: the student under training writes the completions itself (GKD, 2306.13649).

With rollout.train_on every completion is judged against the row's reference answer. Whether wrong completions should be
trained on is open: 2605.06188 finds that they do harm, 2608.24696 gates the distillation by a verifier, and alignment
with success was found to be larger on wrong ones (2605.10889). A completion that is left out has the weight 0; a step
without any other changes no weights.

The engine runs on the trainer's own weights: the model's parameters become views of the engine's stacked matrices, so
the engine uses the result of an optimizer step without a copy. Where the weights are sharded over processes, or have
adapters, it has a copy of its own, into which the full weights, adapters merged, are put before every on-policy step.
Every process writes the completions of its own rows. Which tokens are sampled depends on the seed, the step, the row's
place in the step and the weights alone, and not on the number of processes.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genssd.distill.answers.judge import AnswerJudge
from genssd.distill.data.examples import Example
from genssd.distill.train.rollout_options import RolloutOptions
from genssd.distill.train.saving import iter_weights
from genssd.engine.checkpoints.basic_config import is_supported
from genssd.engine.checkpoints.config import ModelConfig
from genssd.engine.checkpoints.config_files import read_config
from genssd.engine.common.amounts import format_count
from genssd.engine.common.errors import InputError
from genssd.engine.common.quoting import quote
from genssd.engine.engine import Engine
from genssd.engine.models.model import Decoder
from genssd.engine.setup.loading import LoadedModels
from genssd.engine.setup.memory import cache_budget
from genssd.engine.texts.text import Tokenizer

CACHE_FRACTION = 1 / 3
"""Fraction of the free memory that the cache of the completions takes."""
STATES_PER_WEIGHT = 3
"""Number of values that a step of AdamW keeps per weight: the gradient and two moments."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutPlan:
    """Plan of the on-policy steps of a training: which steps they are, and how their completions are written."""

    options: RolloutOptions
    probability: float
    """Probability that a step is on-policy."""
    seed: int
    """Seed of the training."""
    max_length: int
    """Maximum number of tokens in a prompt with its completion; longer sequences are cut off."""

    def is_on_policy(self, step: int) -> bool:
        """Return whether a step is on-policy; this depends on the seed and the step alone."""
        return random.Random(f"{self.seed}:{step}:rollout").random() < self.probability


def require_no_lead(examples: Sequence[Example]) -> None:
    """Check that a teacher with another tokenizer can read what the student writes after these prompts.

    Raises InputError naming a row whose tokens before the response are in the teacher's own prompt: the student would
    write others in their place, which that prompt does not have.
    """
    example = next((example for example in examples if example.num_lead), None)
    if example is not None:
        raise InputError(
            f"{example.where}: {describe_lead(format_count(example.num_lead, 'token'))}; leave out such rows, choose a "
            "student whose chat template writes these tokens, or set lmbda to 0"
        )


def describe_lead(lead: str) -> str:
    """Return why rows with a lead are not trained on-policy with a teacher of another tokenizer."""
    return (
        f"the student is trained to write {lead} that open or close the thought before the response (lead_tokens), and "
        "the teacher, which has another tokenizer, reads them in its own prompt: it cannot judge what the student "
        "writes in their place (lmbda)"
    )


class Rollouts:
    """The student under training in the role of a writer of completions."""

    def __init__(self, engine: Engine, plan: RolloutPlan, judge: AnswerJudge, copies: Mapping[str, Tensor]) -> None:
        """copies: weights of the engine by name, into which those of the model are put; empty if it has the model's."""
        self.plan = plan
        self._engine = engine
        self._judge = judge
        self._copies = copies

    @staticmethod
    def build(
        model: Any, source: Path, tokenizer: Tokenizer, plan: RolloutPlan, *, copy_to: torch.device | None = None
    ) -> Rollouts:
        """Build an engine on a model's weights; the model's parameters become views of the engine's matrices.

        source: the model's directory, which holds its config. copy_to: device of a copy, on which the engine runs
        instead; the model is left as it is then, and its weights are taken by `take_weights`.
        """
        tensors: dict[str, Tensor] = {}
        if copy_to is None:
            tensors |= {name: p.data for name, p in model.state_dict(keep_vars=True).items()}
        else:
            tensors |= {name: weight.to(copy_to, copy=True) for name, weight in iter_weights(model)}
        fields = read_config(source)
        if not is_supported(fields):
            kind = quote(fields.get("model_type"))
            raise InputError(f"{source}: a {kind} student cannot write on-policy completions: lmbda must be 0")
        config = ModelConfig.load(source)
        if config.experts is not None and config.names.experts.parts is None:
            raise InputError(
                f"{source}: a {config.model_type} student cannot write on-policy completions: lmbda must be 0"
            )
        decoder = Decoder.from_tensors(config, tensors, source)
        views = decoder.stacked()
        copies = {} if copy_to is None else tensors | views
        if copy_to is None:
            for name, view in views.items():
                model.get_parameter(name).data = view
        # the engine's messages name the option memory_bytes, which is rollout.memory_bytes here
        budget = plan.options.memory_bytes
        if budget is None:
            weights = sum(tensor.nbytes for tensor in tensors.values())
            budget = cache_budget(decoder.device, None, CACHE_FRACTION, working_bytes=STATES_PER_WEIGHT * weights)
        models = LoadedModels.of_one("student", decoder, tokenizer)
        engine = Engine(models.open_resources(budget, CACHE_FRACTION))
        return Rollouts(engine, plan, AnswerJudge(tokenizer), copies)

    @torch.no_grad()
    def take_weights(self, model: Any) -> None:
        """Put the model's weights into the engine's copy, if it has one; every process of a training has to call this.

        One sharded weight after the other is gathered.
        """
        if self._copies:
            for name, weight in iter_weights(model, trained=True):
                self._copies[name].copy_(weight)

    def write(self, examples: Sequence[Example], step: int, indices: Sequence[int]) -> list[Example]:
        """Return those examples of a step that have the indices, with completions that the student writes now.

        A completion depends on the index of its example and not on the other indices, so several processes write the
        same completions as one; equal prompts get different completions.
        """
        generated = self._engine.iter_generate(
            [example.input_ids[: example.num_prompt] for example in examples],
            model="student",
            sampling=self.plan.options.sampling,
            max_tokens=self.plan.options.max_tokens,
            seed=self.plan.seed + step,
            skip=frozenset(range(len(examples))) - frozenset(indices),
            labels=[example.where for example in examples],
        )
        token_ids = {outcome.index: outcome.completions[0].token_ids for outcome in generated}
        return [self._replace_completion(examples[i], token_ids[i]) for i in indices]

    def _replace_completion(self, example: Example, token_ids: Sequence[int]) -> Example:
        ids = (*example.input_ids[: example.num_prompt], *token_ids)[: self.plan.max_length]
        written = replace(
            example, input_ids=ids, chunk_weights=(), topk=None, states=None, teacher_text=None, num_lead=0
        )
        if not self.plan.options.is_verified:
            return written
        outcome = self._judge.judge(
            written.input_ids[: example.num_prompt], written.completion_ids, example.answer
        ).outcome
        weight = example.weight if self.plan.options.is_trained(outcome) else 0.0
        return replace(written, outcome=outcome, weight=weight)
