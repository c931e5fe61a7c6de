"""Who reads a student's rollouts, and with what in the prompt: other models, or the student itself with a hint.

The response's token ids are the same for every reader, so all of them share a tokenizer; the prompt is rendered with
each model's own chat template. A context is a field of the data's rows that only the reader sees (self-distillation).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

from genssd.distill.data.problems import ProblemRow, read_objects
from genssd.engine.errors import InputError
from genssd.engine.runner import Role
from genssd.engine.text import Messages, Prompt

PLACES = ("question", "name", "text")


@dataclass(frozen=True, slots=True, kw_only=True)
class Templates:
    """What a prompt with a context says; {question}, {text} and {name} (of the field) are filled in. Ours."""

    hint: str = "{question}\n\nHint: {text}"
    solution: str = "{question}\n\nA reference solution:\n{text}\n\nSolve the problem in your own words, step by step."
    summary: str = "{question}\n\nA summary of the solution:\n{text}\n\nSolve the problem step by step."
    other: str = "{question}\n\n{name}: {text}"
    """For fields of any other name."""

    def __post_init__(self) -> None:
        for name in ("hint", "solution", "summary", "other"):
            missing = [place for place in ("question", "text") if f"{{{place}}}" not in getattr(self, name)]
            if missing:
                raise InputError(f"templates.{name} has no {{{missing[0]}}}: the reader would not see it")

    def fill(self, name: str, question: str, text: str) -> str:
        """The prompt's text with a context. Other braces stay as they are: mathematics is full of them."""
        template: str = getattr(self, name) if name in ("hint", "solution", "summary") else self.other
        values = {"question": question, "name": name, "text": text}
        return re.sub(r"\{(question|name|text)\}", lambda found: values[found[1]], template)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reader:
    """A model with a context. name: what tables call it."""

    name: str
    model: str
    role: Role
    context: str | None


def readers_of(
    student: str, teachers: Sequence[str], contexts: Sequence[str], context_readers: Literal["student", "all"]
) -> list[Reader]:
    """The student without a context, then every teacher: the student with each context, the others, and where these see
    contexts, too, each with each. Raises InputError on a name that stands twice."""
    for what, names in (("teacher", teachers), ("context", contexts)):
        twice = [name for name, count in Counter(names).items() if count > 1]
        if twice:
            raise InputError(f"{what} {twice[0]!r} is given twice")
    own = [Reader(name=f"itself + {c}", model=student, role="student", context=c) for c in contexts]
    found = [Reader(name="itself", model=student, role="student", context=None), *own]
    seen: list[str | None] = [None, *(contexts if context_readers == "all" else ())]
    for model, short in zip(teachers, _short_names(teachers), strict=True):
        for c in seen:
            found.append(Reader(name=short if c is None else f"{short} + {c}", model=model, role="teacher", context=c))
    return found


def _short_names(models: Sequence[str]) -> list[str]:
    """The last part of each path, where that tells them apart."""
    last = [Path(model).name for model in models]
    return last if len(set(last)) == len(last) and "itself" not in last else list(models)


def read_contexts(path: str, names: Sequence[str], limit: int | None) -> list[dict[str, str]]:
    """The contexts of every row of a JSONL file. Raises InputError naming the line that lacks one."""
    rows = []
    for line, fields in islice(read_objects(path), limit):
        found = {}
        for name in names:
            value = fields.get(name)
            if isinstance(value, int | float) and not isinstance(value, bool):
                value = f"{value:g}"
            if not isinstance(value, str) or not value.strip():
                raise InputError(
                    f"{path}, line {line}: the context {name!r} must be text or a number, and is "
                    f"{'missing' if value is None else repr(value)}; add it, or leave it out of contexts"
                )
            found[name] = value
        rows.append(found)
    return rows


def prompt_for(reader: Reader, problem: ProblemRow, contexts: Mapping[str, str], templates: Templates) -> Prompt:
    """What a reader is asked: the problem, with the context in its last turn."""
    name, prompt = reader.context, problem.prompt
    if name is None:
        return prompt
    if isinstance(prompt, str):
        return templates.fill(name, prompt, contexts[name])
    *before, last = prompt
    asked: Messages = [*before, {**last, "content": templates.fill(name, last["content"], contexts[name])}]
    return asked
