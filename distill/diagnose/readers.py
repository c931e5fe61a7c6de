"""Readers: the models that compute the log-probabilities of a student's rollouts, and the contexts in their prompts.

A reader is another model, or the student itself with a hint. The response's token ids are the same for every reader, so
all of them share a tokenizer; the prompt is rendered with each model's own chat template. A context is a field of the
data's rows that is in the reader's prompt only (self-distillation).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from genssd.engine.common.errors import InputError
from genssd.engine.common.model_choices import Role
from genssd.engine.common.options_check import check_types

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
