"""Rows of any shape: one message naming file and line, never another exception."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.templates import THINK_OPENER, THINKING_WRAPPER, TOOLS, make_tokenizer

from genssd.distill.data.example_files import read_examples
from genssd.distill.data.problems import read_problems
from genssd.distill.data.traces import Trace, read_traces
from genssd.engine.common.errors import InputError
from genssd.engine.texts.text import Tokenizer

NAMES = [
    "prompt", "messages", "completion", "generations", "question", "problem", "instruction", "query", "input",
    "response", "output", "solution", "body", "context", "passage", "options", "choices", "system",
    "system_prompt", "tools", "reasoning_content", "thinking", "reasoning", "chosen", "rejected", "history",
    "finish_reason", "finish_reasons", "stop_reason", "is_reasoning_complete", "truncated", "correct", "teacher",
    "others", "weight",
]  # fmt: skip
TEXTS = st.sampled_from(
    ["", " ", "a", "<think>", "</think>", "<think>a</think>b", "<|im_end|>", "stop", "length", "[{}]"]
)
SCALARS = st.none() | st.booleans() | st.integers(-2, 2) | TEXTS
MESSAGES = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system", "tool", "", None])},
    optional={name: SCALARS for name in ("content", "reasoning_content", "thinking", "name")}
    | {
        "tool_calls": st.lists(
            st.fixed_dictionaries({"function": SCALARS | st.dictionaries(TEXTS, SCALARS)}), max_size=2
        )
    },
)
VALUES = SCALARS | st.lists(MESSAGES | SCALARS, max_size=3) | st.lists(MESSAGES, max_size=3)
VALUES |= st.dictionaries(st.sampled_from(["A", "label", "text", "role"]), SCALARS | st.lists(SCALARS, max_size=2))
QUESTION, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
USABLE = [
    {},
    {"question": "q", "response": "a"},
    {"prompt": "q", "completion": "a"},
    {"prompt": [QUESTION], "completion": [ANSWER]},
    {"messages": [QUESTION, ANSWER]},
    {"problem": "q", "generations": ["a", "b"]},
    {"prompt": "q", "chosen": "a", "rejected": "b"},
    {"student_prompt_ids": [1], "completion_ids": [2]},
]
EXTRA = st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=4)
ROWS = st.builds(lambda usable, extra: usable | extra, st.sampled_from(USABLE), EXTRA)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> list[Tokenizer]:
    return [make_tokenizer(tmp_path_factory.mktemp("t"), text) for text in (THINKING_WRAPPER, THINK_OPENER, TOOLS)]


@given(row=ROWS)
def test_a_row_is_read_or_refused(tokenizers: list[Tokenizer], tmp_path_factory: Any, row: dict[str, Any]) -> None:
    path: Path = tmp_path_factory.getbasetemp() / "odd.jsonl"
    if "completion_ids" in row:
        row |= {"tokenizer": tokenizers[0].fingerprint}
    path.write_text(json.dumps(row))
    messages: list[str] = []

    def run(work: Callable[[], Any]) -> Any:
        try:
            return work()
        except InputError as error:
            messages.append(str(error))
            return []

    for problem in run(lambda: read_problems(path)):
        for tokenizer in tokenizers:
            with contextlib.suppress(InputError):
                tokenizer.encode_prompt(problem.prompt)
    for tokenizer in tokenizers:
        run(partial(read_examples, [path], tokenizer, max_length=1000, statuses=()))
        items = list(read_traces([path], tokenizer, max_length=1000))
        messages += [item for item in items if not isinstance(item, Trace)]
    assert all("odd.jsonl" in message for message in messages)
