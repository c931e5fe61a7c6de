"""Crash-safe JSONL, its checksums, and JSON files that are written whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from genssd.distill.runs.journal import (
    Journal,
    begin_line,
    complete_indices,
    complete_line,
    complete_rows,
    make_line,
    read_json,
    read_number,
    write_json,
)
from genssd.distill.runs.writing import truncate
from genssd.engine.common.errors import InputError


def write_journal(path: Path, *rows: dict[str, Any]) -> bytes:
    with Journal(path) as journal:
        for row in rows:
            journal.append(row)
    return path.read_bytes()


def test_rows_come_back(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    rows = [{"a": 1, "text": "zeile\nzwei\u2028drei"}, {"a": None}, {}]
    write_journal(path, *rows)
    found = list(complete_rows(path))
    assert [row for row, _ in found] == rows
    assert found[-1][1] == path.stat().st_size


def test_the_last_key_of_a_line_is_the_checksum_of_what_stands_before_it() -> None:
    assert make_line({"a": 1, "b": "x"}) == b'{"a": 1, "b": "x", "checksum": "eb104133"}\n'
    assert make_line({}) == b'{"checksum": "15d54739"}\n'


@pytest.mark.parametrize("fields", [{}, {"b": [1.5, None]}, {"b": 1, "c": "\u00e9"}])
@pytest.mark.parametrize("begun", [{}, {"a": "x"}])
def test_a_line_that_is_completed_elsewhere_is_the_line_of_all_fields(
    begun: dict[str, Any], fields: dict[str, Any]
) -> None:
    assert complete_line(begin_line(begun), fields) == make_line({**begun, **fields})


def test_indices_are_read_without_the_rest_of_a_line(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    rows = [{"index": 12, "a": 1}, {"a": 1, "index": 3}, {"index": 4}, {"a": 2}, {"index": "5"}]
    whole = write_journal(path, *rows)
    expected = [(row.get("index"), end) for row, end in complete_rows(path)]
    assert list(complete_indices(path)) == expected
    assert [index for index, _ in expected] == [12, 3, 4, None, "5"]
    path.write_bytes(whole[:-9])  # torn
    assert list(complete_indices(path)) == expected[:-1]
    path.write_bytes(whole.replace(b"12", b"13"))
    with pytest.raises(InputError, match="line 1 is damaged: its checksum does not match"):
        list(complete_indices(path))


def test_a_line_torn_at_any_byte_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    whole = write_journal(path, {"a": 1}, {"b": "\u00e9\u4e2d"})
    first = whole.index(b"\n") + 1
    for size in range(first, len(whole)):
        path.write_bytes(whole[:size])
        ((row, end),) = complete_rows(path)
        assert row == {"a": 1}
        truncate(path, end)
        assert path.read_bytes() == whole[:first]


def test_damage_before_the_end_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    lines = write_journal(path, {"a": 1}, {"a": 2}, {"a": 3}).splitlines(keepends=True)
    path.write_bytes(lines[0] + b'{"a": \n' + lines[2])
    with pytest.raises(InputError, match=r"j\.jsonl, line 2 is damaged: it is no JSON object; restore .* remove this"):
        list(complete_rows(path))


@pytest.mark.parametrize("line", [0, 1, 2])
def test_any_other_byte_in_a_line_is_an_error(tmp_path: Path, line: int) -> None:
    path = tmp_path / "j.jsonl"
    lines = write_journal(path, {"a": 10}, {"a": 20}, {"a": 30}).splitlines(keepends=True)
    for place in range(len(lines[line]) - 1):
        spoilt = bytearray(lines[line])
        spoilt[place] ^= 1
        path.write_bytes(b"".join([*lines[:line], spoilt, *lines[line + 1 :]]))
        if line == 2 and not is_json(spoilt):  # it may be torn, and is done again
            assert len(list(complete_rows(path))) == 2
            continue
        with pytest.raises(InputError, match=rf"j\.jsonl, line {line + 1} is damaged: .*; restore the file, or remove"):
            list(complete_rows(path))


def is_json(text: bytes | bytearray) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


def test_a_doubled_line_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    lines = write_journal(path, {"a": 1}, {"a": 2}).splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1] + lines[0])
    with pytest.raises(InputError, match=r"j\.jsonl, line 3 repeats line 1: remove one of them, and resume"):
        list(complete_rows(path))


def test_a_line_without_a_checksum_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    path.write_text('{"a": 1}\n')
    with pytest.raises(InputError, match="line 1 is damaged: its checksum does not match"):
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
    with pytest.raises(
        InputError, match=r"/dev/full cannot be written: No space left on device; what it holds is kept"
    ):
        journal.append({"a": 1})
    journal.__exit__(None, None, None)  # closing writes nothing, so that it hides no error


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
    path.write_text("[" * 100_000)
    with pytest.raises(InputError, match=r"x\.json is not valid JSON"):
        read_json(path)
    with pytest.raises(InputError, match="/dev/zero is no file of JSON"):
        read_json(Path("/dev/zero"))


def test_a_number_is_read_by_its_names(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"a": {"b": 1.5}, "c": True})
    assert read_number(path, "a", "b") == 1.5
    for names in (("a",), ("c",), ("a", "b", "c"), ("d",)):
        with pytest.raises(InputError, match=rf"x\.json is damaged: {'.'.join(names)} is no number; restore it, or"):
            read_number(path, *names)
