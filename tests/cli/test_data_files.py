"""Data files on the command line, from another working directory than that of the files."""

from __future__ import annotations

import gzip
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet
from support.tiny_pair import TinyPair

from genssd.cli import main
from genssd.distill.files import pipes

Write = Callable[..., Path]
PROBLEMS = [{"question": f"{i}+{i}?", "answer": str(2 * i)} for i in range(6)]


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Work in a directory below that of the data, which is the home directory as well."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("HOME", str(tmp_path))
    pipes._spool.cache_clear()
    yield tmp_path
    pipes._spool.cache_clear()


def flags(command: str, pair: TinyPair, output_dir: str) -> list[str]:
    """Return a short command line, without its data."""
    student, teacher = ["--student", str(pair.student)], ["--teacher", str(pair.teacher)]
    engine = ["--dtype", "float32", "--memory-bytes", str(1 << 24)]
    return [
        command,
        *{
            "select": [*teacher, *student, *engine, "--max-tokens", "4", "--candidates", "2"],
            "generate": [*teacher, *engine, "--max-tokens", "4"],
            "evaluate": ["--model", str(pair.student), *engine, "--max-tokens", "4"],
            "score": [*student, *engine],
            "prefix": [*student, *engine, "--max-tokens", "4", "--judge-tokens", "4"],
            "leaf": [*student, *teacher],
            "train": ["--model-name-or-path", str(pair.student), "--max-steps", "1"],
            "diagnose": [*student, *teacher, *engine, "--max-tokens", "3", "--rollouts", "1", "--completions", "2"],
            "distill": [
                *(*teacher, *student, "--rounds", "1", "--select.max-tokens", "4", "--select.candidates", "2"),
                *("--train.max-steps", "1", "--no-require-correct", "--train.statuses", "finished", "length"),
            ],
        }[command],
        "--output-dir",
        output_dir,
    ]


def as_standard_input(content: bytes, run: Callable[[], None]) -> None:
    """Call a function with a pipe that holds a small content as its standard input."""
    pipes._spool.cache_clear()
    reading, writing = os.pipe()
    os.write(writing, content)
    os.close(writing)
    before = os.dup(0)
    try:
        os.dup2(reading, 0)
        run()
    finally:
        os.dup2(before, 0)
        os.close(before)
        os.close(reading)


COMMANDS_OF_PROBLEMS = ("select", "generate", "evaluate", "diagnose", "distill")
COMMANDS_OF_TRACES = ("score", "prefix", "leaf", "train")


@pytest.mark.parametrize("command", [*COMMANDS_OF_PROBLEMS, *COMMANDS_OF_TRACES])
def test_every_command_reads_tables_and_standard_input(tiny_pair: TinyPair, elsewhere: Path, command: str) -> None:
    rows = PROBLEMS[:2]
    if command in COMMANDS_OF_TRACES:
        rows = [{**row, "response": f"It is {row['answer']}."} for row in rows]
    parquet.write_table(pyarrow.Table.from_pylist(rows), elsewhere / "rows.parquet")
    main([*flags(command, tiny_pair, "~/table"), "--data", "~/rows.parquet"])
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    as_standard_input(gzip.compress(lines), lambda: main([*flags(command, tiny_pair, "piped"), "--data", "-"]))
    assert list(elsewhere.glob("work/*")) == [elsewhere / "work" / "piped"]
    names = {path.name for path in (elsewhere / "table").iterdir()}
    assert {path.name for path in Path("piped").iterdir()} == names
    assert "run.json" in names


def test_a_selection_from_standard_input_and_its_resumption(
    tiny_pair: TinyPair, elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [json.dumps(row) for row in PROBLEMS]
    select = [*flags("select", tiny_pair, "run"), "--data", "-"]
    as_standard_input("\n".join(lines[:2]).encode(), lambda: main([*select, "--threads", "2"]))
    out, err = capsys.readouterr()
    # on a slow machine lines of progress stand between them
    checked, computing, chosen = (line for line in err.splitlines() if line.startswith("genssd: "))
    assert re.fullmatch(r"genssd: \d+ checks before loading: all ok", checked)
    assert computing == "genssd: computing with 2 threads (as asked for)"
    assert chosen.startswith("genssd: the student chooses between chunks of at least ")
    assert "2 prompts: " in out
    select.append("--resume")
    as_standard_input("\n".join(lines[:3]).encode(), lambda: main(select))
    assert "3 prompts: " in capsys.readouterr().out
    before = Path("run/selections.jsonl").read_bytes()
    with pytest.raises(SystemExit) as stopped:
        as_standard_input("\n".join(lines[1:]).encode(), lambda: main(select))
    assert stopped.value.code == 2
    message = "genssd: standard input is not the file that run/selections.jsonl was begun with: row 0 differs"
    assert capsys.readouterr().err.splitlines()[-1].startswith(message)
    assert Path("run/selections.jsonl").read_bytes() == before


def test_the_data_of_rounds_are_compared_by_content(
    tiny_pair: TinyPair, elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = "".join(json.dumps(row) + "\n" for row in PROBLEMS[:2]).encode()
    distill = [*flags("distill", tiny_pair, "run"), "--data", "-"]
    as_standard_input(lines, lambda: main(distill))
    more = [*distill, "--resume", "--rounds", "2"]
    as_standard_input(lines, lambda: main(more))
    assert "round 2: " in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        as_standard_input(lines[:30], lambda: main(more))
    assert stopped.value.code == 2


def test_process_substitution(tiny_pair: TinyPair, elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The shell passes the name of a pipe that is open already."""
    reading, writing = os.pipe()
    os.write(writing, "".join(json.dumps(row) + "\n" for row in PROBLEMS[:2]).encode())
    os.close(writing)
    try:
        main([*flags("generate", tiny_pair, "run"), "--data", f"/dev/fd/{reading}"])
    finally:
        os.close(reading)
    assert "2 prompts, " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("..", "genssd: .. is a directory, not a data file; it holds cut.jsonl.gz, long.jsonl"),
        ("/dev/zero", "genssd: /dev/zero is a device or a socket, not a data file; pipe its rows into the command"),
        ("../long.jsonl", "genssd: ../long.jsonl, line 1: a line of more than 32 MiB, the limit"),
        ("~/cut.jsonl.gz", "genssd: {home}/cut.jsonl.gz is damaged or cut off: Compressed file ended before the end"),
        ("../nowhere.jsonl", "genssd: ../nowhere.jsonl cannot be read: No such file or directory"),
        ("~/nowhere/x", "genssd: {home}/nowhere/x cannot be read: No such file or directory"),
    ],
)
def test_what_cannot_be_read_is_one_line(
    elsewhere: Path, tiny_pair: TinyPair, capsys: pytest.CaptureFixture[str], data: str, message: str
) -> None:
    with (elsewhere / "long.jsonl").open("wb") as stream:
        stream.truncate(50_000_000)
    rows = "".join(json.dumps(row) + "\n" for row in PROBLEMS).encode()
    (elsewhere / "cut.jsonl.gz").write_bytes(gzip.compress(rows)[:-9])
    with pytest.raises(SystemExit) as stopped:
        main([*flags("generate", tiny_pair, "run"), "--data", data])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(message.replace("{home}", str(elsewhere)))
    assert error.count("\n") == 1
    assert not Path("run").exists()
