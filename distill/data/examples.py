"""Training examples: token ids and where the completion begins.

Rows of our own journal are used by their ids, so that training sees the very tokens that were sampled. Rows of any
other origin go through the tokenizer and its chat template:

    {"messages": [..., {"role": "assistant", ...}]}     the last turn is trained
    {"prompt": text or messages, "completion": text or messages}
    {"question" | "problem" | ...: text, "completion" | "response" | "output" | "solution" | "answer": text}

    {"prompt": text, "chosen": text, "rejected": text}  a preference pair: two examples; ours say their token ids, too

A number in `weight` multiplies the loss of a row's tokens, one in `weight` of an element of `chunks` (which says how
many `tokens` the chunk has) that of the chunk's. Rows with ids may also say how the teacher read the prompt
(`prompt_ids`) and where its most likely tokens are (`teacher_topk`, see topk_store.py).
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from genssd.distill.data.problems import QUESTION_FIELDS, check_messages, read_objects
from genssd.distill.data.topk_store import TopkPlace, place_of
from genssd.engine.errors import InputError
from genssd.engine.text import Messages, Tokenizer

COMPLETION_FIELDS = ("completion", "response", "output", "solution", "answer")


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One sequence; the loss runs over the tokens from num_prompt on."""

    input_ids: tuple[int, ...]
    num_prompt: int
    weight: float = 1.0
    """Of the loss of its tokens, from the row's field `weight`."""
    chunk_weights: tuple[tuple[int, float], ...] = ()
    """Tokens and weight of every chunk, which multiplies the row's; empty where they all have 1."""
    teacher_prompt_ids: tuple[int, ...] = ()
    """The prompt as the teacher reads it, where that differs."""
    topk: TopkPlace | None = None
    """The teacher's most likely tokens along the completion."""
    rejected: bool = False
    """The worse completion of a pair."""
    where: str = ""
    """File and line, for messages."""

    @property
    def num_completion(self) -> int:
        return len(self.input_ids) - self.num_prompt

    @property
    def completion_ids(self) -> tuple[int, ...]:
        return self.input_ids[self.num_prompt :]

    def token_weights(self) -> list[float]:
        """Of the loss of every completion token."""
        chunks = self.chunk_weights or ((self.num_completion, 1.0),)
        return [self.weight * weight for tokens, weight in chunks for _ in range(tokens)]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExampleSet:
    """The examples of some files, and why rows were left out (counted by reason)."""

    examples: tuple[Example, ...]
    left_out: Mapping[str, int]


def read_examples(
    paths: Sequence[str | Path], tokenizer: Tokenizer, *, max_length: int, statuses: Sequence[str]
) -> ExampleSet:
    """Examples of JSONL files. Rows with a `status` not among `statuses` or longer than max_length are left out.

    Raises InputError naming file and line on a row without a trainable token, or with none of the known fields; and
    when no example is left.
    """
    examples: list[Example] = []
    left_out: Counter[str] = Counter()
    for path in paths:
        for number, fields in read_objects(path):
            status = fields.get("status")
            if status is not None and status not in statuses:
                left_out[f"status {status}"] += 1
                continue
            if status is not None and fields.get("completion_ids") == []:
                left_out["without a token: pruned at once"] += 1
                continue
            here = f"{path}, line {number}"
            found = _encode_pair(fields, tokenizer, here) if "rejected" in fields else ()
            found = found or (encode_example(fields, tokenizer, here, Path(path).parent),)
            if max(len(example.input_ids) for example in found) > max_length:
                left_out[f"longer than {max_length} tokens"] += 1
                continue
            examples += found
    if not examples:
        reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.items()) or "the files are empty"
        raise InputError(f"{', '.join(map(str, paths))}: nothing to train on ({reasons})")
    return ExampleSet(examples=tuple(examples), left_out=dict(left_out))


def _encode_pair(fields: Mapping[str, Any], tokenizer: Tokenizer, where: str) -> tuple[Example, ...]:
    """The chosen and the rejected completion of a preference pair."""
    own_ids = fields.get("tokenizer") == tokenizer.fingerprint
    pair = []
    for name in ("chosen", "rejected"):
        row = {key: fields[key] for key in ("prompt", "weight") if key in fields} | {"completion": fields.get(name)}
        if own_ids:
            row |= {
                "tokenizer": fields["tokenizer"],
                "student_prompt_ids": fields.get("student_prompt_ids"),
                "prompt_ids": fields.get("teacher_prompt_ids"),
                "completion_ids": fields.get(f"{name}_token_ids"),
            }
        example = encode_example(row, tokenizer, f"{where}, {name}")
        pair.append(replace(example, rejected=name == "rejected"))
    return tuple(pair)


def encode_example(fields: Mapping[str, Any], tokenizer: Tokenizer, where: str, directory: Path = Path()) -> Example:
    """A row's token ids: its own where the tokenizer is the one that made them. Raises InputError naming where.

    directory: of the row's file, which the names of other files in it start from.
    """
    own_ids = fields.get("tokenizer") == tokenizer.fingerprint and bool(fields.get("completion_ids"))
    try:
        if own_ids:
            prompt = _ids(fields.get("student_prompt_ids"), tokenizer, f"{where}: student_prompt_ids")
            completion = _ids(fields["completion_ids"], tokenizer, f"{where}: completion_ids")
        else:
            prompt, completion = _encode(fields, tokenizer, where)
    except InputError as error:
        raise InputError(str(error) if str(error).startswith(where) else f"{where}: {error}") from None
    if not completion:
        raise InputError(f"{where}: the completion has no token to train on")
    if not prompt:
        raise InputError(f"{where}: the prompt is empty")
    example = Example(
        input_ids=(*prompt, *completion), num_prompt=len(prompt), weight=_weight(fields, where), where=where
    )
    return _with_teacher(example, fields, tokenizer, where, directory) if own_ids else example


