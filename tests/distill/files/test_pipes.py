"""Standard input, named pipes and descriptors as data files."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from genssd.distill.data.problems import read_problems
from genssd.distill.files import pipes
from genssd.distill.files.rows import hash_content, read_rows
from genssd.engine.common.errors import InputError

CONTENT = b'{"question": "a"}\n{"question": "b"}\n' * 5000  # more than a pipe holds


@pytest.fixture(autouse=True)
def forget_pipes() -> Iterator[None]:
    """Every test reads pipes of its own."""
    pipes._spool.cache_clear()
    yield
    pipes._spool.cache_clear()


@contextmanager
def standard_input(descriptor: int) -> Iterator[None]:
    """Make a descriptor the standard input of this process, and close it."""
    before = os.dup(0)
    try:
        os.dup2(descriptor, 0)
        os.close(descriptor)
        yield
    finally:
        os.dup2(before, 0)
        os.close(before)


def write_later(descriptor: int, content: bytes, seconds: float = 0.0) -> None:
    def write() -> None:
        time.sleep(seconds)
        with open(descriptor, "wb") as stream:
            stream.write(content)

    threading.Thread(target=write, daemon=True).start()


def test_standard_input_is_read_once_and_counts_by_content(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(CONTENT)
    reading, writing = os.pipe()
    write_later(writing, CONTENT)
    with standard_input(reading):
        first = list(read_rows("-"))
        again = list(read_rows("-"))
        assert hash_content("-") == hash_content(tmp_path / "x.jsonl")
    assert first == again
    assert [row.text for row in first] == CONTENT.splitlines()
    assert first[1].where == "standard input, line 2"


def test_a_bad_row_of_standard_input_is_named() -> None:
    reading, writing = os.pipe()
    write_later(writing, b'{"prompt": "a"}\n{\n')
    with standard_input(reading), pytest.raises(InputError, match=r"^standard input, line 2: not valid JSON"):
        read_problems("-")


def test_empty_and_missing_standard_input() -> None:
    with (
        standard_input(os.open(os.devnull, os.O_RDONLY)),
        pytest.raises(InputError, match=r"^standard input has no rows$"),
    ):
        read_problems("-")


def test_standard_input_that_is_no_pipe_of_rows(tmp_path: Path) -> None:
    _, terminal = os.openpty()
    with standard_input(terminal), pytest.raises(InputError, match="standard input is a terminal: pipe rows into"):
        list(read_rows("-"))
    with standard_input(os.open(tmp_path, os.O_RDONLY)), pytest.raises(InputError, match="is a directory: pipe rows"):
        list(read_rows("-"))
    with (
        standard_input(os.open("/dev/zero", os.O_RDONLY)),
        pytest.raises(InputError, match="a line of more than 32 MiB"),
    ):
        list(read_rows("-"))


def test_an_endless_pipe_ends_with_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipes, "MAX_BYTES", 1 << 16)
    reading, writing = os.pipe()
    write_later(writing, CONTENT)
    with standard_input(reading), pytest.raises(InputError, match="standard input holds more than 0 GiB"):
        list(read_rows("-"))


def test_a_file_as_standard_input(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(CONTENT)
    with standard_input(os.open(tmp_path / "x.jsonl", os.O_RDONLY)):
        assert len(list(read_rows("-"))) == 10000
        assert len(list(read_rows("/dev/stdin"))) == 10000


def test_standard_input_that_is_closed() -> None:
    before = os.dup(0)
    try:
        os.close(0)
        with pytest.raises(InputError, match=r"standard input cannot be read into a temporary file .*: Bad file"):
            list(read_rows("-"))
    finally:
        os.dup2(before, 0)
        os.close(before)


def test_several_processes_refuse_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="standard input can be read by one process only; under torchrun, name a file"):
        list(read_rows("-"))


@pytest.mark.parametrize("form", ["/dev/fd/{}", "/proc/self/fd/{}"])
def test_the_descriptor_of_a_process_substitution(form: str) -> None:
    reading, writing = os.pipe()
    write_later(writing, b'{"question": "a"}\n', seconds=0.2)
    name = form.format(reading)
    assert [row.where for row in read_rows(name)] == [f"{name}, line 1"]
    assert len(list(read_rows(name))) == 1
    os.close(reading)


def test_a_named_pipe_waits_for_its_writer_but_not_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)

    def write() -> None:
        time.sleep(0.2)
        with path.open("wb") as stream:  # blocks until a reader comes
            time.sleep(0.2)
            stream.write(CONTENT)

    threading.Thread(target=write, daemon=True).start()
    assert [json.loads(row.text)["question"] for row in read_rows(path)] == ["a", "b"] * 5000
    assert len(list(read_rows(path))) == 10000
    pipes._spool.cache_clear()
    monkeypatch.setattr(pipes, "WRITER_SECONDS", 0.1)
    with pytest.raises(InputError, match=r"pipe is a pipe that no process writes to: none did for 0.1 s"):
        list(read_rows(path))
