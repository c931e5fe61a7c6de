"""Traces: which responses of a row are used, and which are finished."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.toys import EOS, save_checkpoint

from genssd.distill.data.traces import Trace, read_traces
from genssd.engine.texts.text import Tokenizer

Write = Callable[..., Path]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("tokenizer")
    save_checkpoint(directory)
    return Tokenizer(directory)


def read(path: Path, tokenizer: Tokenizer) -> tuple[list[Trace], list[str]]:
    items = list(read_traces([path], tokenizer, max_length=512))
    return [i for i in items if isinstance(i, Trace)], [i for i in items if isinstance(i, str)]


def test_a_response_that_is_null_is_bad_by_itself(tokenizer: Tokenizer, write_rows: Write) -> None:
    row = {"problem": "q", "generations": ["a", None, "b"], "correctness": [True, None, False]}
    traces, bad = read(write_rows([row]), tokenizer)
    assert [(trace.response, trace.correct) for trace in traces] == [(0, True), (2, False)]
    assert len(bad) == 1
    assert "data.jsonl, line 1, response 1: an element of generations must be text, not None" in bad[0]


def test_columns_of_united_data_sets_are_absent_where_null(tokenizer: Tokenizer, write_rows: Write) -> None:
    names = ("prompt", "messages", "completion", "generations", "response", "answer", "teacher", "others", "weight")
    nulls: dict[str, Any] = dict.fromkeys((*names, "finish_reasons", "tokenizer", "completion_ids", "rejected"))
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "tool_calls": None}]
    rows = [
        {"prompt": "q", "completion": "a"},
        {"messages": turns},
        {"problem": "q", "generations": ["a"]},
        {"question": "q", "response": "a"},
    ]
    traces, bad = read(write_rows([{**nulls, **row} for row in rows]), tokenizer)
    assert not bad
    plain, _ = read(write_rows(rows), tokenizer)
    assert traces == plain
    assert len(traces) == 4


@pytest.mark.parametrize(
    ("row", "finished"),
    [
        ({"prompt": "q", "completion": "a"}, True),
        ({"prompt": "q", "completion": "a", "finish_reason": "length"}, False),
        ({"prompt": "q", "completion": "<think>\nfirst"}, False),
        ({"prompt": "q", "completion": "the tag <think> opens"}, True),
        ({"question": "q", "response": "a", "is_reasoning_complete": False}, False),
        ({"question": "q", "response": "a", "status": "length"}, False),
        ({"question": "q", "response": "<think>first</think>a", "finish_reason": "stop"}, True),
    ],
)
def test_a_response_that_was_cut_off_has_no_end(
    tokenizer: Tokenizer, write_rows: Write, row: dict[str, Any], finished: bool
) -> None:
    (trace,), _ = read(write_rows([row]), tokenizer)
    assert trace.finished is finished
    assert trace.response_ids.count(EOS) == finished


def test_each_of_several_responses_ends_by_itself(tokenizer: Tokenizer, write_rows: Write) -> None:
    row = {"problem": "q", "generations": ["a", "b", "c"], "finish_reasons": ["stop", "length", None]}
    row |= {"is_reasoning_complete": [True, True, False]}
    traces, _ = read(write_rows([row]), tokenizer)
    assert [trace.finished for trace in traces] == [True, False, False]
    _, bad = read(write_rows([{**row, "finish_reasons": ["stop"]}]), tokenizer)
    assert "line 1: 3 responses but 1 value of finish_reasons" in bad[0]


def test_fields_of_the_best_response_are_not_those_of_the_others(tokenizer: Tokenizer, write_rows: Write) -> None:
    """Verdicts and log-probabilities belong to one response each; a field that is null is not the best one's."""
    shared = {"prompt": "q", "student_prompt_ids": [1, 2], "tokenizer": tokenizer.fingerprint}
    best = {"completion": "a", "completion_ids": [3, EOS], "correct": True, "teacher_logprobs": [-0.5, -1]}
    others = [
        {"completion": "b", "completion_ids": [4, 5, EOS], "correct": False, "teacher_logprobs": [-1.0, -2.0, -3.0]},
        {"completion": "c", "completion_ids": [6, EOS], "correct": None, "undecided": "?", "teacher_logprobs": None},
    ]
    teacher = {"name": "T", "fingerprint": "0123"}
    row = {**shared, **best, "others": others, "prompt_ids": [7, 8, 9], "teacher": teacher}
    traces, bad = read(write_rows([row]), tokenizer)
    assert not bad
    assert [trace.correct for trace in traces] == [True, False, None]
    records = [trace.writer for trace in traces]
    assert [record and record.logprobs for record in records] == [(-0.5, -1.0), (-1.0, -2.0, -3.0), None]
    assert {record and record.prompt_ids for record in records} == {(7, 8, 9)}
    assert {record and record.fingerprint for record in records} == {"0123"}
    assert all(trace.prompt is not None and trace.prompt.text == "q" for trace in traces)
    for wrong in ([-0.5], "x", [-0.5, True], [-0.5, float("nan")], [-0.5, 10**400]):
        path = write_rows([{**shared, **best, "teacher_logprobs": wrong}])
        message = f"{path}, line 1: teacher_logprobs must be a list of 2 numbers, one for each token"
        assert read(path, tokenizer) == ([], [message])