def _with_teacher(
    example: Example, fields: Mapping[str, Any], tokenizer: Tokenizer, where: str, directory: Path
) -> Example:
    """With what a row says of its tokens beside their ids."""
    asked: list[int] = []
    if fields.get("prompt_ids"):
        asked = _ids(fields["prompt_ids"], tokenizer, f"{where}: prompt_ids")
    return replace(
        example,
        chunk_weights=_chunk_weights(fields.get("chunks"), example.num_completion, where),
        teacher_prompt_ids=() if tuple(asked) == example.input_ids[: example.num_prompt] else tuple(asked),
        topk=place_of(fields.get("teacher_topk"), directory, example.num_completion, where),
    )


def _chunk_weights(chunks: object, tokens: int, where: str) -> tuple[tuple[int, float], ...]:
    if not isinstance(chunks, list) or not any(isinstance(chunk, dict) and "weight" in chunk for chunk in chunks):
        return ()
    found = []
    for number, chunk in enumerate(chunks):
        count = chunk.get("tokens") if isinstance(chunk, dict) else None
        if type(count) is not int or count < 1:
            raise InputError(f"{where}: chunk {number} does not say how many tokens it has")
        found.append((count, _weight(chunk, f"{where}, chunk {number}")))
    if sum(count for count, _ in found) != tokens:
        raise InputError(f"{where}: chunks have {sum(count for count, _ in found)} tokens, the completion {tokens}")
    return tuple(found)


def _weight(fields: Mapping[str, Any], where: str) -> float:
    weight = fields.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0.0 <= weight <= sys.float_info.max:
        raise InputError(f"{where}: weight must be a number of at least 0, not {weight!r}")
    return float(weight)


def _ids(value: object, tokenizer: Tokenizer, where: str) -> list[int]:
    if not isinstance(value, list) or not all(type(i) is int and 0 <= i <= tokenizer.largest_id for i in value):
        raise InputError(f"{where} must be a list of token ids of the tokenizer")
    return value


def _encode(fields: Mapping[str, Any], tokenizer: Tokenizer, where: str) -> tuple[list[int], list[int]]:
    if isinstance(fields.get("prompt"), str) and isinstance(fields.get("completion"), str):
        if not fields["completion"].strip():
            raise InputError(f"{where}: the completion has no token to train on")
        prompt = tokenizer.encode(fields["prompt"], special=True)
        return prompt, _with_end(tokenizer.encode_plain(fields["completion"]), tokenizer)
    turns = _turns(fields, where)
    if turns[-1]["role"] != "assistant":
        raise InputError(f"{where}: the last message must be the assistant's, it is the {turns[-1]['role']}'s")
    if not turns[-1]["content"].strip():
        raise InputError(f"{where}: the completion has no token to train on")
    return _encode_turns(turns, tokenizer, where)


def _turns(fields: Mapping[str, Any], where: str) -> list[dict[str, str]]:
    if "messages" in fields:
        return check_messages(fields["messages"], "messages", where)
    if "prompt" in fields and "completion" in fields:
        prompt, completion = fields["prompt"], fields["completion"]
        asked = (
            [{"role": "user", "content": prompt}]
            if isinstance(prompt, str)
            else check_messages(prompt, "prompt", where)
        )
        if isinstance(completion, str):
            return [*asked, {"role": "assistant", "content": completion}]
        return [*asked, *check_messages(completion, "completion", where)]
    question = next((fields[name] for name in QUESTION_FIELDS if isinstance(fields.get(name), str)), None)
    answer = next((fields[name] for name in COMPLETION_FIELDS if isinstance(fields.get(name), str)), None)
    if question is None or answer is None:
        raise InputError(
            f"{where}: no prompt with a completion; a row needs messages, or prompt and completion, or a question with "
            f"one of {', '.join(COMPLETION_FIELDS)}; this one has {', '.join(fields) or 'nothing'}"
        )
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _encode_turns(turns: Messages, tokenizer: Tokenizer, where: str) -> tuple[list[int], list[int]]:
    asked = tokenizer.render(turns[:-1])
    whole = tokenizer.render(turns, generate=False)
    if not whole.startswith(asked):
        raise InputError(
            f"{where}: the chat template writes the conversation differently with and without its answer, so the "
            "completion cannot be told from the prompt; give prompt and completion as text"
        )
    written = whole[len(asked) :]
    content = next((c for c in (turns[-1]["content"], turns[-1]["content"].strip()) if written.startswith(c)), None)
    if content is None:
        raise InputError(f"{where}: the chat template changes the answer; give prompt and completion as text")
    # in the answer the name of a special token is text; after it, the template's end of turn is meant
    ending = tokenizer.encode(written[len(content) :], special=False)
    ends = [i for i, token in enumerate(ending) if token in tokenizer.end_token_ids]
    completion = [*tokenizer.encode_plain(content), *(ending[: ends[0] + 1] if ends else ending)]
    return tokenizer.encode(asked, special=False), completion if ends else _with_end(completion, tokenizer)


def _with_end(completion: list[int], tokenizer: Tokenizer) -> list[int]:
    """The end of sequence is trained too."""
    end = tokenizer.eos_token_id
    return completion if end is None else [*completion, end]
