"""Questions of the training data that stand in the evaluation data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.templates import make_tokenizer
from support.toys import CHATML

from genssd.distill.data.example_files import read_examples
from genssd.distill.data.overlap import (
    QuestionRow,
    find_eval_overlap,
    iter_file_questions,
    list_examples,
    list_problems,
    normalise_question,
)
from genssd.distill.data.problems import read_problems
from genssd.distill.data.traces import Trace, make_training_row, read_traces
from genssd.engine.common.errors import InputError

Write = Callable[..., Path]


def rows(*texts: str, file: str = "train.jsonl") -> list[QuestionRow]:
    return [QuestionRow(texts=(text,), where=f"{file}, line {i}") for i, text in enumerate(texts, start=1)]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("What is 2+3?", "what is 2 + 3"),
        ("It costs $1,000.", "it costs 1000"),
        ("\uff37hat  is\n2 \u2212 3 ?", "What is 2 - 3?"),
        ("the cat\u2019s hat", "The cat's hat!"),
        ("Let $x$ be 3.5.", "let x be 3.5"),
        ("1\u20132", "1-2"),
    ],
)
def test_spellings_of_one_question_are_equal(one: str, other: str) -> None:
    assert normalise_question(one) == normalise_question(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("What is 2+3?", "What is 2-3?"),
        ("What is 2*3?", "What is 2/3?"),
        ("1.5 litres", "15 litres"),
        ("the sets {1, 5}", "the sets {15}"),
        ("What is 5!?", "What is 5?"),
        ("1 5", "15"),
        ("50% of 8", "50 of 8"),
    ],
)
def test_other_questions_differ(one: str, other: str) -> None:
    assert normalise_question(one) != normalise_question(other)


@given(text=st.text(max_size=40))
def test_normalising_twice_changes_nothing_more_for_case_and_spaces(text: str) -> None:
    assert normalise_question(f"  {text}\n") == normalise_question(text)
    assert "  " not in normalise_question(text)


def test_exact_and_near_rows_are_counted_once() -> None:
    train = rows("What is 1+1?", "what is 1 + 1", "What is 2+2?", "other", "What is 2+2?")
    overlap = find_eval_overlap(train, rows("x", "What is 1+1?", "What is 2+2?", "?", file="eval.jsonl"))
    assert overlap.counts() == {"rows": 5, "exact": 3, "near": 1}
    assert overlap.exact[0] == ("train.jsonl, line 1", "eval.jsonl, line 2")
    assert overlap.near == (("train.jsonl, line 2", "eval.jsonl, line 2"),)


def test_a_question_of_punctuation_alone_is_equal_to_itself_alone() -> None:
    overlap = find_eval_overlap(rows("?", "!!", ""), rows("?", "...", "", file="eval.jsonl"))
    assert overlap.counts() == {"rows": 3, "exact": 1, "near": 0}


def test_the_message_lists_the_first_rows() -> None:
    texts = [f"What is {i} + 1?" for i in range(8)]
    overlap = find_eval_overlap(rows(*texts), rows(*map(str.upper, texts[1:]), file="eval.jsonl"))
    with pytest.raises(InputError) as caught:
        overlap.check(is_allowed=False)
    assert str(caught.value).splitlines() == [
        "the questions of 7 of 8 rows of the training data stand in the evaluation data, 0 exactly and 7 with other "
        "case, spaces or punctuation; remove them, or pass --allow-eval-overlap:",
        *(f"  train.jsonl, line {i + 1} = eval.jsonl, line {i}" for i in range(1, 6)),
        "  and 2 more",
    ]
    overlap.check(is_allowed=True)
    find_eval_overlap(rows("a"), rows("b")).check(is_allowed=False)


def test_a_question_is_found_in_a_rendered_prompt(write_rows: Write, tmp_path: Path) -> None:
    """The rows of genssd score have the rendered prompt as text, and its ids."""
    tokenizer = make_tokenizer(tmp_path / "tokenizer", CHATML)
    data = write_rows([{"question": "What is 1+1?", "response": "2"}, {"question": "what is 1 + 1", "response": "2"}])
    traces = [trace for trace in read_traces([data], tokenizer, max_length=200) if isinstance(trace, Trace)]
    trained = write_rows([make_training_row(t, t.response_ids, tokenizer) for t in traces], "trained.jsonl")
    first, second = (
        read_examples([path], tokenizer, max_length=200, statuses=("finished", "length")).examples
        for path in (trained, data)
    )
    overlap = find_eval_overlap(list_examples(first, tokenizer), list_examples(second[:1], tokenizer))
    assert overlap.exact == ((f"{trained}, line 1", f"{data}, line 1"),)
    assert overlap.near == ((f"{trained}, line 2", f"{data}, line 1"),)


def test_questions_of_problems_and_of_training_rows(write_rows: Write) -> None:
    data = write_rows(
        [
            {"question": "q", "answer": "1"},
            {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]},
            {"prompt": "q"},
        ]
    )
    assert [row.texts for row in list_problems(read_problems(data))] == [("q",)] * 3
    data = write_rows(
        [
            {"problem": "q", "solution": "1"},
            {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "1"}]},
            {"completion": "no question"},
        ]
    )
    assert [(row.texts, row.where) for row in iter_file_questions([data])] == [
        (("q",), f"{data}, line 1"),
        (("q",), f"{data}, line 2"),
    ]
