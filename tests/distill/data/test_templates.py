"""What is trained and scored under the chat templates of published models, as text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.templates import make_bos_tokenizer
from tokenizers import processors

from genssd.distill.data.examples import read_examples
from genssd.distill.data.problems import read_problems
from genssd.distill.data.traces import Trace, read_traces
from genssd.engine.text import Tokenizer

Write = Callable[..., Path]

RENDERED = "<|begin|><|role|>user\nq<|end|><|role|>assistant\n"
TURNS = [{"role": "user", "content": "q"}]


@pytest.fixture(scope="module")
def bos(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return make_bos_tokenizer(tmp_path_factory.mktemp("bos"))


def trained(path: Path, tokenizer: Tokenizer) -> list[tuple[str, str]]:
    """Return the texts of prompt and completion of every row; scoring must read the same tokens."""
    examples = read_examples([path], tokenizer, max_length=1000, statuses=("finished",)).examples
    traces = list(read_traces([path], tokenizer, max_length=1000))
    assert [(*t.prompt_ids, *t.response_ids) for t in traces if isinstance(t, Trace)] == [e.input_ids for e in examples]
    decode = tokenizer.hf.decode
    return [(decode(e.input_ids[: e.num_prompt]), decode(e.completion_ids)) for e in examples]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        (RENDERED, RENDERED),
        (TURNS, RENDERED),
        ("2 + 3 =", "<|begin|>2 + 3 ="),
        ("<|begin|>2 + 3 =", "<|begin|>2 + 3 ="),
    ],
)
def test_a_prompt_begins_with_one_bos(bos: Tokenizer, write_rows: Write, prompt: Any, expected: str) -> None:
    (problem,) = read_problems(write_rows([{"prompt": prompt}]))
    assert bos.hf.decode(bos.encode_prompt(problem.prompt)) == expected
    ((text, _),) = trained(write_rows([{"prompt": prompt, "completion": "a"}]), bos)
    assert text == expected


@pytest.mark.parametrize("completion", ["a", "a<|end|>", "a<|end|>\n", "a<|end|><|end|>"])
@pytest.mark.parametrize("prompt", [RENDERED, TURNS])
def test_a_completion_ends_in_one_end(bos: Tokenizer, write_rows: Write, prompt: Any, completion: str) -> None:
    path = write_rows([{"prompt": prompt, "completion": completion}])
    assert trained(path, bos) == [(RENDERED, "a<|end|>")]
    (example,) = read_examples([path], bos, max_length=1000, statuses=()).examples
    assert list(example.completion_ids).count(256) == 1


def test_an_end_that_is_written_ends_the_response(bos: Tokenizer, write_rows: Write) -> None:
    rows = [{"prompt": "q", "completion": "a\n<|end|>", "finish_reason": "stop"}]
    rows.append({"prompt": "q", "completion": " <|end|>"})
    first, bad = read_traces([write_rows(rows)], bos, max_length=1000)
    assert isinstance(first, Trace)
    assert bos.hf.decode(first.response_ids) == "a\n<|end|>"
    assert isinstance(bad, str)
    assert "line 2: the completion has no token to train on" in bad


def test_what_a_tokenizer_puts_after_a_text_does_not_end_the_prompt(tmp_path: Path) -> None:
    tokenizer = make_bos_tokenizer(tmp_path)
    tokenizer.hf.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A <|end|>", special_tokens=[("<|begin|>", 257), ("<|end|>", 256)]
    )
    assert tokenizer.encode("ab", special=True)[-1] == 256
    for text in ("ab", "<|begin|>ab"):
        assert tokenizer.encode_prompt(text) == [257, *tokenizer.encode("ab", special=False)]
