"""Finished traces of any origin: prompts with responses, as token ids of the student.

    a line of selections.jsonl              its best trajectory and the others, by their ids
    {"problem": ..., "generations": [...]}  several responses, with "correctness_math_verify" where known (OpenR1)
    a training example, see examples.py     messages, prompt and completion, question and response: one response

Fields such as "finish_reasons" and "is_reasoning_complete" state which responses are finished (see endings.py). Text
that no field calls cut off is taken for finished, unless it begins with a thought that it does not close.

{"teacher" | "model" | "generator": name} names the responses' teacher; without it the file's name is taken.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any

from genssd.distill.answers.thoughts import ThoughtReader
from genssd.distill.data.endings import select_endings
from genssd.distill.data.examples import encode_example
from genssd.distill.data.messages import QUESTION_FIELDS, parse_messages, parse_question
from genssd.distill.data.problems import parse_answer, parse_object
from genssd.distill.data.written_rows import (
    TextPrompt,
    WriterRecord,
    add_opening,
    make_conversation,
    read_text_prompt,
    read_writer_record,
)
from genssd.distill.files.rows import read_rows, stem_of
from genssd.distill.runs.journal import damaged_line
from genssd.engine.common.amounts import format_count
from genssd.engine.common.errors import InputError
from genssd.engine.texts.chat import THOUGHT_FIELDS, Messages
from genssd.engine.texts.text import Tokenizer

TEACHER_FIELDS = ("teacher", "model", "generator")
VERDICT_FIELDS = ("correctness_math_verify", "correctness", "correct")
FIELDS_OF_BEST = (
    "messages", "teacher_topk", "teacher_logprobs", "teacher_ids", "teacher_bytes", "completion_bytes", "chunks",
    *VERDICT_FIELDS, "undecided", "cut_by",
)  # fmt: skip
"""Fields of a row with several responses that belong to the first of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """One response to one prompt, and its location in the data."""

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    num_lead: int
    """Number of the last tokens of the prompt that training takes for the beginning of the response (`PairPrompt`)."""
    finished: bool
    """Whether the response ends in the end of sequence."""
    teacher: str
    """Name of the model that wrote the response."""
    answer: str | None
    """Reference answer of the prompt."""
    correct: bool | None
    """Whether the response is correct according to its row; None where the row has no verdict."""
    question: str
    """Text of the prompt's last turn that is not the assistant's; the whole prompt where the row has ids only."""
    file: str
    line: int
    """Number of the row's line in its file, or, in a table, of the row; from 1."""
    response: int
    """Index of the response in its row, from 0."""
    row_where: str
    """Name of the file and number of the line or row, for messages."""
    prompt: TextPrompt | None
    """Prompt as any model's chat template renders it; None where the row has ids alone."""
    writer: WriterRecord | None
    """What the row records of the model that wrote the response; None in rows without ids of the student's."""

    @property
    def prompt_key(self) -> str:
        """Hash of the prompt's token ids: 16 hexadecimal digits."""
        return blake2b(",".join(map(str, self.prompt_ids)).encode(), digest_size=8).hexdigest()

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)

    @property
    def where(self) -> str:
        """File, line and response, for messages."""
        return self.row_where + (f", response {self.response}" if self.response else "")


def read_traces(
    paths: Sequence[str | Path], tokenizer: Tokenizer, *, max_length: int, limit: int | None = None
) -> Iterator[Trace | str]:
    """Yield the traces of data files in order; for a row or response that is none, a message naming file and line.

    max_length: maximum number of tokens in prompt and response. limit: maximum number of rows per file. Raises
    InputError only on a file that cannot be read.
    """
    for path in paths:
        for raw_row in islice(read_rows(path), limit):
            where = raw_row.where
            try:
                fields = parse_object(raw_row.text, where)
                responses = _split_responses(fields, where)
                answer = _find_answer(fields, where)
                teacher = _find_teacher(fields, path)
            except InputError as error:
                yield str(error)
                continue
            for index, (row, correct) in enumerate(responses):
                response_where = where if len(responses) == 1 else f"{where}, response {index}"
                if "generations" in fields and not isinstance(row["completion"], str):
                    yield f"{response_where}: an element of generations must be text, not {row['completion']!r}"
                    continue
                try:
                    example = encode_example(row, tokenizer, response_where, Path(path).parent)
                    writer = None
                    if example.has_own_ids:
                        writer = read_writer_record(row, example.num_completion, response_where)
                except InputError as error:
                    yield str(error)
                    continue
                num_tokens = len(example.input_ids)
                if num_tokens > max_length:
                    yield (
                        f"{response_where}: {format_count(num_tokens, 'token')}, more than the {max_length} that the "
                        "student takes"
                    )
                    continue
                yield Trace(
                    prompt_ids=example.input_ids[: example.num_prompt],
                    response_ids=example.input_ids[example.num_prompt :],
                    num_lead=example.num_lead,
                    finished=not example.is_cut_off and example.input_ids[-1] in tokenizer.end_token_ids,
                    teacher=teacher,
                    answer=answer,
                    correct=correct,
                    question=example.question or tokenizer.decode(example.input_ids[: example.num_prompt]),
                    file=raw_row.file or str(path),
                    line=raw_row.number,
                    response=index,
                    row_where=where,
                    prompt=read_text_prompt(row, response_where),
                    writer=writer,
                )


