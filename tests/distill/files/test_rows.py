"""The opener of data files: formats, encodings, limits, damage."""

from __future__ import annotations

import bz2
import datetime
import gzip
import hashlib
import json
import lzma
import os
import socket
import sys
import tracemalloc
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import zstandard
from pyarrow import ipc, parquet

from genssd.distill.data.problems import read_problems
from genssd.distill.files.lines import MAX_LINE_BYTES
from genssd.distill.files.rows import hash_content, read_rows, stem_of
from genssd.engine.common.errors import InputError

ROWS = [{"question": f"{i}+{i} = ü?\r\n", "answer": f"0{2 * i}"} for i in range(700)]
SKIPPED = b"\x50\x2a\x4d\x18\x04\0\0\0abcd"
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": zstandard.ZstdCompressor(write_checksum=True).compress,
}


def as_lines(rows: list[dict[str, Any]], end: str = "\n") -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + end for row in rows).encode()


def as_csv(rows: list[dict[str, Any]], delimiter: str = ",") -> bytes:
    """All cells in quotes, as an oracle that does not use the module csv."""
    table = [list(rows[0]), *(list(row.values()) for row in rows)]
    return "".join(delimiter.join(f'"{cell}"' for cell in cells) + "\r\n" for cells in table).encode()


def as_parquet(rows: list[dict[str, Any]]) -> bytes:
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.Table.from_pylist(rows), sink, row_group_size=300)
    return bytes(sink.getvalue())


def as_arrow(rows: list[dict[str, Any]], new: Callable[..., Any] = ipc.new_stream) -> bytes:
    table = pyarrow.Table.from_pylist(rows)
    sink = pyarrow.BufferOutputStream()
    with new(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=300)
    return bytes(sink.getvalue())


FILES: dict[str, Callable[[], bytes]] = {
    "x.jsonl": lambda: as_lines(ROWS),
    "x.json": lambda: as_lines(ROWS),
    **{f"x.jsonl.{suffix}": lambda c=c: c(as_lines(ROWS)) for suffix, c in COMPRESS.items()},  # type: ignore[misc]
    "x.csv": lambda: as_csv(ROWS),
    "x.tsv": lambda: as_csv(ROWS, "\t"),
    "x.csv.gz": lambda: gzip.compress(as_csv(ROWS)),
    "x.parquet": lambda: as_parquet(ROWS),
    "stream.arrow": lambda: as_arrow(ROWS),
    "file.arrow": lambda: as_arrow(ROWS, ipc.new_file),
    # names that lie: the first bytes count
    "gzip.jsonl": lambda: gzip.compress(as_lines(ROWS)),
    "plain.jsonl.gz": lambda: as_lines(ROWS),
    "zstd.gz": lambda: zstandard.compress(as_lines(ROWS)),
    "parquet.jsonl": lambda: as_parquet(ROWS),
    # a frame to skip before and after the data, as pzstd writes them
    "skip.zst": lambda: b"".join((SKIPPED, zstandard.compress(as_lines(ROWS)), SKIPPED)),
    # two members, as `cat a.gz b.gz` makes them
    **{
        f"joined.{suffix}": lambda c=c: c(as_lines(ROWS[:10])) + c(as_lines(ROWS[10:]))  # type: ignore[misc]
        for suffix, c in COMPRESS.items()
    },
}


def write(directory: Path, name: str, content: bytes) -> Path:
    path = directory / name
    path.write_bytes(content)
    return path


def refusal(name: str | Path) -> str:
    """Return the message with which a data file is refused, which is one line."""
    with pytest.raises(InputError) as caught:
        list(read_rows(name))
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", FILES)
def test_every_format_has_the_same_rows(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, name, FILES[name]())
    rows = list(read_rows(path))
    assert [json.loads(row.text) for row in rows] == ROWS
    is_table = name.split(".")[-1] in ("csv", "tsv", "parquet", "arrow") or name in ("x.csv.gz", "parquet.jsonl")
    word = "row" if is_table else "line"
    assert [(row.number, row.where) for row in rows] == [(i, f"{path}, {word} {i}") for i in range(1, 701)]
    assert hash_content(path) == hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    problems = read_problems(str(path), 2)
    assert [(p.answer, p.line, p.where) for p in problems] == [(f"0{2 * i}", i + 1, rows[i].where) for i in range(2)]


