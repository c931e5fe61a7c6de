"""A criterion that reads the prompt's reference answer: whether the reasoning makes it easier for the student."""

from __future__ import annotations

import math
from dataclasses import dataclass

from genssd.engine.common.errors import InputError
from genssd.engine.common.options_check import CheckedOptions, check_types
from genssd.engine.criteria.candidate import Candidate
from genssd.engine.criteria.likelihood import exp_or_infinity
from genssd.engine.texts.text import common_prefix


@dataclass(frozen=True, slots=True, kw_only=True)
class RationaleDifficulty(CheckedOptions):
    """PPL(answer | prompt, reasoning) / PPL(answer | prompt); lower is better: the reasoning makes the answer easier
    (MoRSD, 2509.23574; the paper's formula is not public, this is our reading of it).

    The reference answer is put after `before_answer`, once after the reasoning and once after the prompt alone.
    """

    before_answer: str = "\nThe answer is"
    """Text before the reference answer."""
    last_steps: int = 1
    """Number of steps at the end of a complete response that are left out, because they state the answer."""

    def __post_init__(self) -> None:
        check_types(self)
        if self.last_steps < 0:
            raise InputError(f"rationale_difficulty: last_steps must be at least 0, not {self.last_steps}")

    @property
    def needs_answer(self) -> bool:
        """Whether the prompts need reference answers."""
        return True

    def score(self, candidate: Candidate) -> float:
        if candidate.local_logprob is None:
            raise InputError("rationale_difficulty runs the student, and this candidate came without a model to do it")
        reasoning = self.reasoning(candidate)
        ending, border = encode_ending(candidate, self.before_answer, "rationale_difficulty")
        start, end = len(reasoning) + border, len(reasoning) + len(ending)
        windows = [(0, start, end), (len(reasoning), start, end)]
        after_reasoning, after_prompt = (
            float(p.double().mean()) for p in candidate.local_logprob((*reasoning, *ending), windows)
        )
        return exp_or_infinity(after_prompt - after_reasoning) if after_reasoning > -math.inf else math.inf

    def reasoning(self, candidate: Candidate) -> tuple[int, ...]:
        """Return the token ids of the response without its end of sequence and the steps that state the answer."""
        ids = (*candidate.history_ids, *candidate.token_ids)
        if not candidate.final or not self.last_steps:
            return ids[: len(ids) - candidate.finished]
        starts = [start for start, _ in candidate.steps()]
        return ids[: starts[-self.last_steps]] if len(starts) > self.last_steps else ()

    def higher_is_better(self) -> bool:
        return False


def encode_ending(candidate: Candidate, before_answer: str, name: str) -> tuple[list[int], int]:
    """Return the token ids of a text and the reference answer after it, and the index of the answer's first token.

    name: the criterion's, for messages. Raises InputError without an answer, a tokenizer or a token of the answer's
    own.
    """
    if candidate.answer is None:
        raise InputError(f"{name} needs the reference answer, and this prompt came without one")
    if candidate.encode is None:
        raise InputError(f"{name} encodes the reference answer, and this candidate came without a tokenizer")
    ending = candidate.encode(f"{before_answer} {candidate.answer}")
    # the tokens that come from the text before the answer alone: a tokenizer may join across the border
    border = common_prefix(candidate.encode(before_answer), ending)
    if border == len(ending):
        raise InputError(f"{name}: the answer {candidate.answer!r} has no token of its own")
    return ending, border