def read_usable_traces(
    paths: Sequence[str | Path],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    limit: int | None,
    find_fault: Callable[[Trace], str | None] = lambda trace: None,
) -> tuple[list[Trace], list[str]]:
    """Return the traces of data files, and messages naming file and line for the rows and responses that are unusable.

    max_length, limit: as for `read_traces`. find_fault: returns the reason why the caller cannot use a trace, None if
    it can. Raises InputError when no trace is usable.
    """
    traces: list[Trace] = []
    bad_rows: list[str] = []
    for item in read_traces(paths, tokenizer, max_length=max_length, limit=limit):
        reason = None if isinstance(item, str) else find_fault(item)
        if isinstance(item, str):
            bad_rows.append(item)
        elif reason is not None:
            bad_rows.append(f"{item.where}: {reason}")
        else:
            traces.append(item)
    if not traces:
        listed = "".join(f"\n  {message}" for message in bad_rows[:10])
        raise InputError(f"{', '.join(map(str, paths))}: no trace that can be used{listed}")
    return traces, bad_rows


def describe_reading(traces: Sequence[Trace], bad_rows: Sequence[str]) -> str:
    """Return how many traces were read, and how many rows or responses cannot be used, for the progress."""
    return f"{format_count(len(traces), 'trace')} read" + (f", {len(bad_rows)} that cannot be used" if bad_rows else "")


def describe_source(trace: Trace) -> dict[str, Any]:
    """Return the field `source` of a trace's rows: its location in the data, and a fingerprint of its token ids."""
    content = f"{trace.prompt_key}:{','.join(map(str, trace.response_ids))}"
    fingerprint = blake2b(content.encode(), digest_size=8).hexdigest()
    return {"file": trace.file, "line": trace.line, "response": trace.response, "fingerprint": fingerprint}


def find_traces(rows: Iterable[Mapping[str, Any]], traces: Sequence[Trace], journal: Path) -> list[int]:
    """Return the index of its trace for every row of a journal with one row per trace, in any order.

    Raises InputError on a row of another trace, and on a second one of the same.
    """
    indices: dict[str, list[int]] = {}
    for index in reversed(range(len(traces))):  # a file that is given twice has every source twice
        indices.setdefault(_make_key(describe_source(traces[index])), []).append(index)
    found: list[int] = []
    for number, row in enumerate(rows, start=1):
        same = indices.get(_make_key(row.get("source")))
        if same is None:
            raise InputError(f"{journal} was begun with other data; choose another output_dir")
        if not same:
            raise damaged_line(journal, number, "an earlier line holds the same trace")
        found.append(same.pop())
    return found


def sort_by_trace(rows: Iterable[Mapping[str, Any]], traces: Sequence[Trace], journal: Path) -> list[dict[str, Any]]:
    """Return the rows of a journal with one row per trace, in the order of the traces."""
    rows = list(rows)
    order = find_traces(rows, traces, journal)
    return [dict(rows[number]) for number in sorted(range(len(rows)), key=order.__getitem__)]


def _make_key(source: object) -> str:
    return json.dumps(source, sort_keys=True)