def test_blank_lines_count_and_are_left_out(tmp_path: Path) -> None:
    path = write(tmp_path, "x.jsonl", b'\xef\xbb\xbf{"a": 1}\r\n\r\n  \n{"a": 2}')
    assert [(row.number, row.text) for row in read_rows(path)] == [(1, b'{"a": 1}'), (4, b'{"a": 2}')]


def test_csv_cells(tmp_path: Path) -> None:
    content = '\ufeffquestion,answer,note\r\n\r\n"a, ""b""\n\nc",007,\r\nd,1e3,"x"\r\n'
    rows = list(read_rows(write(tmp_path, "x.csv", content.encode())))
    assert [json.loads(row.text) for row in rows] == [
        {"question": 'a, "b"\n\nc', "answer": "007"},
        {"question": "d", "answer": "1e3", "note": "x"},
    ]
    assert [row.number for row in rows] == [1, 2]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"q,a\n1,2\n3\n", "x.csv, row 2: 1 cell, but the header has 2 (line 3)"),
        (b"q,a\n1,2,3\n", "x.csv, row 1: 3 cells, but the header has 2 (line 2)"),
        (b"q,q\n", "x.csv: the header must name every column once, but 'q' occurs twice"),
        (b"q,\n", "x.csv: the header must name every column once, but '' is empty"),
        (b'q,a\n1,2\n"3,4\n', "x.csv, row 2: no valid CSV: unexpected end of data (line 3)"),
        (b"q,a\n1,\xff\n", "x.csv, line 2: not UTF-8: invalid start byte at byte 2"),
    ],
)
def test_a_bad_csv_row_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    assert refusal(write(tmp_path, "x.csv", content)).endswith(message)


def test_values_of_tables_that_json_does_not_have(tmp_path: Path) -> None:
    rows = [
        {
            "bytes": "ü".encode(),
            "decimal": Decimal("12.50"),
            "time": datetime.datetime(2026, 1, 2, 3, 4),
            "date": datetime.date(2026, 1, 2),
            "null": None,
            "messages": [{"role": "user", "content": "q"}],
        }
    ]
    (row,) = read_rows(write(tmp_path, "x.parquet", as_parquet(rows)))
    assert json.loads(row.text) == {
        "bytes": "ü",
        "decimal": "12.50",
        "time": "2026-01-02T03:04:00",
        "date": "2026-01-02",
        "null": None,
        "messages": [{"role": "user", "content": "q"}],
    }
    path = write(tmp_path, "y.parquet", as_parquet([{"image": b"a"}, {"image": b"\xff\xd8"}]))
    assert refusal(path) == f"{path}, row 2: 2 bytes that are no UTF-8 text; leave the column out"


def test_a_bad_row_of_a_table_is_named_by_its_number(tmp_path: Path) -> None:
    path = write(tmp_path, "x.parquet", as_parquet([{"question": "a"}, {"question": None}]))
    with pytest.raises(InputError, match=r"x\.parquet, row 2: no prompt"):
        read_problems(path)


