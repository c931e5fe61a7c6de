"""Problem rows are recognised: their final answer is not trained on and not scored as a response."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.shared_data import SHARED_DATA
from support.toys import save_checkpoint

from genssd.distill.data.example_files import read_examples
from genssd.distill.data.final_answers import is_final_answer
from genssd.distill.data.traces import Trace, read_traces
from genssd.engine.common.errors import InputError
from genssd.engine.texts.text import Tokenizer

Write = Callable[..., Path]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("tokenizer")
    save_checkpoint(directory)
    return Tokenizer(directory)


@pytest.mark.parametrize(
    "answer",
    [
        "113", " 1,234.5 ", "-3/4", "12 apples", "3:20 pm", "x = 3", r"\left( 3, \frac{\pi}{2} \right)", "$12$", "B",
        "(C)", "Yes", "New York", r"\text{Evelyn}", r"\boxed{113}", r"$\boxed{\frac12}$", "#### 18",
        "5x - 7y + 11z + 4 = 0", "p - q",
    ],
)  # fmt: skip
def test_a_final_answer(answer: str) -> None:
    assert is_final_answer(answer)


@pytest.mark.parametrize(
    "solution",
    [
        "48 + 24 = 72", "She sold 48 + 24 = 72 clips.\n#### 72", "First 3.\n\nThen 4.",
        "The capital of France is Paris.",
        r"$54 = 9 \cdot 6 + 0 \Rightarrow 54 \equiv \boxed{0} \pmod{6}$.", "<think>\nwhy\n</think>\n\n113",
        "She has 9 left. #### 9", "because 3 divides 9", "",
    ],
)  # fmt: skip
def test_a_solution(solution: str) -> None:
    assert not is_final_answer(solution)


@pytest.mark.skipif(not (SHARED_DATA / "mawps").exists(), reason="no real data beside the checkout")
def test_real_data_sets() -> None:
    for name, field, is_problem in (
        ("gsm8k/test.jsonl", "answer", False),
        ("math500/test.jsonl", "answer", True),
        ("math500/test.jsonl", "solution", False),
        ("aime24/test.jsonl", "solution", False),
        ("mawps/multiarith.jsonl", "target", True),
    ):
        texts = [str(json.loads(line)[field]) for line in (SHARED_DATA / name).read_text().splitlines()]
        assert [text for text in texts if is_final_answer(text) is not is_problem] == [], (name, field)


PROBLEMS: list[tuple[dict[str, Any], str]] = [
    ({"question": "q", "answer": "113"}, r"answer '113' is a final answer, not a response to learn from"),
    ({"problem": "q", "solution": r"\boxed{2}"}, r"solution .* is a final answer"),
    ({"problem": "q", "answer": 113}, "no prompt with a completion"),
    ({"input": "q", "target": 43.0}, "no prompt with a completion"),
    ({"prompt": "q"}, "no prompt with a completion"),
    ({"messages": [{"role": "user", "content": "q"}], "answer": "113"}, "the last message must be the assistant's"),
]


@pytest.mark.parametrize(("row", "message"), PROBLEMS)
def test_a_problem_is_neither_trained_on_nor_scored(
    tokenizer: Tokenizer, write_rows: Write, row: dict[str, Any], message: str
) -> None:
    data = write_rows([row])
    with pytest.raises(
        InputError, match=rf"data\.jsonl, line 1: {message}.*`genssd select` or `genssd generate` writes"
    ):
        read_examples([data], tokenizer, max_length=512, statuses=("finished",))
    (bad,) = read_traces([data], tokenizer, max_length=512)
    assert "`genssd generate` writes responses to problems" in str(bad)


@pytest.mark.parametrize(
    "row",
    [
        {"question": "q", "response": "113", "answer": "113"},
        {"instruction": "q", "output": "113"},
        {"prompt": "q", "completion": "113", "answer": "113"},
        {"question": "q", "answer": "113", "reasoning_content": "why"},
        {"problem": "q", "solution": "First this, then that: 113.", "answer": "113"},
        {"question": "q", "answer": "She sold 48 + 24 = 72 clips.\n#### 72"},
    ],
)
def test_a_response_is_used(tokenizer: Tokenizer, write_rows: Write, row: dict[str, Any]) -> None:
    (example,) = read_examples([write_rows([row])], tokenizer, max_length=512, statuses=("finished",)).examples
    assert example.num_completion > 3
    (trace,) = read_traces([write_rows([row])], tokenizer, max_length=512)
    assert isinstance(trace, Trace)
