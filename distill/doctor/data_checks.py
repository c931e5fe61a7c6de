"""Checks of the data: rows that cannot be used, answers that cannot be verified, lengths, questions of the exam."""

from __future__ import annotations

import time
from statistics import median

from genssd.distill.answers.judge import classify_reference, judge
from genssd.distill.answers.numbers import parse_quantity
from genssd.distill.data.overlap import find_eval_overlap, iter_file_questions, list_examples, list_problems
from genssd.distill.doctor.findings import Finding, list_lines
from genssd.distill.doctor.inputs import Inputs, find_max_length, read_examples
from genssd.distill.evaluate.run import read_answered_problems
from genssd.distill.rounds.config import DistillConfig
from genssd.engine.common.amounts import format_count
from genssd.engine.common.errors import GenssdError
from genssd.engine.common.quoting import quote

OTHER_ANSWER = "q + 17"
"""Formula that is hardly the answer of any problem, with which references are compared."""


def check_rows(inputs: Inputs) -> list[Finding]:
    """Find the rows that cannot be used, by line, and those that a training leaves out, by reason."""
    rows = inputs.rows
    if not rows.count:
        return []
    faults = [*rows.faults, *inputs.prompts.faults]
    num_usable = rows.count - len(faults) - sum(rows.left_out.values())
    left_out = [f"{format_count(count, 'row')} left out: {reason}" for reason, count in rows.left_out.items()]
    line = f"{num_usable:,} {rows.describe()} can be used"
    if not num_usable:
        return [
            Finding(
                name="rows",
                level="error",
                line=f"none {rows.describe()} can be used",
                detail=list_lines([*left_out, *faults]),
                fix="mend the rows that are listed (docs/rows.md has the forms that are read)",
            )
        ]
    if faults or left_out:
        # a training refuses a row that it cannot read; other commands leave it out
        is_refused = bool(faults) and inputs.settings.reads_examples
        return [
            Finding(
                name="rows",
                level="error" if is_refused else "warning",
                line=line
                if not is_refused
                else f"{format_count(len(faults), 'row')} cannot be read: train refuses them",
                detail=list_lines([*left_out, *faults]),
                fix="mend or remove the rows that are listed (docs/rows.md has the forms that are read)"
                if faults
                else None,
            )
        ]
    return [Finding(name="rows", level="ok", line=line)]


def check_held_out(inputs: Inputs) -> list[Finding]:
    """Find the rows of eval_data that cannot be used: a training's rows, and the problems of distill's evaluations."""
    settings, name = inputs.settings, "rows of eval_data"
    limit = max(inputs.rows.count, 1)
    try:
        faults: list[str] = []
        count = 0
        if settings.training is not None and settings.training.eval_data and inputs.student is not None:
            held_out = read_examples(inputs, settings.training.eval_data, limit, is_held_out=True)
            count += held_out.count
            faults += held_out.faults
            if not held_out.examples and not faults:
                faults.append(f"none {held_out.describe()} is left to measure the loss on")
        if isinstance(settings.config, DistillConfig) and settings.config.eval_data is not None:
            most = min(limit, settings.config.eval_limit or limit)
            read_answered_problems(settings.config.eval_data, most, system_prompt=settings.chat.system_prompt)
            count += most
    except GenssdError as error:
        return [Finding(name=name, level="error", line=str(error))]
    if not count:
        return []
    if faults:
        fix = "mend or remove the rows that are listed (docs/rows.md has the forms that are read)"
        line = f"{format_count(len(faults), 'fault')} in up to {format_count(count, 'row')}: train refuses the file"
        return [Finding(name=name, level="error", line=line, detail=list_lines(faults), fix=fix)]
    return [Finding(name=name, level="ok", line=f"the first {format_count(count, 'row')} can be used")]


def check_answers(inputs: Inputs) -> list[Finding]:
    """Find reference answers that no response could be verified against."""
    problems = inputs.rows.problems
    if not problems:
        return []
    missing = [f"{p.where}: no reference answer" for p in problems if p.answer is None]
    unverifiable = []
    untried = 0
    deadline = time.monotonic() + inputs.formula_seconds
    for problem in problems:
        if problem.answer is None:
            continue
        is_tried = time.monotonic() < deadline or not _is_formula(problem.answer)
        untried += not is_tried
        reason = find_unverifiable(problem.answer, with_other=is_tried)
        if reason is not None:
            unverifiable.append(f"{problem.where}: {quote(problem.answer)}: {reason}")
    count = len(problems) - len(missing) - len(unverifiable)
    line = f"{count:,} {inputs.rows.describe()} can be verified"
    if untried and inputs.formula_seconds:
        line += f"; {format_count(untried, 'formula')} not tried, for lack of time"
    needed = inputs.settings.needs_answers
    if not count and needed:
        return [
            Finding(
                name="answers",
                level="error",
                line=f"no answer {inputs.rows.describe()} can be verified, and {inputs.settings.command} needs them",
                detail=list_lines([*unverifiable, *missing]),
                fix="give the rows a field answer, or take --no-require-correct where the command has it",
            )
        ]
    if unverifiable or (missing and needed):
        return [
            Finding(
                name="answers",
                level="warning",
                line=line,
                detail=list_lines([*unverifiable, *missing]),
                fix="write these answers as numbers, formulas or words alone; without one, a response is never correct",
            )
        ]
    if not count:
        line = f"no row {inputs.rows.describe()} has a reference answer: responses are not judged"
    return [Finding(name="answers", level="ok", line=line)]