@pytest.mark.parametrize("suffix", COMPRESS)
def test_a_bomb_ends_with_the_limit_of_a_line(tmp_path: Path, suffix: str) -> None:
    content = b'{"a": 1}\n' + bytes(4 * MAX_LINE_BYTES)
    path = write(tmp_path, f"x.{suffix}", COMPRESS[suffix](content))
    assert path.stat().st_size < MAX_LINE_BYTES // 100
    del content
    tracemalloc.start()
    message = refusal(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert message == f"{path}, line 2: a line of more than 32 MiB, the limit; shorten it, or leave it out"
    assert peak < 3.5 * MAX_LINE_BYTES  # twice for joining the pieces of the line, once more for a piece of zstd


def test_a_long_line_is_refused_by_its_size(tmp_path: Path) -> None:
    """Fifty million bytes, of which none is looked at: they are no UTF-8 either."""
    path = write(tmp_path, "x.jsonl", b'{"a": 1}\n')
    with path.open("ab") as stream:
        stream.write(b"\xff" * 50_000_000 + b"\n")
    assert "x.jsonl, line 2: a line of more than 32 MiB" in refusal(path)
    with path.open("wb") as stream:
        stream.write(b'"' + b"a" * (MAX_LINE_BYTES - 3) + b'"\n')
    assert len(next(read_rows(path)).text) == MAX_LINE_BYTES - 1


def test_a_long_row_of_a_table_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "x.parquet", as_parquet([{"a": "b"}, {"a": "b" * MAX_LINE_BYTES}]))
    assert refusal(path) == f"{path}, row 2: a row of more than 32 MiB, the limit; leave it out"
    unclosed = b'q\n"' + (b"a" * 1023 + b"\n") * (MAX_LINE_BYTES // 1024 + 1)
    assert "x.csv, row 1: no valid CSV: field larger than field limit" in refusal(write(tmp_path, "x.csv", unclosed))


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.jsonl.bz2", "x.jsonl.xz", "x.jsonl.zst", "x.parquet", "file.arrow"])
@pytest.mark.parametrize("damage", ["cut", "spoilt"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str, damage: str) -> None:
    content = FILES[name]()
    middle = len(content) // 2
    if damage == "cut":
        content = content[:-5]
    else:
        content = content[:middle] + bytes(b ^ 0x5A for b in content[middle : middle + 40]) + content[middle + 40 :]
    path = write(tmp_path, name, content)
    if name == "file.arrow" and damage == "spoilt":
        return  # Arrow files have no checksum
    assert refusal(path).startswith(f"{path} is damaged or cut off: ")


def test_rows_before_the_damage_are_read(tmp_path: Path) -> None:
    path = write(tmp_path, "x.gz", gzip.compress(as_lines(ROWS * 5))[:-100])
    rows: list[Any] = []
    with pytest.raises(InputError, match="damaged or cut off"):
        rows.extend(json.loads(row.text) for row in read_rows(path))
    assert rows == (ROWS * 5)[: len(rows)]
    assert len(rows) > len(ROWS)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.zip", b"PK\x03\x04....", "is a zip archive; unpack it and name the file in it"),
        ("x.jsonl", '{"a": 1}'.encode("utf-16"), "is UTF-16 text; save it as UTF-8"),
        ("x.parquet", b'{"a": 1}\n', "is no Parquet file: its first bytes are others"),
        ("x.json", b'\xef\xbb\xbf[\n{"a": 1}]', "is one JSON array, which is not read; write a row on every line"),
        ("x.arrow", b'{"a": 1}\n', "is no Arrow file: its first bytes are others"),
        ("x.parquet.gz", gzip.compress(as_parquet(ROWS)), "is a table that was compressed again; decompress it"),
    ],
)
def test_other_formats_are_refused_by_name(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = write(tmp_path, name, content)
    assert refusal(path).startswith(f"{path} {message}")


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    assert refusal(tmp_path / "run") == f"{tmp_path / 'run'} is a directory, not a data file"
    write(tmp_path / "run", "selections.jsonl", b"")
    assert refusal(tmp_path / "run").endswith("not a data file; it holds selections.jsonl")
    for device in ("/dev/zero", "/dev/null"):
        assert refusal(device).startswith(f"{device} is a device or a socket, not a data file")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(tmp_path / "s"))
        assert "is a device or a socket" in refusal(tmp_path / "s")
    assert refusal("") == "the name of a data file is empty"
    assert "cannot be read: it is no name of a file" in refusal("a\0b")
    assert refusal("https://a.b/x.jsonl").startswith("https://a.b/x.jsonl is a URL, which is not read; download it")
    assert "cannot be read: File name too long" in refusal("a" * 5000)
    assert refusal("nowhere.jsonl") == "nowhere.jsonl cannot be read: No such file or directory"
    assert "cannot be read: Not a directory" in refusal(write(tmp_path, "x", b"") / "y")


@pytest.mark.parametrize(
    ("package", "name", "message"),
    [
        ("pyarrow", "x.parquet", r"is a Parquet file, which needs a package: pip install 'genssd\[data\]'"),
        ("pyarrow", "file.arrow", r"is an Arrow file, which needs a package: pip install 'genssd\[data\]'"),
        ("lzma", "x.jsonl.xz", r"is compressed, and this Python was built without its module lzma"),
        ("zstandard", "x.jsonl.zst", r"is compressed with zstd, which needs a package: pip install zstandard"),
    ],
)
def test_a_missing_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, name: str, message: str
) -> None:
    if package == "zstandard" and sys.version_info >= (3, 14):
        pytest.skip("Python reads zstd by itself")
    path = write(tmp_path, name, FILES[name]())
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=message):
        list(read_rows(path))


def test_names_without_folders_and_suffixes() -> None:
    names = ["a/b.jsonl", "b.jsonl.gz", "a.b.parquet", "-", "org/set:train"]
    assert [stem_of(name) for name in names] == ["b", "b", "a.b", "stdin", "set:train"]
