"""Training examples: token ids, and the number of them that belong to the prompt.

Rows of a journal of genssd are used by their token ids, so that training sees exactly the tokens that were sampled.
Rows of any other origin go through the tokenizer and its chat template:

    {"messages": [..., {"role": "assistant", ...}]}     the last turn is trained
    {"prompt": text or messages, "completion": text or messages}
    {"question" | "problem" | ...: text, "completion" | "response" | "output" | "solution" | "answer": text}

The answer of a problem ("113") is no response: such rows are refused (final_answers.py).

    {"prompt": text, "chosen": text, "rejected": text}  a preference pair: two examples; genssd's own have ids, too

A completion that its row states to be cut off ("finish_reason": "length" and the like, see endings.py), or that opens
a thought and never closes it, has the status "length": no end of sequence is added to it.

A number in the field `weight` multiplies the loss of a row's tokens. An element of the field `chunks` has the number of
its `tokens`, and may have a `weight` that multiplies the loss of these. Rows with ids may also have the prompt as the
teacher reads it (`prompt_ids`), the number of the prompt's last tokens that are trained (`lead_tokens`), and the
location of the teacher's most likely tokens (`teacher_topk`, see topk_store.py).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from genssd.distill.answers.forms import Outcome
from genssd.distill.data.encoding import check_same_thought, encode_conversation
from genssd.distill.data.endings import is_finished
from genssd.distill.data.final_answers import check_is_no_problem
from genssd.distill.data.messages import COMPLETION_FIELDS, find_question, parse_conversation
from genssd.distill.data.teacher_text import TeacherText, read_stored
from genssd.distill.data.topk_store import TopkLocation, locate_topk
from genssd.engine.common.amounts import format_count
from genssd.engine.common.errors import InputError
from genssd.engine.texts.text import Tokenizer

LARGEST_ID = (1 << 31) - 1
"""Largest token id of any tokenizer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One sequence, a prompt and its completion; the loss is computed over the completion."""

    input_ids: tuple[int, ...]
    """Token ids of the prompt, then of the completion."""
    num_prompt: int
    """Number of tokens in the prompt."""
    num_lead: int = 0
    """Number of tokens in the lead, which opens or closes the thought before the response (`PairPrompt`): the last ones
    of the prompt, or, in the examples that `read_examples` returns, the first ones of the completion."""
    weight: float = 1.0
    """Weight of the loss of all completion tokens, from the row's field `weight`."""
    chunk_weights: tuple[tuple[int, float], ...] = ()
    """Number of tokens and weight of every chunk; the weight multiplies that of the row. Empty if all are 1."""
    teacher_prompt_ids: tuple[int, ...] = ()
    """Prompt as the teacher reads it; empty where it equals the student's."""
    teacher_text: TeacherText | None = None
    """Completion in the tokens of a teacher with another tokenizer, where the row has them."""
    topk: TopkLocation | None = None
    """Location of the teacher's most likely tokens along the completion."""
    rejected: bool = False
    """Whether this is the worse completion of a preference pair."""
    is_cut_off: bool = False
    """Whether the completion is text that was cut off, so that it has no end of sequence."""
    has_own_ids: bool = False
    """Whether the token ids are those of the row, and not made from its text."""
    answer: str | None = None
    """Reference answer of the row, where it is asked for."""
    outcome: Outcome | None = None
    """Verdict on a completion that the student wrote; None where none is asked for."""
    question: str = ""
    """Text of the prompt's last turn that is not the assistant's; empty where the row has token ids alone."""
    where: str = ""
    """File and line of the row, for messages."""

    @property
    def num_completion(self) -> int:
        return len(self.input_ids) - self.num_prompt

    @property
    def completion_ids(self) -> tuple[int, ...]:
        return self.input_ids[self.num_prompt :]

    def token_weights(self) -> list[float]:
        """Return the weight of the loss of every completion token, [num_completion]."""
        chunks = self.chunk_weights or ((self.num_completion, 1.0),)
        return [self.weight * weight for tokens, weight in chunks for _ in range(tokens)]


def encode_example(
    fields: Mapping[str, Any], tokenizer: Tokenizer, where: str, directory: Path, teacher: Tokenizer | None = None
) -> Example:
    """Encode a row, by its own token ids where this tokenizer made them. Raises InputError naming `where`.

    directory: of the row's file; names of other files in the row are relative to it. teacher: as for `read_examples`.
    """
    has_usable_ids = fields.get("tokenizer") == tokenizer.fingerprint and bool(fields.get("completion_ids"))
    is_cut_off = False
    try:
        if has_usable_ids:
            prompt = _check_ids(fields.get("student_prompt_ids"), tokenizer, f"{where}: student_prompt_ids")
            completion = _check_ids(fields["completion_ids"], tokenizer, f"{where}: completion_ids")
        else:
            check_is_no_problem(fields, COMPLETION_FIELDS, where)
            conversation = parse_conversation(fields, COMPLETION_FIELDS, where)
            encoded = encode_conversation(conversation, tokenizer, is_finished(fields, where))
            prompt, completion, is_cut_off = encoded.prompt, encoded.completion, encoded.is_cut_off
        question = find_question(fields, where)
    except InputError as error:
        raise InputError(str(error) if str(error).startswith(where) else f"{where}: {error}") from None
    if not completion:
        raise InputError(f"{where}: the completion has no token to train on")
    if not prompt:
        raise InputError(f"{where}: the prompt is empty")
    example = Example(
        input_ids=(*prompt, *completion),
        num_prompt=len(prompt),
        weight=parse_weight(fields, where),
        is_cut_off=is_cut_off,
        has_own_ids=has_usable_ids,
        question=question or "",
        where=where,
    )
    if has_usable_ids:
        example = _add_journal_fields(example, fields, tokenizer, where, directory)
    return example if teacher is None else _add_teacher_text(example, fields, tokenizer, teacher, where)


