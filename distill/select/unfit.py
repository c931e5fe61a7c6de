"""Problems that the models of a run cannot read: they are named and left out before anything runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from genssd.distill.answers.thoughts import ThoughtReader
from genssd.distill.data.problems import ProblemRow, ProblemSet
from genssd.distill.files.pipes import describe
from genssd.engine.common.errors import InputError
from genssd.engine.common.model_choices import Role
from genssd.engine.criteria.criterion import AnyCriterion, needs_answer
from genssd.engine.readers.reading import Reader
from genssd.engine.search.team import find_disagreement
from genssd.engine.setup.model_facts import PromptReaders
from genssd.engine.texts.text import Prompt, Tokenizer


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
    models: PromptReaders,
    roles: Sequence[Role],
    criterion: AnyCriterion | None = None,
    criterion_name: str = "",
    *,
    answer_reader: str | None = None,
) -> ReadableProblems:
    """Return the problems whose prompts the tokenizers and chat templates of these models take.

    With a criterion or a method that reads the reference answer, problems without one are left out as well, and with
    two models prompts that open a thought which the teacher closes by a token that the student does not have.
    answer_reader: name of such a method in messages; None for none. Raises InputError when no problem is left. Prompts
    that are too long are outcomes of the engine.
    """
    lengths: dict[int, dict[Role, int]] = {}
    check = PromptCheck(models, roles)
    unreadable: list[str] = []
    if criterion is not None and needs_answer(criterion):
        answer_reader = f"the criterion {criterion_name}"

    def find_fault(problem: ProblemRow) -> str | None:
        if answer_reader is not None and problem.answer is None:
            return f"no reference answer, which {answer_reader} reads"
        each = check.encode(problem.prompt)
        lengths[problem.index] = {role: max(len(ids[role]) for ids in each) for role in roles}
        fault = check.find_unreadable(each)
        unreadable.extend([] if fault is None else [fault])
        return check.find_disagreement(problem.prompt) if fault is None else fault

    try:
        readable = data.leave_out(find_fault)
    except InputError:
        if len(unreadable) == len(data.problems):
            raise InputError(f"{describe(data.name)}: of every prompt, {unreadable[0]}") from None
        raise
    usable = {problem.index for problem in readable.problems}
    return ReadableProblems(data=readable, lengths={i: values for i, values in lengths.items() if i in usable})


class PromptCheck:
    """Encodes prompts for the models of a command, and finds those that they cannot use.

    models: of several teachers, each reads the prompts with the student. roles: of the models that read prompts.
    """

    def __init__(self, models: PromptReaders, roles: Sequence[Role]) -> None:
        self._roles = roles
        self._teachers = [(one, _find_ends(one, roles)) for one in models.teachers]

    def encode(self, prompt: Prompt) -> list[dict[Role, Sequence[int]]]:
        """Return the token ids of a prompt as each teacher reads it with the student.

        Raises InputError where a model cannot read it.
        """
        return [encode_for(one, self._roles, prompt) for one, _ in self._teachers]

    def find_unreadable(self, each: Sequence[Mapping[Role, Sequence[int]]]) -> str | None:
        """Return why the student could not read the responses to a prompt; None if it can. each: from `encode`."""
        for ids, (_, ends) in zip(each, self._teachers, strict=True):
            if ends is not None and (fault := ends.find_fault(ids["teacher"])) is not None:
                return fault
        return None

    def find_disagreement(self, prompt: Prompt) -> str | None:
        """Return how the student reads a prompt differently beside different teachers; None if it does not."""
        if len(self._teachers) < 2:
            return None
        pairs = [one.encode_pair(prompt) for one, _ in self._teachers]
        return find_disagreement([(pair.student, pair.num_lead) for pair in pairs])


def _find_ends(models: PromptReaders, roles: Sequence[Role]) -> ThoughtEnds | None:
    """Return what finds thoughts that the student could not read the end of; None where it reads all tokens."""
    if len(roles) < 2 or models.reader.is_identity:
        return None
    return ThoughtEnds(models.tokenizer("teacher"), models.reader)


def encode_for(models: PromptReaders, roles: Sequence[Role], prompt: Prompt) -> dict[Role, Sequence[int]]:
    """Return the token ids of a prompt as each of one or both models reads it. Raises InputError where one cannot."""
    if len(roles) == 1:
        return {roles[0]: models.tokenizer(roles[0]).encode_prompt(prompt)}
    pair = models.encode_pair(prompt)
    return {"teacher": pair.teacher, "student": pair.student}


class ThoughtEnds:
    """Finds prompts that open a thought which only a token that the student does not have closes.

    tokenizer: the teacher's. student: how the student reads the teacher's tokens.
    """

    def __init__(self, tokenizer: Tokenizer, student: Reader) -> None:
        self._tokenizer = tokenizer
        self._student = student
        self._reader = ThoughtReader(self._tokenizer)

    def find_fault(self, prompt_ids: Sequence[int]) -> str | None:
        """Return why the student cannot read the responses to a prompt; None if it can. prompt_ids: the teacher's."""
        tags = self._reader.find_open_tags(prompt_ids)
        if tags is None:
            return None
        missing = self._student.find_missing(self._tokenizer.encode(tags.closing, special=False))
        if missing is None:
            return None
        return (
            f"the teacher's chat template opens a thought ({tags.opening}), and the response closes it by "
            f"{self._student.describe_missing(missing)}"
        )
