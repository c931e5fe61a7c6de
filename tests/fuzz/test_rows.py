"""Files of rows with any bytes: read, or refused in one line per row."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.fuzzing import fuzz_settings, limited, mutated_file
from support.templates import THINKING_WRAPPER, TOOLS, make_tokenizer

from genssd.distill.data.example_files import read_examples
from genssd.distill.data.problems import read_problems
from genssd.distill.data.traces import Trace, read_traces
from genssd.engine.common.errors import InputError
from genssd.engine.texts.text import Tokenizer

pytestmark = pytest.mark.fuzz

QUESTION = {"role": "user", "content": "q"}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
ANSWER = {"role": "assistant", "content": "a", "reasoning_content": "why", "tool_calls": [CALL]}
ROWS: list[dict[str, Any]] = [
    {"question": "q", "response": "a", "answer": "1"},
    {"prompt": "q", "completion": "a", "weight": 0.5, "finish_reason": "stop"},
    {"prompt": [QUESTION], "completion": [ANSWER], "tools": [{"type": "function", "function": {"name": "f"}}]},
    {"messages": [{"role": "system", "content": "s"}, QUESTION, ANSWER], "answer": 1},
    {"problem": "q", "generations": ["a", None], "correctness": [True, False], "finish_reasons": ["stop", "length"]},
    {"prompt": "q", "chosen": "a", "rejected": "b"},
    {"student_prompt_ids": [1], "prompt_ids": [1, 2], "completion_ids": [2, 256], "chunks": [{"tokens": 2}],
     "teacher_topk": {"file": "t.bin", "offset": 0, "bytes": 12, "tokens": 2, "k": 1, "vocabulary": 9},
     "others": [{"completion_ids": [3]}]},
    {"instruction": "q", "input": "i", "output": "a", "options": ["x", "y"], "status": "finished"},
]  # fmt: skip
NAMES = (
    "prompt", "messages", "question", "system", "tools", "history", "thinking", "finish_reason", "tokenizer",
    "completion_ids", "student_prompt_ids", "weight", "chunks", "status", "teacher", "source", "answer", "options",
)  # fmt: skip


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> list[Tokenizer]:
    return [make_tokenizer(tmp_path_factory.mktemp("t"), text) for text in (THINKING_WRAPPER, TOOLS)]


@fuzz_settings(120, 0.1)
@given(data=st.data())
def test_any_file_of_rows(tokenizers: list[Tokenizer], tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    path: Path = tmp_path_factory.getbasetemp() / "rows.jsonl"
    base = dict(data.draw(st.sampled_from(ROWS)))
    if "completion_ids" in base:
        base["tokenizer"] = tokenizers[0].fingerprint
    lines = [data.draw(mutated_file(base, NAMES)) for _ in range(data.draw(st.integers(1, 2)))]
    path.write_bytes(b"\n".join([*lines, json.dumps(base).encode()]))
    messages: list[str] = []

    def run(work: Callable[[], Any]) -> Any:
        try:
            return work()
        except InputError as error:
            messages.append(str(error))
            return []

    with limited():
        for problem in run(lambda: read_problems(path)):
            run(partial(tokenizers[0].encode_prompt, problem.prompt))
        messages = []  # the callers of encode_prompt add file and line
        for tokenizer in tokenizers:
            run(partial(read_examples, [path], tokenizer, max_length=1000, statuses=("finished",)))
            items = run(lambda tokenizer=tokenizer: list(read_traces([path], tokenizer, max_length=1000)))  # type: ignore[misc]
            messages += [item for item in items if not isinstance(item, Trace)]
    for message in messages:
        assert "rows.jsonl" in message
        assert len(message) < 2000
        assert all(c.isprintable() for c in message), message