def find_unverifiable(answer: str, *, with_other: bool) -> str | None:
    """Return why responses cannot be verified against a reference answer; None where they can.

    The answer itself must count as correct. with_other: another answer must be told from it as well: a reference that
    math-verify does not read is only ever equal to its own letters. A formula takes its time.
    """
    verdict = judge(rf"\boxed{{{answer}}}", answer)
    if not verdict.is_correct:
        return verdict.undecided or "the same answer in a box counts as wrong"
    return judge(rf"\boxed{{{OTHER_ANSWER}}}", answer).undecided if with_other and _is_formula(answer) else None


def _is_formula(answer: str) -> bool:
    """Return whether a reference answer is neither a number nor the letter of an option."""
    reference, kind = classify_reference(answer)
    return kind != "choice" and parse_quantity(reference) is None


def check_lengths(inputs: Inputs) -> list[Finding]:
    """Find prompts and examples that are too long for the models, or leave too little room for a response."""
    if inputs.settings.reads_examples:
        return _check_example_lengths(inputs)
    lengths, max_tokens = inputs.prompts.list_lengths(), inputs.settings.max_tokens
    if not lengths or not inputs.models or max_tokens is None:
        return []
    positions = {title: model.config.max_position_embeddings for title, model in inputs.models.items()}
    where = {problem.index: problem.where for problem in inputs.rows.problems}
    too_long = [
        f"{where[index]}: "
        + ", ".join(
            f"{len(ids)} of {inputs.models[title].phrase}'s {positions[title]} positions"
            for title, ids in by_title.items()
        )
        for index, by_title in inputs.prompts.ids.items()
        if any(len(ids) >= positions[title] for title, ids in by_title.items())
    ]
    longest = {title: max(by_title[title] for by_title in lengths) for title in positions}
    middle = {title: int(median(by_title[title] for by_title in lengths)) for title in positions}
    lines = [
        f"{title}: prompts of up to {format_count(longest[title], 'token')} (median {middle[title]:,}), and max_tokens "
        f"{max_tokens:,}, in {positions[title]:,} positions"
        for title in positions
    ]
    room = min(positions[title] - longest[title] for title in positions)
    if too_long:
        return [
            Finding(
                name="lengths",
                level="error" if len(too_long) >= len(lengths) else "warning",
                line=f"too long for a model: {format_count(len(too_long), 'prompt')} {inputs.rows.describe()}",
                detail=list_lines([*lines, *too_long]),
                fix="shorten them, or take a model with more positions",
            )
        ]
    if room < max_tokens:
        return [
            Finding(
                name="lengths",
                level="warning",
                line=f"after the longest prompt {format_count(room, 'position')} are left, and max_tokens is "
                f"{max_tokens:,}: longer responses are cut off (status length)",
                detail=list_lines(lines),
                fix=f"--max-tokens {room}, shorter prompts, or a model with more positions",
            )
        ]
    line = f"prompts of up to {max(longest.values()):,} tokens and responses of up to {max_tokens:,} fit the positions"
    return [Finding(name="lengths", level="ok", line=line, detail=list_lines(lines))]


def _check_example_lengths(inputs: Inputs) -> list[Finding]:
    examples = inputs.rows.examples
    if not examples:
        return []
    most = find_max_length(inputs)
    lengths = sorted(len(example.input_ids) for example in examples)
    cut = sum(count for reason, count in inputs.rows.left_out.items() if reason.startswith("longer than"))
    line = (
        f"examples of up to {format_count(lengths[-1], 'token')} (median {int(median(lengths)):,}), of which {most:,} "
        "are read"
    )
    if cut:
        return [
            Finding(
                name="lengths",
                level="warning",
                line=f"{line}; {format_count(cut, 'longer row')} {inputs.rows.describe()} left out",
                fix="raise max_length, as far as the positions of the models and the memory go",
            )
        ]
    return [Finding(name="lengths", level="ok", line=line)]


def check_overlap(inputs: Inputs) -> list[Finding]:
    """Find rows of the data whose question stands in the evaluation data."""
    settings, student = inputs.settings, inputs.student
    paths = [] if settings.training is None else [*settings.training.eval_data]
    if isinstance(settings.config, DistillConfig) and settings.config.eval_data is not None:
        paths.append(settings.config.eval_data)
    if not paths or student is None:
        return []
    name = "overlap with the exam"
    try:
        examples = list_examples(inputs.rows.examples, student.tokenizer)
        rows = [*list_problems(inputs.rows.problems), *examples]
        overlap = find_eval_overlap(rows, iter_file_questions(paths))
    except GenssdError as error:
        return [Finding(name=name, level="error", line=str(error))]
    found = [*overlap.exact, *overlap.near]
    if not found:
        return [Finding(name=name, level="ok", line=f"no question {inputs.rows.describe()} stands in eval_data")]
    is_allowed = getattr(settings.config, "allow_eval_overlap", False)
    return [
        Finding(
            name=name,
            level="warning" if is_allowed else "error",
            line=f"{len(found):,} {inputs.rows.describe()} have a question of eval_data: the exam measures memory",
            detail=list_lines([f"{row}: {other}" for row, other in found]),
            fix="remove them from the data; --allow-eval-overlap runs all the same",
        )
    ]
