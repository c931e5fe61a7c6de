"""Rows that other programs and other models read: a prompt and its response as messages, beside the token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from genssd.distill.data.messages import COMPLETION_FIELDS, parse_conversation
from genssd.engine.common.amounts import format_count
from genssd.engine.common.errors import InputError
from genssd.engine.readers.reading import ByteSpans
from genssd.engine.texts.chat import Messages

LARGEST_SURPRISAL = 1e6
"""Absolute value that no log-probability of a model reaches; NaN and huge numbers in a row are refused by it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextPrompt:
    """A prompt as a chat template of any model renders it."""

    text: str | Messages
    """Raw text, or the messages before the response."""
    tools: Sequence[Mapping[str, Any]] = ()
    """Descriptions of the tools that the assistant may call."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WriterRecord:
    """What a row records of the model that wrote its response."""

    fingerprint: str | None
    """Fingerprint of the model; None where the row has none."""
    prompt_ids: tuple[int, ...]
    """Prompt as the model read it; empty where the row does not have it."""
    logprobs: tuple[float, ...] | None
    """The model's log-probability of every token that it wrote; None where the row does not have them."""
    spans: ByteSpans | None
    """Number of bytes in every token of the response and of the model that wrote it; None where they are the same."""


def read_text_prompt(fields: Mapping[str, Any], where: str) -> TextPrompt | None:
    """Return the prompt of a row with a response; None where the row has it as token ids alone."""
    try:
        conversation = parse_conversation(fields, COMPLETION_FIELDS, where)
    except InputError:
        return None
    return TextPrompt(text=conversation.prompt, tools=conversation.tools)


def read_writer_record(fields: Mapping[str, Any], num_response: int, where: str) -> WriterRecord:
    """Return what a row with token ids of this tokenizer records of its writer. num_response: tokens in the response.

    Raises InputError naming `where` on log-probabilities, or numbers of bytes, of another number of tokens.
    """
    spans = read_spans(fields, num_response, where)
    num_written = num_response if spans is None else len(spans.teacher)
    teacher, values = fields.get("teacher"), fields.get("teacher_logprobs")
    fingerprint = teacher.get("fingerprint") if isinstance(teacher, Mapping) else None
    if values is not None and (
        not isinstance(values, list) or len(values) != num_written or not all(map(_is_logprob, values))
    ):
        raise InputError(
            f"{where}: teacher_logprobs must be a list of {format_count(num_written, 'number')}, one for each token"
        )
    ids = fields.get("prompt_ids")
    return WriterRecord(
        fingerprint=fingerprint if isinstance(fingerprint, str) else None,
        prompt_ids=tuple(ids) if isinstance(ids, list) and all(type(i) is int and i >= 0 for i in ids) else (),
        logprobs=None if values is None else tuple(map(float, values)),
        spans=spans,
    )


def read_spans(fields: Mapping[str, Any], num_response: int, where: str) -> ByteSpans | None:
    """Return the bytes of the tokens of a response that its student read by bytes; None of any other.

    num_response: tokens in the response. Raises InputError naming `where` on numbers that do not belong together.
    """
    if fields.get("teacher_bytes") is None:
        return None
    student, teacher = (_read_lengths(fields, name, where) for name in ("completion_bytes", "teacher_bytes"))
    if len(student) != num_response or sum(student) != sum(teacher):
        raise InputError(
            f"{where}: completion_bytes must have {format_count(num_response, 'number')}, one for each token, and the "
            "sum of teacher_bytes"
        )
    return ByteSpans(student=student, teacher=teacher)


def _read_lengths(fields: Mapping[str, Any], name: str, where: str) -> tuple[int, ...]:
    """Return the numbers of bytes in a field."""
    lengths = fields.get(name)
    if not isinstance(lengths, list) or not all(type(length) is int and length >= 0 for length in lengths):
        raise InputError(f"{where}: {name} must be a list of numbers of bytes")
    return tuple(lengths)


def _is_logprob(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return -LARGEST_SURPRISAL < value < LARGEST_SURPRISAL


def add_opening(prompt: str | Messages, opening: str, response: str) -> str:
    """Return the text of a response with the whole thought: what the rendered prompt ends in opens it.

    opening: that text, or an empty one. A prompt that is raw text holds it already.
    """
    return response if isinstance(prompt, str) else opening + response


def make_conversation(prompt: TextPrompt, response: str, answer: str | None) -> dict[str, Any]:
    """Return the fields of a prompt and its response in the forms that trainers read."""
    text = prompt.text
    turn = [{"role": "assistant", "content": response}]
    turns: Messages = [{"role": "user", "content": text}] if isinstance(text, str) else text
    row = {
        "messages": [*turns, *turn],
        "prompt": text,
        "completion": response if isinstance(text, str) else turn,
        "answer": answer,
    }
    return {**row, "tools": list(prompt.tools)} if prompt.tools else row
