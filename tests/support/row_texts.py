"""The page docs/row_texts.md: rows under the chat templates of published models, as the text that is trained."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from support.templates import QWEN3_TEMPLATE, R1_TEMPLATE, SMOLLM2, SPACED
from support.tokenizer_families import EMBEDDING_ROWS, QWEN3, QWEN25, R1_END, R1_QWEN, build_backend, save_backend
from support.toys import save_model

from genssd.distill.data.example_files import read_examples
from genssd.distill.data.traces import Trace, read_traces
from genssd.engine.texts.text import Tokenizer

HEAD = """# Rows as text

What is trained and scored under the chat templates of four models, row by row. `prompt` and `trained` are decoded from
the token ids that `genssd train` and `genssd score` read, which are the same; `trained` is what the loss and the criteria
are computed over, and `\\n` is a line break. The templates are rebuilt with small tokenizers (tests/support/templates.py);
that of SmolLM2 is compared with the published one where `GENSSD_SMOLLM2` names its directory. The rules are in
[rows.md](rows.md).

A test holds this page to the code; `GENSSD_WRITE_DOCS=1 pytest tests/distill/data/test_row_texts.py` writes it again.
"""  # noqa: E501
TOOLS = [{"type": "function", "function": {"name": "add"}}]
CALL = {"type": "function", "function": {"name": "add", "arguments": '{"x": 1}'}}
QUESTION = {"role": "user", "content": "q"}
ROWS: Mapping[str, dict[str, Any]] = {
    "A question and an answer": {"question": "q", "response": "a"},
    "A thought in the answer": {"question": "q", "response": "<think>\nwhy\n</think>\n\na"},
    "A thought in a field": {"question": "q", "response": "a", "reasoning_content": "why"},
    "A thought that was cut off": {"problem": "q", "generations": ["<think>\nwhy"], "finish_reasons": ["length"]},
    "Messages": {
        "messages": [
            {"role": "system", "content": "s"}, QUESTION,
            {"role": "assistant", "content": "<think>\nwhy\n</think>\n\na"},
            {"role": "user", "content": "r"}, {"role": "assistant", "content": "b"},
        ]
    },
    "A prompt that is text": {"prompt": "q =", "completion": " a"},
    "A call of a tool": {
        "messages": [QUESTION, {"role": "assistant", "content": "", "tool_calls": [CALL]}], "tools": TOOLS
    },
    "The result of a tool": {
        "messages": [
            QUESTION, {"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "content": "2"},
            {"role": "assistant", "content": "a"},
        ],
        "tools": TOOLS,
    },
}  # fmt: skip
"""Rows by what they show."""
MODELS = {
    "Qwen3": (QWEN3, "<|im_end|>", QWEN3_TEMPLATE),
    "DeepSeek-R1-Distill-Qwen": (R1_QWEN, R1_END, R1_TEMPLATE),
    "SmolLM2-Instruct": (QWEN25, "<|im_end|>", SMOLLM2),
    "Llama 2": (QWEN25, "<|endoftext|>", SPACED),
}
"""Added tokens, end of sequence and chat template of each model."""


def save_named(directory: Path, name: str) -> Tokenizer:
    """Write the tokenizer of one of the models and load it."""
    added, end, template = MODELS[name]
    directory.mkdir(parents=True)
    backend = build_backend(added)
    save_backend(directory, backend, end, template)
    save_model(directory, vocab_size=EMBEDDING_ROWS, eos_token_id=backend.token_to_id(end))
    return Tokenizer(directory)


def read_row(row: Mapping[str, Any], tokenizer: Tokenizer, path: Path) -> tuple[str, str] | str:
    """Return the texts of a row's prompt and of its trained part, or why the row is refused.

    Training and scoring must read the same tokens.
    """
    path.write_text(json.dumps(row) + "\n")
    (trace,) = read_traces([path], tokenizer, max_length=1000)
    if not isinstance(trace, Trace):
        return trace.partition(", line 1: ")[2].replace(f" of {tokenizer.directory}", "")
    if "generations" not in row:  # training reads one response per row
        (example,) = read_examples([path], tokenizer, max_length=1000, statuses=()).examples
        assert example.input_ids == (*trace.prompt_ids, *trace.response_ids)
    return tokenizer.hf.decode(list(trace.prompt_ids)), tokenizer.hf.decode(list(trace.response_ids))


def render_page(directory: Path) -> str:
    """Return the whole page. directory: for temporary files."""
    tokenizers = {name: save_named(directory / str(i), name) for i, name in enumerate(MODELS)}
    lines = [HEAD]
    for title, row in ROWS.items():
        lines += [f"## {title}", "", "```json", json.dumps(row), "```", "", "```"]
        for name, tokenizer in tokenizers.items():
            result = read_row(row, tokenizer, directory / "row.jsonl")
            if isinstance(result, str):
                lines += [name, f"  refused  {result}"]
            else:
                lines += [name, f"  prompt   {_escape(result[0])}", f"  trained  {_escape(result[1])}"]
        lines += ["```", ""]
    return "\n".join(lines)


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n")
