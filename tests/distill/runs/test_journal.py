"""Crash-safe JSONL."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from genssd.distill.runs.journal import Journal, complete_rows, read_json, truncate, write_json, write_jsonl
from genssd.engine.errors import InputError


def test_rows_come_back(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    rows = [{"a": 1, "text": "zeile\nzwei\u2028drei"}, {"a": None}]
    with Journal(path) as journal:
        for row in rows:
            journal.append(row)
    found = list(complete_rows(path))
    assert [row for row, _ in found] == rows
    assert found[-1][1] == path.stat().st_size


def test_a_line_torn_at_any_byte_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    write_jsonl(path, [{"a": 1}, {"b": "\u00e9\u4e2d"}])
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for size in range(first, len(whole)):
        path.write_bytes(whole[:size])
        ((row, end),) = complete_rows(path)
        assert row == {"a": 1}
        truncate(path, end)
        assert path.read_bytes() == whole[:first]


def test_damage_before_the_end_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    path.write_text('{"a": 1}\n{"a": \n{"a": 3}\n')
    with pytest.raises(InputError, match=r"j\.jsonl, line 2 is damaged"):
        list(complete_rows(path))


def test_what_json_cannot_hold_is_refused(tmp_path: Path) -> None:
    with Journal(tmp_path / "j.jsonl") as journal, pytest.raises(ValueError, match="JSON"):
        journal.append({"a": float("nan")})
    assert list(complete_rows(tmp_path / "j.jsonl")) == []


def test_unwritable_places_are_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file/j\.jsonl cannot be written"):
        Journal(tmp_path / "file" / "j.jsonl")
    with pytest.raises(InputError, match=r"file/x\.json cannot be written"):
        write_json(tmp_path / "file" / "x.json", {})


def test_a_full_disk_is_named() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    journal = Journal(Path("/dev/full"))
    with pytest.raises(InputError, match=r"/dev/full cannot be written: No space left"):
        journal.append({"a": 1})
    with pytest.raises(OSError, match="No space left"):
        journal.__exit__(None, None, None)


def test_json_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "x.json"
    write_json(path, {"a": 1})
    write_json(path, {"a": 2})
    assert read_json(path) == {"a": 2}
    assert [p.name for p in path.parent.iterdir()] == ["x.json"]
    path.write_text("[1]")
    with pytest.raises(InputError, match="must hold a JSON object"):
        read_json(path)
    path.write_text(json.dumps({"a": 1})[:-1])
    with pytest.raises(InputError, match=r"x\.json is not valid JSON"):
        read_json(path)
