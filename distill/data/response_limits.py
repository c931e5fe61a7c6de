"""What cuts a response off before it is finished: max_tokens, the last position of a model, or its prompt's budget."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from genssd.engine.common.amounts import format_count
from genssd.engine.common.model_choices import Role
from genssd.engine.setup.model_facts import ModelFacts

logger = logging.getLogger(__name__)

CutBy = Literal["max_tokens", "teacher positions", "student positions", "prompt_budget"]
"""What cut a response off."""
REMEDIES: Mapping[CutBy, str] = {
    "max_tokens": "by max_tokens (raise it)",
    "teacher positions": "at the last position of the teacher (shorten the prompts, or take a model with more)",
    "student positions": "at the last position of the student (shorten the prompts, or take a model with more)",
    "prompt_budget": "by prompt_budget (raise it)",
}
POSITIONS: Mapping[Role, CutBy] = {"teacher": "teacher positions", "student": "student positions"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ResponseLimits:
    """The maximum number of tokens in a response, by the option and by the models that read it."""

    max_tokens: int
    positions: Mapping[Role, int]
    """Number of positions of every model that reads prompt and response."""

    @staticmethod
    def of(models: ModelFacts, roles: Sequence[Role], max_tokens: int) -> ResponseLimits:
        """Return the limits of responses that these models read."""
        return ResponseLimits(
            max_tokens=max_tokens,
            positions={role: min(one.positions(role) for one in models.teachers) for role in roles},
        )

    def find_cut(self, status: str, num_tokens: int, num_prompt: Mapping[Role, int]) -> CutBy | None:
        """Return what cut a response of so many tokens off; None where its status is neither "length" nor "budget".

        num_prompt: number of tokens in the prompt as each model reads it.
        """
        if status == "budget":
            return "prompt_budget"
        if status != "length":
            return None
        if num_tokens >= self.max_tokens:
            return "max_tokens"
        return POSITIONS[min(self.positions, key=lambda role: self.positions[role] - num_prompt[role])]

    def describe_shortage(self, prompts: Sequence[Mapping[Role, int]]) -> str | None:
        """Return a line on the prompts after which a model has fewer positions than max_tokens; None without one.

        prompts: number of tokens of every prompt as each model reads it. Prompts that leave no position are not
        counted: they are reported by themselves.
        """
        parts = []
        readable = [
            lengths for lengths in prompts if all(lengths[role] < free for role, free in self.positions.items())
        ]
        for role, positions in self.positions.items():
            lengths = [lengths[role] for lengths in readable if positions - lengths[role] < self.max_tokens]
            if lengths:
                low, high = min(lengths), max(lengths)
                tokens = f"{low}" if low == high else f"{low} to {high}"
                parts.append(
                    f"the {role} has {positions} positions, of which the prompts take {tokens}: fewer than "
                    f"max_tokens={self.max_tokens} are left for a response in {len(lengths)} of "
                    f"{format_count(len(prompts), 'prompt')}"
                )
        return "; ".join(parts) + "; what is longer is cut off (status length)" if parts else None

    def warn_of_shortage(self, prompts: Sequence[Mapping[Role, int]]) -> None:
        """Log the line of `describe_shortage`, if there is one."""
        line = self.describe_shortage(prompts)
        if line is not None:
            logger.warning("%s", line)


def count_cuts(responses: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Return how many responses were cut off, by their field `cut_by`."""
    return dict(Counter(row["cut_by"] for row in responses if row["cut_by"] is not None))


def describe_cuts(cuts: Mapping[str, int], responses: int) -> str | None:
    """Return a line with the remedy where more than half of the responses were cut off; None else."""
    total = sum(cuts.values())
    if 2 * total <= responses:
        return None
    reasons = ", ".join(f"{cuts[name]} {remedy}" for name, remedy in REMEDIES.items() if name in cuts)
    return f"{total} of {format_count(responses, 'response')} were cut off before they were finished: {reasons}"