def make_training_row(trace: Trace, response_ids: Sequence[int], tokenizer: Tokenizer) -> dict[str, Any]:
    """Return a row with a trace's prompt and a response to it: ids, which genssd trains on, and messages for others.

    Its field `correct` is the verdict that the data give; a command that judges replaces it.
    """
    text = tokenizer.decode(response_ids)
    if trace.prompt is None:
        rendered = str(tokenizer.hf.decode(list(trace.prompt_ids)))
        conversation = {"prompt": rendered, "completion": text, "answer": trace.answer}
    else:
        opening = ThoughtReader(tokenizer).read_opening(trace.prompt_ids)
        conversation = make_conversation(trace.prompt, add_opening(trace.prompt.text, opening, text), trace.answer)
    return {
        **conversation,
        "status": "finished" if response_ids[-1] in tokenizer.end_token_ids else "length",
        "correct": trace.correct,
        "teacher": trace.teacher,
        "student_prompt_ids": list(trace.prompt_ids),
        "lead_tokens": trace.num_lead,
        "completion_ids": list(response_ids),
        "tokenizer": tokenizer.fingerprint,
        "source": describe_source(trace),
    }


def _split_responses(fields: Mapping[str, Any], where: str) -> list[tuple[Mapping[str, Any], bool | None]]:
    """Return for every response of a row a row of its own, as training would read it, and whether it is correct."""
    if "generations" in fields:
        texts = fields["generations"]
        if not isinstance(texts, list) or not texts:
            raise InputError(f"{where}: generations must be a non-empty list of texts")
        shared = {"prompt": _parse_turns(fields, where), "tools": fields.get("tools")}
        verdicts: list[Any] = next((fields[name] for name in VERDICT_FIELDS if isinstance(fields.get(name), list)), [])
        if verdicts and len(verdicts) != len(texts):
            raise InputError(
                f"{where}: {format_count(len(texts), 'generation')} but {format_count(len(verdicts), 'verdict')}"
            )
        correct = [v if isinstance(v, bool) else None for v in verdicts] or [None] * len(texts)
        rows_of_responses: list[tuple[Mapping[str, Any], bool | None]] = []
        for i, text in enumerate(texts):
            own = {"completion": text, **select_endings(fields, i, len(texts), where)}
            rows_of_responses.append(({**shared, **own, **_select_thought(fields, i, len(texts), where)}, correct[i]))
        return rows_of_responses
    verdict = next((fields[name] for name in VERDICT_FIELDS if isinstance(fields.get(name), bool)), None)
    others = fields.get("others")
    rows = [fields]
    if isinstance(others, list) and "completion_ids" in fields:
        shared = {name: value for name, value in fields.items() if name not in FIELDS_OF_BEST}
        rows += [{**shared, **other} for other in others if isinstance(other, dict) and other.get("completion_ids")]
    return [(row, verdict if row is fields else _as_verdict(row.get("correct"))) for row in rows]


def _as_verdict(value: object) -> bool | None:
    return value if isinstance(value, bool) else None


def _parse_turns(fields: Mapping[str, Any], where: str) -> Messages:
    """Return the messages before the responses of a row with generations."""
    if isinstance(fields.get("prompt"), str):
        return parse_messages({**fields, "prompt": [{"role": "user", "content": fields["prompt"]}]}, "prompt", where)
    if "prompt" in fields:
        return parse_messages(fields, "prompt", where)
    if any(isinstance(fields.get(name), str) for name in QUESTION_FIELDS):
        return parse_question(fields, where)
    raise InputError(f"{where}: generations without a prompt; a row needs prompt or {', '.join(QUESTION_FIELDS)}")


def _select_thought(fields: Mapping[str, Any], index: int, count: int, where: str) -> dict[str, Any]:
    """Return the fields with the thought of one of `count` responses."""
    selected = {}
    for name in THOUGHT_FIELDS:
        thoughts = fields.get(name)
        if not thoughts:
            continue
        if isinstance(thoughts, str):
            thoughts = [thoughts]
        if not isinstance(thoughts, list) or len(thoughts) != count:
            raise InputError(
                f"{where}: {name} must be a list with one thought for each of the {format_count(count, 'generation')}"
            )
        if thoughts[index]:
            selected[name] = thoughts[index]
    return selected


def _find_answer(fields: Mapping[str, Any], where: str) -> str | None:
    """Return a row's reference answer; None in a row whose answer or solution is the response itself."""
    if "generations" in fields or "messages" in fields or "completion" in fields or "response" in fields:
        return parse_answer(fields, where)
    return None


def _find_teacher(fields: Mapping[str, Any], path: str | Path) -> str:
    for name in TEACHER_FIELDS:
        value = fields.get(name)
        if isinstance(value, Mapping):
            value = value.get("name")
        if isinstance(value, str) and value:
            return value
    return stem_of(path)
