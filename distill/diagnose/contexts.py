"""Readers: the models that compute the log-probabilities of a student's rollouts, and the contexts in their prompts.

A reader is another model, or the student itself with a hint. The response's token ids are the same for every reader, so
all of them share a tokenizer; the prompt is rendered with each model's own chat template. A context is a field of the
data's rows that is in the reader's prompt only (self-distillation).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice

from genssd.distill.data.problems import ProblemRow, parse_object
from genssd.distill.diagnose.readers import Reader, Templates
from genssd.distill.files.rows import read_rows
from genssd.engine.common.errors import InputError
from genssd.engine.texts.chat import Messages
from genssd.engine.texts.text import Prompt


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
