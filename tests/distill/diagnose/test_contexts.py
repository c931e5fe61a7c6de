"""Readers, and the contexts in their prompts."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from genssd.distill.data.problems import ProblemRow
from genssd.distill.diagnose.contexts import build_prompt, read_contexts
from genssd.distill.diagnose.readers import Reader, Templates, list_readers
from genssd.engine.common.errors import InputError

Write = Callable[..., Path]


def test_readers_are_the_student_its_contexts_and_the_teachers() -> None:
    readers = list_readers("s", ["a/T", "b/U"], ["hint", "plan"], "student")
    assert [(r.name, r.model, r.role, r.context) for r in readers] == [
        ("itself", "s", "student", None),
        ("itself + hint", "s", "student", "hint"),
        ("itself + plan", "s", "student", "plan"),
        ("T", "a/T", "teacher", None),
        ("U", "b/U", "teacher", None),
    ]
    assert [r.name for r in list_readers("s", ["a/T", "b/T"], ["hint"], "all")][2:] == [
        "a/T",
        "a/T + hint",
        "b/T",
        "b/T + hint",
    ]
    with pytest.raises(InputError, match="teacher 'x' is given twice"):
        list_readers("s", ["x", "x"], [], "student")
    with pytest.raises(InputError, match="context 'h' is given twice"):
        list_readers("s", [], ["h", "h"], "student")


def test_templates_are_filled_once() -> None:
    """Braces of LaTeX are kept, and braces in a filled-in text are not filled again."""
    templates = Templates(hint=r"\boxed{1} {question} | {text}", other="{name}={text} {question}")
    assert templates.fill("hint", "{text}?", "x^{2} {question}") == r"\boxed{1} {text}? | x^{2} {question}"
    assert templates.fill("plan", "q", "t") == "plan=t q"
    assert "A reference solution:\nt\n" in templates.fill("solution", "q", "t")
    assert "summary of the solution:\nt\n" in templates.fill("summary", "q", "t")
    with pytest.raises(InputError, match=re.escape("templates.solution has no {text}")):
        Templates(solution="{question}")
    with pytest.raises(InputError, match=re.escape("templates.other has no {question}")):
        Templates(other="{text}")


def test_the_last_turn_is_changed() -> None:
    reader = Reader(name="r", model="m", role="student", context="hint")
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    templates, contexts = Templates(hint="{question} ({text})"), {"hint": "h"}
    messages = build_prompt(
        reader, ProblemRow(prompt=turns, answer="1", line=1, where="data, line 1", index=0), contexts, templates
    )
    assert messages == [turns[0], {"role": "user", "content": "q (h)"}]
    assert (
        build_prompt(
            reader, ProblemRow(prompt="raw", answer="1", line=1, where="data, line 1", index=0), contexts, templates
        )
        == "raw (h)"
    )
    plain = Reader(name="r", model="m", role="student", context=None)
    assert (
        build_prompt(plain, ProblemRow(prompt=turns, answer="1", line=1, where="data, line 1", index=0), {}, templates)
        is turns
    )


def test_contexts_come_from_the_rows(write_rows: Write) -> None:
    path = write_rows([{"prompt": "a", "hint": "x", "n": 43.0}, {"prompt": "b", "hint": "y", "n": 0.25}])
    contexts = {0: {"hint": "x", "n": "43"}, 1: {"hint": "y", "n": "0.25"}}
    assert read_contexts(str(path), ["hint", "n"], None) == (contexts, {})
    assert read_contexts(str(path), [], 1) == ({0: {}}, {})
    path = write_rows([{"hint": "x"}, {"hint": [1]}, {"plan": "y"}], "bad.jsonl")
    path.write_text(path.read_text() + "no object\n")
    contexts, faults = read_contexts(str(path), ["hint"], None)
    start = "the context 'hint' must be text or a number, and is"
    assert contexts == {0: {"hint": "x"}}
    assert faults == {
        i: f"{start} {what}; add it, or leave it out of contexts" for i, what in ((1, "[1]"), (2, "missing"))
    }
