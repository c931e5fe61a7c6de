"""From the rows of the data to the questions of a diagnosis: problems, contexts, and the prompts of every reader."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from genssd.distill.data.problems import ProblemRow, ProblemSet, check_same_problem, read_usable_problems
from genssd.distill.diagnose.config import DiagnoseConfig
from genssd.distill.diagnose.contexts import build_prompt, read_contexts
from genssd.distill.diagnose.forcing import Question
from genssd.distill.runs.journal import damaged_line
from genssd.distill.runs.run import Run
from genssd.engine.checkpoints.checkpoint import locate
from genssd.engine.checkpoints.config import load_config
from genssd.engine.common.amounts import format_count
from genssd.engine.common.errors import InputError
from genssd.engine.texts.text import Tokenizer

Prompts = dict[tuple[str, int], list[int]]
"""Token ids of every reader's prompt, by the reader's name and the index of the question's row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QuestionData:
    """The rows of the data that can be questions."""

    usable: ProblemSet
    contexts: Mapping[int, Mapping[str, str]]
    """Texts of the contexts, by the index of the row and their fields."""


def read_question_data(config: DiagnoseConfig) -> QuestionData:
    """Return the rows that have a reference answer and all contexts. Raises InputError when there is none."""
    problems = read_usable_problems(config.data, config.limit, system_prompt=config.system_prompt)
    contexts, faults = read_contexts(config.data, config.contexts, config.limit)

    def find_fault(problem: ProblemRow) -> str | None:
        if problem.answer is None:
            return "no answer; a row needs answer, target or solution"
        return faults.get(problem.index)

    return QuestionData(usable=problems.leave_out(find_fault), contexts=contexts)


def encode_prompts(
    config: DiagnoseConfig, data: QuestionData, tokenizers: Mapping[str, Tokenizer]
) -> tuple[QuestionData, Prompts]:
    """Return the questions that every reader has positions for, and all prompts. tokenizers: by model.

    Raises InputError when no question is left.
    """
    positions = {model: load_config(locate(model)).max_position_embeddings for model in tokenizers}
    prompts: Prompts = {}

    def find_fault(problem: ProblemRow) -> str | None:
        for reader in config.readers():
            prompt = build_prompt(reader, problem, data.contexts[problem.index], config.templates)
            ids = prompts[reader.name, problem.index] = tokenizers[reader.model].encode_prompt(prompt)
            free = positions[config.student] - len(prompts["itself", problem.index])
            if len(ids) + min(config.max_tokens, max(free, 1)) > positions[reader.model]:
                return (
                    f"the prompt of {reader.name!r} has {format_count(len(ids), 'token')}, and with "
                    f"{config.max_tokens} of the "
                    f"response more than the {positions[reader.model]} positions of {reader.model}; lower max_tokens, "
                    "or shorten the context"
                )
        return None

    return replace(data, usable=data.usable.leave_out(find_fault)), prompts


def make_questions(problems: Sequence[ProblemRow], tokenizer: Tokenizer) -> list[Question]:
    """Return the problems as questions, in order. tokenizer: the student's."""
    seen: Counter[tuple[int, ...]] = Counter()
    questions = []
    for problem in problems:
        ids = tuple(tokenizer.encode_prompt(problem.prompt))
        questions.append(
            Question(
                index=problem.index, label=problem.where, prompt=problem.prompt, prompt_ids=ids,
                occurrence=seen[ids], answer=problem.answer,
            )
        )  # fmt: skip
        seen[ids] += 1
    return questions


def find_done(run: Run, config: DiagnoseConfig, data: QuestionData) -> frozenset[int]:
    """Return the indices of the questions in the journal. Raises InputError when they are not those of the data."""
    done: set[int] = set()
    for number, row in enumerate(run.done(), start=1):
        check_same_problem(row, data.usable.problems, config.data, run.journal_path)
        index = row["index"]
        if index in done:
            raise damaged_line(run.journal_path, number, f"question {index} is also in an earlier line")
        if row.get("contexts") != data.contexts[index]:
            raise InputError(f"{config.data}: row {index} has other contexts than {run.journal_path} was begun with")
        done.add(index)
    return frozenset(done)
