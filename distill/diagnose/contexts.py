"""Readers: the models that compute the log-probabilities of a student's rollouts, and the contexts in their prompts.

A reader is another model, or the student itself with a hint. The response's token ids are the same for every reader, so
all of them share a tokenizer; the prompt is rendered with each model's own chat template. A context is a field of the
data's rows that is in the reader's prompt only (self-distillation).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

from genssd.distill.data.problems import ProblemRow, parse_object
from genssd.distill.files.rows import read_rows
from genssd.engine.chat import Messages
from genssd.engine.errors import InputError
from genssd.engine.model_choices import Role
from genssd.engine.options_check import check_types
from genssd.engine.text import Prompt

TEMPLATED_CONTEXTS = ("hint", "solution", "summary")
"""Contexts with a template of their own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Templates:
    """Texts of prompts with a context. {question}, {text} and {name}, the context's field, are filled in.

    The wording is our own, not a paper's.
    """

    hint: str = "{question}\n\nHint: {text}"
    """Prompt with the context `hint`."""
    solution: str = "{question}\n\nA reference solution:\n{text}\n\nSolve the problem in your own words, step by step."
    """Prompt with the context `solution`."""
    summary: str = "{question}\n\nA summary of the solution:\n{text}\n\nSolve the problem step by step."
    """Prompt with the context `summary`."""
    other: str = "{question}\n\n{name}: {text}"
    """Prompt with a context of any other name."""

    def __post_init__(self) -> None:
        check_types(self)
        for name in (*TEMPLATED_CONTEXTS, "other"):
            missing = [place for place in ("question", "text") if f"{{{place}}}" not in getattr(self, name)]
            if missing:
                raise InputError(f"templates.{name} has no {{{missing[0]}}}: the reader would not see it")

    def fill(self, name: str, question: str, text: str) -> str:
        """Return the prompt's text with a context. Other braces stay as they are: LaTeX is full of them."""
        template: str = getattr(self, name) if name in TEMPLATED_CONTEXTS else self.other
        values = {"question": question, "name": name, "text": text}
        return re.sub(r"\{(question|name|text)\}", lambda match: values[match[1]], template)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reader:
    """A model together with the context in its prompt."""

    name: str
    """Name of the reader in tables."""
    model: str
    """Hub id or local directory."""
    role: Role
    context: str | None
    """Field of the data's rows; None without a context."""


def list_readers(
    student: str, teachers: Sequence[str], contexts: Sequence[str], context_readers: Literal["student", "all"]
) -> list[Reader]:
    """Return the student without a context, the student with each context, and every teacher without a context.

    context_readers: with "all", every teacher follows with each context, too. Raises InputError on a teacher or context
    that is listed twice.
    """
    for option, names in (("teacher", teachers), ("context", contexts)):
        repeated = [name for name, count in Counter(names).items() if count > 1]
        if repeated:
            raise InputError(f"{option} {repeated[0]!r} is given twice")
    hinted = [Reader(name=f"itself + {c}", model=student, role="student", context=c) for c in contexts]
    readers = [Reader(name="itself", model=student, role="student", context=None), *hinted]
    teacher_contexts: list[str | None] = [None, *(contexts if context_readers == "all" else ())]
    for model, short in zip(teachers, _shorten_names(teachers), strict=True):
        for c in teacher_contexts:
            name = short if c is None else f"{short} + {c}"
            readers.append(Reader(name=name, model=model, role="teacher", context=c))
    return readers


def _shorten_names(models: Sequence[str]) -> list[str]:
    """Return the last part of each path if that is unique, else the whole paths."""
    last = [Path(model).name for model in models]
    return last if len(set(last)) == len(last) and "itself" not in last else list(models)


def read_contexts(
    path: str, names: Sequence[str], limit: int | None
) -> tuple[dict[int, dict[str, str]], dict[int, str]]:
    """Return the contexts of the first `limit` rows of a data file, and why other rows have none that can be used.

    Both are by the row's index. names: the fields to read; numbers become text. Rows that hold no object are left out.
    """
    contexts: dict[int, dict[str, str]] = {}
    faults: dict[int, str] = {}
    for index, row in enumerate(islice(read_rows(path), limit)):
        try:
            fields = parse_object(row.text, row.where)
        except InputError:
            continue  # the reader of problems names it
        texts = {name: _read_text(fields.get(name)) for name in names}
        missing = next((name for name, text in texts.items() if text is None), None)
        if missing is None:
            contexts[index] = {name: text for name, text in texts.items() if text is not None}
        else:
            value = fields.get(missing)
            faults[index] = (
                f"the context {missing!r} must be text or a number, and is "
                f"{'missing' if value is None else repr(value)}; add it, or leave it out of contexts"
            )
    return contexts, faults


def _read_text(value: object) -> str | None:
    """Return a field that is text or a number as text; None for another value, and for text without a character."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"{value:g}"
    return value if isinstance(value, str) and value.strip() else None


def build_prompt(reader: Reader, problem: ProblemRow, contexts: Mapping[str, str], templates: Templates) -> Prompt:
    """Return a reader's prompt: the problem, with the reader's context filled into the last turn."""
    name, prompt = reader.context, problem.prompt
    if name is None:
        return prompt
    if isinstance(prompt, str):
        return templates.fill(name, prompt, contexts[name])
    *earlier, last = prompt
    messages: Messages = [*earlier, {**last, "content": templates.fill(name, last["content"], contexts[name])}]
    return messages
