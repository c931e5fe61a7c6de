"""Problems that the models of a run cannot read: they are named and left out before anything runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from genssd.distill.data.problems import ProblemRow, ProblemSet
from genssd.engine.candidate import AnyCriterion, needs_answer
from genssd.engine.engine import Engine
from genssd.engine.runner import Role


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadableProblems:
    """The problems of a data file whose prompts the models can read."""

    data: ProblemSet
    lengths: Mapping[int, Mapping[Role, int]]
    """Number of tokens of every usable prompt as each model reads it, by the index of its row."""

    def list_lengths(self, done: frozenset[int]) -> list[Mapping[Role, int]]:
        """Return the lengths of the prompts that are not done. done: indices of rows."""
        return [lengths for index, lengths in self.lengths.items() if index not in done]

    def find_done(self, done: frozenset[int]) -> frozenset[int]:
        """Return the places, among the usable problems, of those that are done. done: indices of rows."""
        return frozenset(i for i, problem in enumerate(self.data.problems) if problem.index in done)


def leave_out_unfit(
    data: ProblemSet,
    engine: Engine,
    roles: Sequence[Role],
    criterion: AnyCriterion | None = None,
    criterion_name: str = "",
) -> ReadableProblems:
    """Return the problems whose prompts the tokenizers and chat templates of these models take.

    With a criterion that reads the reference answer, problems without one are left out as well. Raises InputError when
    no problem is left. Prompts that are too long are outcomes of the engine.
    """
    lengths: dict[int, dict[Role, int]] = {}

    def find_fault(problem: ProblemRow) -> str | None:
        if criterion is not None and needs_answer(criterion) and problem.answer is None:
            return f"no reference answer, which the criterion {criterion_name} reads"
        lengths[problem.index] = {role: len(engine.tokenizer(role).encode_prompt(problem.prompt)) for role in roles}
        return None

    return ReadableProblems(data=data.leave_out(find_fault), lengths=lengths)
