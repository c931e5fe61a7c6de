"""The examples of data files: which rows are trained on, and why the others are not.

A row is one example (examples.py), or two where it is a preference pair.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from genssd.distill.data.chunk_writers import keep_writer
from genssd.distill.data.encoding import append_end, skip_opened
from genssd.distill.data.examples import Example, encode_example, parse_weight
from genssd.distill.data.messages import (
    CONTEXT_FIELDS,
    OPTION_FIELDS,
    QUESTION_FIELDS,
    REFUSED_FIELDS,
    SYSTEM_FIELDS,
    check_messages,
)
from genssd.distill.data.problems import parse_answer, read_objects
from genssd.distill.data.verdicts import RowVerdict, read_verdict, require_verdict
from genssd.distill.files.rows import RawRow
from genssd.engine.common.amounts import format_count
from genssd.engine.common.errors import InputError
from genssd.engine.common.model_choices import Role
from genssd.engine.texts.text import Tokenizer

PAIR_FIELDS = frozenset(
    ("prompt", "weight", "tools", *QUESTION_FIELDS, *SYSTEM_FIELDS, *CONTEXT_FIELDS, *OPTION_FIELDS, *REFUSED_FIELDS)
)
"""Fields of a preference pair that both of its completions share."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExampleSet:
    """All examples of a list of files."""

    examples: tuple[Example, ...]
    left_out: Mapping[str, int]
    """Number of rows that were left out, by reason."""
    wrong: int
    """Number of rows among the examples whose field `correct` is false."""
    undecided: int
    """Number of rows among the examples whose response could not be judged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RowReading:
    """What one row gives a training."""

    examples: tuple[Example, ...] = ()
    """Examples of the row: one, or the two of a preference pair; none where it is left out."""
    left_out: str | None = None
    """Why the row is left out; None where it is not."""
    verdict: RowVerdict | None = None
    """What the row says of its response; None where it says nothing."""


def read_examples(
    paths: Sequence[str | Path],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    statuses: Sequence[str],
    require_correct: bool = False,
    require_answers: bool = False,
    teacher: Tokenizer | None = None,
    writer: Role | None = None,
) -> ExampleSet:
    """Read the examples of data files. Rows with a `status` not in `statuses`, or longer than max_length tokens, are
    left out.

    require_correct: leave out all rows but those whose field `correct` is true, too. require_answers: read the
    reference answers of the rows, which all must have. teacher: tokenizer of a teacher that reads the rows' text in
    tokens of its own; None where there is none, or it reads the student's tokens. writer: whose chunks are trained in
    rows of two writers; None for both. Raises InputError naming file and line on a row without a trainable token, with
    none of the known fields, without the field `correct` where it is required, or without the writers of its chunks
    where one is chosen; and when all rows are left out.
    """
    examples: list[Example] = []
    left_out: Counter[str] = Counter()
    verdicts: Counter[str | None] = Counter()
    for path in paths:
        for raw_row, fields in read_objects(path):
            reading = read_row(
                raw_row,
                fields,
                tokenizer,
                Path(path).parent,
                max_length=max_length,
                statuses=statuses,
                require_correct=require_correct,
                require_answers=require_answers,
                teacher=teacher,
                writer=writer,
            )
            if reading.left_out is not None:
                left_out[reading.left_out] += 1
                continue
            examples += reading.examples
            verdicts[reading.verdict] += 1
    if not examples:
        reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.items()) or "the files are empty"
        raise InputError(f"{', '.join(map(str, paths))}: nothing to train on ({reasons})")
    return ExampleSet(
        examples=tuple(examples),
        left_out=dict(left_out),
        wrong=verdicts["wrong"],
        undecided=verdicts["undecided"],
    )


def _train_lead(example: Example, *, keeps_prompt: bool) -> Example:
    """Return the example with the lead in its completion.

    A teacher reads the lead in the completion, too, where its own prompt ends in the same tokens, and else reads the
    student's prompt. keeps_prompt: it reads its own prompt all the same, as it has tokens of its own.
    """
    lead = example.num_lead
    if not lead:
        return example
    num_prompt, teacher_prompt = example.num_prompt - lead, example.teacher_prompt_ids
    if not keeps_prompt:
        has_lead = teacher_prompt[-lead:] == example.input_ids[num_prompt : example.num_prompt]
        teacher_prompt = teacher_prompt[:-lead] if has_lead else ()
    return replace(
        example,
        num_prompt=num_prompt,
        chunk_weights=((lead, 1.0), *example.chunk_weights) if example.chunk_weights else (),
        teacher_prompt_ids=teacher_prompt,
    )


def read_row(
    raw_row: RawRow,
    fields: Mapping[str, Any],
    tokenizer: Tokenizer,
    directory: Path,
    *,
    max_length: int,
    statuses: Sequence[str],
    require_correct: bool,
    require_answers: bool = False,
    teacher: Tokenizer | None = None,
    writer: Role | None = None,
) -> RowReading:
    """Return the examples of one row, or why it is left out.

    directory: of the row's file; names of other files in the row are relative to it. The other arguments and the errors
    are those of `read_examples`.
    """
    where, status = raw_row.where, fields.get("status")
    if status is not None and status not in statuses:
        return RowReading(left_out=f"status {status}")
    if status is not None and fields.get("completion_ids") == []:
        return RowReading(left_out="without a token: pruned at once")
    verdict = read_verdict(fields, raw_row.text, where)
    if require_correct and require_verdict(verdict, where) != "correct":
        return RowReading(left_out=str(verdict))
    if "rejected" in fields:
        encoded = _encode_pair(fields, tokenizer, where, directory)
    else:
        encoded = (encode_example(fields, tokenizer, where, directory, teacher),)
    if status is None and "length" not in statuses and any(example.is_cut_off for example in encoded):
        return RowReading(left_out="cut off, by a field of the row or within a thought")
    if max(len(example.input_ids) for example in encoded) > max_length:
        return RowReading(left_out=f"longer than {format_count(max_length, 'token')}")
    if writer is not None:
        encoded = tuple(kept for one in encoded if (kept := keep_writer(one, fields, writer)) is not None)
        if not encoded:
            return RowReading(left_out=f"without a chunk of the {writer}")
    if require_answers:
        answer = _require_answer(fields, where)
        encoded = tuple(replace(example, answer=answer) for example in encoded)
    trained = tuple(_train_lead(example, keeps_prompt=teacher is not None) for example in encoded)
    return RowReading(examples=trained, verdict=verdict)


def _require_answer(fields: Mapping[str, Any], where: str) -> str:
    """Return the reference answer of a row. Raises InputError naming `where` where it has none."""
    answer = parse_answer(fields, where)
    if answer is None:
        raise InputError(
            f"{where}: no reference answer (a field `answer`), by which rollout.train_on judges what the student "
            "writes; give the row one, or leave the option out"
        )
    return answer


def _encode_pair(fields: Mapping[str, Any], tokenizer: Tokenizer, where: str, directory: Path) -> tuple[Example, ...]:
    """Return the examples of the chosen and of the rejected completion of a preference pair."""
    has_usable_ids = fields.get("tokenizer") == tokenizer.fingerprint
    pair = []
    for name in ("chosen", "rejected"):
        if not has_usable_ids and "problem_prompt" in fields:
            pair.append(_encode_continuation(fields, name, tokenizer, f"{where}, {name}"))
            continue
        row = {key: value for key, value in fields.items() if key in PAIR_FIELDS} | {"completion": fields.get(name)}
        if has_usable_ids:
            row |= {
                "tokenizer": fields["tokenizer"],
                "student_prompt_ids": fields.get("student_prompt_ids"),
                "prompt_ids": fields.get("teacher_prompt_ids"),
                "completion_ids": fields.get(f"{name}_token_ids"),
            }
        example = encode_example(row, tokenizer, f"{where}, {name}", directory)
        pair.append(replace(example, rejected=name == "rejected"))
    return tuple(pair)


def _encode_continuation(fields: Mapping[str, Any], name: str, tokenizer: Tokenizer, where: str) -> Example:
    """Return one completion of a pair of genssd's own as another model's chat template renders it.

    The prompt is the problem and the response before the pair; a completion that does not end the response gets no end.
    """
    problem, before, text = fields["problem_prompt"], fields.get("response_so_far", ""), fields.get(name)
    if not isinstance(before, str) or not isinstance(text, str):
        raise InputError(f"{where}: {name} and response_so_far must be text")
    is_raw = isinstance(problem, str)
    try:
        if is_raw:
            prompt = tokenizer.encode_prompt(problem)
        else:
            rendered = tokenizer.render_prompt(check_messages(problem, "problem_prompt", where))
            prompt = tokenizer.encode_rendered(rendered)
            before, text = skip_opened(rendered, (before, text), tokenizer)
    except InputError as error:
        raise InputError(str(error) if str(error).startswith(where) else f"{where}: {error}") from None
    prompt += tokenizer.encode_plain(before)
    completion = tokenizer.encode_plain(text)
    if fields.get(f"{name}_finished") is True:
        completion = append_end(completion, tokenizer)
    if not completion:
        raise InputError(f"{where}: the completion has no token to train on")
    question = problem if is_raw else str(problem[-1]["content"])
    return Example(
        input_ids=(*prompt, *completion),
        num_prompt=len(prompt),
        weight=parse_weight(fields, where),
        rejected=name == "rejected",
        question=question,
        where=where,
    )
