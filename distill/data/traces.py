"""Finished traces of any origin: prompts with responses, as token ids of the student.

    a line of selections.jsonl              its best trajectory and the others, by their ids
    {"problem": ..., "generations": [...]}  several responses, with "correctness_math_verify" where known (OpenR1)
    what training reads                     messages, prompt and completion, question and response: one response

{"teacher" | "model" | "generator": name} says who wrote them; without it the file's name does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any

from genssd.distill.data.examples import Example, encode_example
from genssd.distill.data.problems import QUESTION_FIELDS, parse_object, read_lines, reference_answer
from genssd.engine.errors import InputError
from genssd.engine.text import Tokenizer

TEACHER_FIELDS = ("teacher", "model", "generator")
VERDICT_FIELDS = ("correctness_math_verify", "correctness", "correct")


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """One response to one prompt. file, line and response say where it stands; line counts from 1, response from 0."""

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    finished: bool
    """Whether it ends in the end of sequence."""
    teacher: str
    answer: str | None
    """The prompt's reference answer."""
    correct: bool | None
    """As the row says; None where it does not."""
    question: str
    """The prompt's last turn that is not the assistant's, as text."""
    file: str
    line: int
    response: int

    @property
    def prompt_key(self) -> str:
        """Equal for equal prompts."""
        return blake2b(",".join(map(str, self.prompt_ids)).encode(), digest_size=8).hexdigest()

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)

    @property
    def where(self) -> str:
        return f"{self.file}, line {self.line}" + (f", response {self.response}" if self.response else "")


def read_traces(
    paths: Sequence[str | Path], tokenizer: Tokenizer, *, max_length: int, limit: int | None = None
) -> Iterator[Trace | str]:
    """The traces of JSONL files, in order; for what cannot be used, a message naming file and line instead.

    limit: rows per file. Raises InputError only on a file that cannot be read.
    """
    for path in paths:
        for number, raw in islice(read_lines(path), limit):
            where = f"{path}, line {number}"
            try:
                fields = parse_object(raw, where)
                responses = _responses(fields, where)
                answer = _reference(fields, where)
                teacher = _teacher(fields, path)
            except InputError as error:
                yield str(error)
                continue
            for index, (row, correct) in enumerate(responses):
                here = where if len(responses) == 1 else f"{where}, response {index}"
                try:
                    example = encode_example(row, tokenizer, here)
                except InputError as error:
                    yield str(error)
                    continue
                if len(example.input_ids) > max_length:
                    yield f"{here}: {len(example.input_ids)} tokens, more than the {max_length} that the student takes"
                    continue
                yield Trace(
                    prompt_ids=example.input_ids[: example.num_prompt],
                    response_ids=example.input_ids[example.num_prompt :],
                    finished=example.input_ids[-1] in tokenizer.end_token_ids,
                    teacher=teacher,
                    answer=answer,
                    correct=correct,
                    question=_question(row, example, tokenizer),
                    file=str(path),
                    line=number,
                    response=index,
                )


def usable_traces(
    paths: Sequence[str | Path],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    limit: int | None,
    unfit: Callable[[Trace], str | None] = lambda trace: None,
) -> tuple[list[Trace], list[str]]:
    """All traces of JSONL files, and messages naming file and line for what cannot be used.

    unfit: why the caller has no use for a trace, None if it has. Raises InputError when nothing is left.
    """
    traces: list[Trace] = []
    bad_rows: list[str] = []
    for item in read_traces(paths, tokenizer, max_length=max_length, limit=limit):
        reason = None if isinstance(item, str) else unfit(item)
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


def source_of(trace: Trace) -> dict[str, Any]:
    """Where a trace stands and what it says, as rows have it."""
    said = f"{trace.prompt_key}:{','.join(map(str, trace.response_ids))}"
    fingerprint = blake2b(said.encode(), digest_size=8).hexdigest()
    return {"file": trace.file, "line": trace.line, "response": trace.response, "fingerprint": fingerprint}


def check_same_traces(rows: Iterable[Mapping[str, Any]], traces: Sequence[Trace], journal: Path) -> int:
    """Return the number of rows of a journal with one row per trace.

    Raises InputError when they are not the rows of the first traces.
    """
    count = 0
    for row in rows:
        if count == len(traces) or row.get("source") != source_of(traces[count]):
            raise InputError(f"{journal} was begun with other data; choose another output_dir")
        count += 1
    return count


def training_row(trace: Trace, response_ids: Sequence[int], tokenizer: Tokenizer) -> dict[str, Any]:
    """A response to a trace's prompt as a row that training reads by its ids, and others by its text."""
    return {
        "prompt": str(tokenizer.hf.decode(list(trace.prompt_ids))),
        "completion": tokenizer.decode(response_ids),
        "answer": trace.answer,
        "teacher": trace.teacher,
        "student_prompt_ids": list(trace.prompt_ids),
        "completion_ids": list(response_ids),
        "tokenizer": tokenizer.fingerprint,
        "source": source_of(trace),
    }


def _responses(fields: Mapping[str, Any], where: str) -> list[tuple[Mapping[str, Any], bool | None]]:
    """One row for every response, as training would read it, and the verdict the row has on it."""
    if "generations" in fields:
        texts = fields["generations"]
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
            raise InputError(f"{where}: generations must be a non-empty list of texts")
        prompt = next((fields[name] for name in ("prompt", *QUESTION_FIELDS) if fields.get(name)), None)
        if prompt is None:
            raise InputError(
                f"{where}: generations without a prompt; a row needs prompt or {', '.join(QUESTION_FIELDS)}"
            )
        asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        verdicts: list[Any] = next((fields[name] for name in VERDICT_FIELDS if isinstance(fields.get(name), list)), [])
        if verdicts and len(verdicts) != len(texts):
            raise InputError(f"{where}: {len(texts)} generations but {len(verdicts)} verdicts")
        known = [v if isinstance(v, bool) else None for v in verdicts] or [None] * len(texts)
        return [({"prompt": asked, "completion": text}, verdict) for text, verdict in zip(texts, known, strict=True)]
    verdict = next((fields[name] for name in VERDICT_FIELDS if isinstance(fields.get(name), bool)), None)
    others = fields.get("others")
    rows = [fields]
    if isinstance(others, list) and "completion_ids" in fields:
        rows += [{**fields, **other} for other in others if isinstance(other, dict) and other.get("completion_ids")]
    return [(row, verdict if row is fields else None) for row in rows]


def _question(row: Mapping[str, Any], example: Example, tokenizer: Tokenizer) -> str:
    """Without the chat template where the row tells them apart."""
    turns = row.get("messages") or row.get("prompt")
    asked = next((row[name] for name in QUESTION_FIELDS if isinstance(row.get(name), str)), None)
    if isinstance(turns, list):
        asked = next((t["content"] for t in reversed(turns) if t.get("role") != "assistant"), asked)
    elif isinstance(turns, str):
        asked = turns
    return str(asked) if asked else tokenizer.decode(example.input_ids[: example.num_prompt])


def _reference(fields: Mapping[str, Any], where: str) -> str | None:
    """The known answer, unless that field is the response itself."""
    if "generations" in fields or "messages" in fields or "completion" in fields or "response" in fields:
        return reference_answer(fields, where)
    return None


def _teacher(fields: Mapping[str, Any], path: str | Path) -> str:
    for name in TEACHER_FIELDS:
        value = fields.get(name)
        if isinstance(value, Mapping):
            value = value.get("name")
        if isinstance(value, str) and value:
            return value
    return Path(path).stem
