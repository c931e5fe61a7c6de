"""A criterion that reads the prompt's reference answer at every step: whether the reasoning makes progress."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from genssd.engine.common.errors import InputError
from genssd.engine.common.options_check import CheckedOptions, check_types
from genssd.engine.criteria.candidate import Candidate
from genssd.engine.criteria.reference_answer import encode_ending

LEAST_LOGPROB = -1e4  # in nats: of an answer that the student cannot write


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerProgress(CheckedOptions):
    """Fraction of the tokens that lie in segments after which the student finds the reference answer likelier than
    before them; higher is better (progress filtering, R2-OPD, 2608.19408; our reading of it).

    The paper estimates the probability of solving the problem at the ends of segments by eight continuations of the
    student, calls the increments progress, and masks segments of the student's own responses in which progress and the
    teacher's reward disagree. Here a teacher's text is judged, and the estimate is the student's log-probability of the
    reference answer, put after `before_answer`: it needs no sampling. Joining neighbours whose progress has the same
    sign, as the paper does, does not change the fraction.
    """

    reduce: Literal["fraction", "gain"] = "fraction"
    """What the value is: the fraction of tokens in segments with progress, or the progress from beginning to end, in
    nats per token of the answer. In the search, where a chunk is often one segment, take "gain": with a threshold of 0
    it keeps the chunks that make progress."""
    segments: int = 16
    """Maximum number of segments: more steps than that are joined. Each one is a pass over the response up to there."""
    before_answer: str = "\nThe answer is"
    """Text before the reference answer."""
    last_steps: int = 1
    """Number of steps at the end of a complete response that are left out, because they state the answer."""

    def __post_init__(self) -> None:
        check_types(self)
        if self.segments < 1 or self.last_steps < 0:
            raise InputError(
                f"progress: segments must be at least 1 and last_steps 0, not {self.segments} and {self.last_steps}"
            )

    @property
    def needs_answer(self) -> bool:
        """Whether the prompts need reference answers."""
        return True

    def score(self, candidate: Candidate) -> float:
        borders = self.borders(candidate)
        estimates = self._estimate(candidate, borders)
        if self.reduce == "gain":
            return estimates[-1] - estimates[0]
        rising = sum(
            end - start
            for (start, end), (before, after) in zip(pairwise(borders), pairwise(estimates), strict=True)
            if after > before
        )
        return rising / max(1, borders[-1] - borders[0])

    def borders(self, candidate: Candidate) -> list[int]:
        """Return the token positions between the segments of the chunk, its beginning and its end included."""
        begin = len(candidate.history_ids)
        steps = candidate.steps()
        if candidate.final:
            steps = steps[: max(0, len(steps) - self.last_steps)]
        ends = [end for _, end in steps if end > begin]
        if not ends:  # nothing but the steps that state the answer
            return [begin, begin + candidate.num_content]
        count = min(self.segments, len(ends))
        return [begin, *(ends[len(ends) * (k + 1) // count - 1] for k in range(count))]

    def _estimate(self, candidate: Candidate, borders: Sequence[int]) -> list[float]:
        """Return the student's mean log-probability of the answer's tokens after the response up to each border."""
        if candidate.local_logprob is None:
            raise InputError("progress runs the student, and this candidate came without a model to do it")
        ending, first = encode_ending(candidate, self.before_answer, "progress")
        ids = (*candidate.history_ids, *candidate.token_ids)
        text: list[int] = []  # all prefixes one after the other, each with the answer: every window is one of them
        windows = []
        for border in borders:
            context = len(text)
            text += [*ids[:border], *ending]
            windows.append((context, context + border + first, len(text)))
        parts = candidate.local_logprob(text, windows)
        return [max(LEAST_LOGPROB, float(part.double().mean())) for part in parts]

    def higher_is_better(self) -> bool:
        return True