def _add_teacher_text(
    example: Example, fields: Mapping[str, Any], student: Tokenizer, teacher: Tokenizer, where: str
) -> Example:
    """Return the example with the prompt as a teacher with another tokenizer reads it, and its tokens of a search."""
    text = read_stored(fields, example.completion_ids, teacher, where) if example.has_own_ids else None
    if text is not None and fields.get("prompt_ids"):
        return replace(example, teacher_text=text, teacher_prompt_ids=tuple(fields["prompt_ids"]))
    try:
        conversation = parse_conversation(fields, COMPLETION_FIELDS, where)
        check_same_thought(conversation, student, teacher)
        prompt = encode_conversation(conversation, teacher, is_finished(fields, where)).prompt
    except InputError as error:
        named = str(error).removeprefix(f"{where}: ")
        raise InputError(f"{where}: for the teacher: {named}") from None
    return replace(example, teacher_prompt_ids=tuple(prompt))


def _add_journal_fields(
    example: Example, fields: Mapping[str, Any], tokenizer: Tokenizer, where: str, directory: Path
) -> Example:
    """Return the example with the chunks' weights, the teacher's prompt and the top k of its row."""
    lead = fields.get("lead_tokens", 0)
    if type(lead) is not int or not 0 <= lead < example.num_prompt:
        raise InputError(
            f"{where}: lead_tokens must be a number of tokens of student_prompt_ids, which has {example.num_prompt}, "
            f"not {lead!r}"
        )
    teacher_prompt: list[int] = []
    if fields.get("prompt_ids"):
        teacher_prompt = _check_ids(fields["prompt_ids"], None, f"{where}: prompt_ids")
    is_same_prompt = tuple(teacher_prompt) == example.input_ids[: example.num_prompt]
    return replace(
        example,
        num_lead=lead,
        chunk_weights=_parse_chunk_weights(fields.get("chunks"), example.num_completion, where),
        teacher_prompt_ids=() if is_same_prompt else tuple(teacher_prompt),
        topk=locate_topk(fields.get("teacher_topk"), directory, example.num_completion, where),
    )


def _parse_chunk_weights(chunks: object, tokens: int, where: str) -> tuple[tuple[int, float], ...]:
    if not isinstance(chunks, list) or not any(isinstance(chunk, dict) and "weight" in chunk for chunk in chunks):
        return ()
    return read_chunks(chunks, tokens, where)


def read_chunks(chunks: Sequence[Any], tokens: int, where: str) -> tuple[tuple[int, float], ...]:
    """Return the number of tokens and the weight of every chunk of a row. tokens: number of those in the completion.

    Raises InputError naming `where` on chunks that do not add up to the completion.
    """
    weights = []
    for number, chunk in enumerate(chunks):
        count = chunk.get("tokens") if isinstance(chunk, dict) else None
        # a student with another tokenizer may hold all of a chunk back
        if type(count) is not int or count < 0:
            raise InputError(f"{where}: chunk {number} does not say how many tokens it has")
        weights.append((count, parse_weight(chunk, f"{where}, chunk {number}")))
    chunk_tokens = sum(count for count, _ in weights)
    if chunk_tokens != tokens:
        raise InputError(f"{where}: chunks have {format_count(chunk_tokens, 'token')}, the completion {tokens}")
    return tuple(weights)


def parse_weight(fields: Mapping[str, Any], where: str) -> float:
    """Return the weight of a row or chunk, 1 where it has none. Raises InputError naming `where` on another value."""
    weight = fields.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0.0 <= weight <= sys.float_info.max:
        raise InputError(f"{where}: weight must be a number of at least 0, not {weight!r}")
    return float(weight)


def _check_ids(value: object, tokenizer: Tokenizer | None, where: str) -> list[int]:
    """Return a row's token ids; None stands for the teacher's tokenizer, whose added tokens may have larger ids."""
    largest = LARGEST_ID if tokenizer is None else tokenizer.largest_id
    if not isinstance(value, list) or not all(type(i) is int and 0 <= i <= largest for i in value):
        raise InputError(f"{where} must be a list of token ids of the tokenizer")
    return value
