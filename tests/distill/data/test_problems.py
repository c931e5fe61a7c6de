"""Reading problems."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.shared_data import SHARED_DATA

from genssd.distill.data.parts import Shard
from genssd.distill.data.problems import read_problems, read_usable_problems
from genssd.engine.common.errors import InputError

Write = Callable[..., Path]


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": "raw"}, "raw"),
        ({"prompt": [{"role": "user", "content": "hi"}]}, [{"role": "user", "content": "hi"}]),
        (
            {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
            [{"role": "user", "content": "q"}],
        ),
        ({"question": "q"}, [{"role": "user", "content": "q"}]),
        ({"problem": "p"}, [{"role": "user", "content": "p"}]),
        ({"instruction": "i"}, [{"role": "user", "content": "i"}]),
        ({"prompt": None, "messages": None, "question": None, "input": "i"}, [{"role": "user", "content": "i"}]),
        (
            {"prompt": None, "messages": [{"role": "user", "content": "q", "tool_calls": None}]},
            [{"role": "user", "content": "q"}],
        ),
    ],
)
def test_prompt_fields(write_rows: Write, row: dict[str, Any], prompt: Any) -> None:
    (problem,) = read_problems(write_rows([row]))
    assert problem.prompt == prompt
    assert problem.line == 1


@pytest.mark.parametrize(
    ("fields", "answer"),
    [
        ({"answer": "first 3\n#### 72"}, "72"),
        ({"answer": "\\frac{1}{2}", "solution": "long"}, "\\frac{1}{2}"),
        ({"target": 43.0}, "43"),
        ({"target": 0.5}, "0.5"),
        ({"answer": 1234567}, "1234567"),
        ({"answer": 12345678901234567890}, "12345678901234567890"),
        ({"answer": None, "target": 3}, "3"),
        ({}, None),
    ],
)
def test_answer_fields(write_rows: Write, fields: dict[str, Any], answer: str | None) -> None:
    (problem,) = read_problems(write_rows([{"question": "q", **fields}]))
    assert problem.answer == answer


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": "a"}\n\n{"prompt": \n', r"line 3: not valid JSON"),
        ('{"prompt": "a"}\n[1]\n', r"line 2: a row must be a JSON object, not list"),
        ('{"text": "a"}\n', r"line 1: no prompt; .* this one has text"),
        ('{"prompt": " "}\n', r"line 1: prompt is empty"),
        ('{"prompt": []}\n', r"line 1: prompt must be text or a non-empty list"),
        ('{"prompt": [{"role": "user"}]}\n', r"line 1: prompt: a message needs"),
        ('{"question": 3}\n', r"line 1: question must be text, not int"),
        ("", r"has no rows"),
        ('{"prompt": "a", "answer": true}\n', r"line 1: answer must be text or a number, not True"),
        ('{"prompt": "a", "answer": [1]}\n', r"line 1: answer must be text or a number, not \[1\]"),
        ('{"prompt": "\\ud800"}\n', r"line 1: half of a surrogate pair"),
        ("[" * 100000 + "\n", r"line 1: JSON that cannot be read"),
        ('{"prompt": "a", "answer": ' + "9" * 5000 + "}\n", r"line 1: JSON that cannot be read"),
        ('{"prompt": [{"role": "assistant", "content": "x"}]}\n', r"line 1: prompt holds no turn to answer"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        read_problems(path)
    assert "bad.jsonl" in str(caught.value)


def test_bytes_that_are_no_utf8(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"prompt": "a"}\n{"prompt": "\xff"}\n')
    with pytest.raises(InputError, match=r"line 2: not UTF-8: .* at byte 12"):
        read_problems(path)


def test_a_missing_file() -> None:
    with pytest.raises(InputError, match=r"nowhere\.jsonl cannot be read: No such file"):
        read_problems("nowhere.jsonl")


def test_limit_reads_no_further(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": "b"}\nbroken\n')
    assert [p.prompt for p in read_problems(path, limit=2)] == ["a", "b"]


@pytest.mark.skipif(not SHARED_DATA.exists(), reason="no real data beside the checkout")
@pytest.mark.parametrize(
    ("file", "count"),
    [("gsm8k/train.jsonl", 7473), ("gsm8k/test.jsonl", 1319), ("math500/test.jsonl", 500), ("mawps/addsub.jsonl", 395)],
)
def test_real_files(file: str, count: int) -> None:
    problems = read_problems(SHARED_DATA / file)
    assert len(problems) == count
    assert all(problem.answer and "####" not in problem.answer for problem in problems)


def test_shards_divide_the_rows(write_rows: Write) -> None:
    data = write_rows([{"prompt": str(i)} if i != 4 else {"nothing": 1} for i in range(11)])
    whole = read_usable_problems(data, 10)
    parts = [read_usable_problems(data, 10, shard=f"{number}/3") for number in (1, 2, 3)]
    assert sorted((p for part in parts for p in part.problems), key=lambda p: p.index) == list(whole.problems)
    assert {i: text for part in parts for i, text in part.faults.items()} == whole.faults
    assert [problem.index for problem in parts[1].problems] == [1, 7]  # row 4 is no problem
    with pytest.raises(InputError, match="has no row in the shard 12/12"):
        read_usable_problems(data, shard="12/12")


def test_an_offset_leaves_out_the_first_rows(write_rows: Write) -> None:
    data = write_rows([{"prompt": str(i)} if i != 4 else {"nothing": 1} for i in range(11)])
    whole = read_usable_problems(data)
    for offset, limit, shard in ((0, 3, None), (3, 4, None), (9, None, None), (2, 7, "2/3")):
        part = read_usable_problems(data, limit, offset=offset, shard=shard)
        end = 11 if limit is None else offset + limit
        rows = [i for i in range(offset, end) if shard is None or i % 3 == 1]
        assert list(part.problems) == [problem for problem in whole.problems if problem.index in rows]
        assert list(part.faults) == [i for i in rows if i == 4]
    with pytest.raises(InputError, match="has no rows after the first 11"):
        read_usable_problems(data, offset=11)
    with pytest.raises(InputError, match="offset must be at least 0, not -1"):
        read_usable_problems(data, offset=-1)


@pytest.mark.parametrize("text", ["", "0/2", "3/2", "1", "1/0", "1/2/3", "-1/2", "a/b", "1 / 2"])
def test_other_shards_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="shard must be NUMBER/COUNT"):
        Shard.parse(text)
