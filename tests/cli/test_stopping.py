"""Signals and output that cannot be written: one line, the right exit code, and what is on disk."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.tiny_pair import TinyPair

import genssd.distill.runs.journal
import genssd.distill.train.trainer
from genssd.cli import main

Write = Callable[..., Path]
GENSSD = [sys.executable, "-m", "genssd"]
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}
VERBS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated", signal.SIGHUP: "terminated: the terminal is gone"}


@pytest.fixture(autouse=True)
def signals_that_stop() -> Iterator[None]:
    """Let signals stop this process and its children, also where the tests run under nohup or behind an `&`."""
    defaults = {number: signal.SIG_DFL for number in CODES} | {signal.SIGINT: signal.default_int_handler}
    before = {number: signal.signal(number, handler) for number, handler in defaults.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def slow_imports(tmp_path: Path) -> dict[str, str]:
    """Return an environment in which the import of transformers never ends; it makes the file `begun` first."""
    package = tmp_path / "packages/transformers"
    package.mkdir(parents=True)
    text = "import pathlib, time\npathlib.Path(__file__).with_name('begun').touch()\nwhile True: time.sleep(0.01)\n"
    (package / "__init__.py").write_text(text)
    return {**os.environ, "PYTHONPATH": str(package.parent), "OMP_NUM_THREADS": "1"}


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    while not path.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


@pytest.mark.parametrize("number", CODES)
def test_a_signal_during_the_imports(slow_imports: dict[str, str], tmp_path: Path, number: signal.Signals) -> None:
    here = str(tmp_path)  # what is not there is refused before the imports
    flags = ["select", "--teacher", here, "--student", here, "--data", "-", "--output-dir", str(tmp_path / "run")]
    with subprocess.Popen(
        [*GENSSD, *flags], env=slow_imports, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        wait_for(tmp_path / "packages/transformers/begun", process)
        process.send_signal(number)
        out, err = process.communicate(timeout=600)
    assert (process.returncode, out, err) == (CODES[number], "", f"genssd: {VERBS[number]}; nothing was written\n")
    assert not (tmp_path / "run").exists()


SECOND = """
import os, signal
from genssd.stopping import StopSignals
with StopSignals(restore=False) as signals:
    signals.begin_work(None)
    try:
        os.kill(os.getpid(), signal.SIGINT)
    except KeyboardInterrupt:
        os.kill(os.getpid(), signal.SIGTERM)
        while True: pass
"""


def test_a_second_signal_ends_at_once() -> None:
    done = subprocess.run([sys.executable, "-c", SECOND], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (143, "genssd: terminated; ended at once, while it closed its files\n")


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    script = f"trap '' HUP; {sys.executable} -c \"{SECOND.replace('SIGTERM', 'SIGHUP').replace('while True', 'if 1')}\""
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def stop_after(monkeypatch: pytest.MonkeyPatch, number: signal.Signals, lines: int) -> None:
    """Let this process receive a signal after so many lines of journals."""
    whole, left = genssd.distill.runs.journal.Journal.append_line, [lines]

    def append_line(self: Any, line: bytes) -> None:
        whole(self, line)
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(genssd.distill.runs.journal.Journal, "append_line", append_line)


def stopped(capsys: pytest.CaptureFixture[str], code: int, words: list[Any]) -> str:
    """Run a command that is stopped; return its last line on stderr, after those about what it does."""
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    assert ended.value.code == code
    *notes, line = capsys.readouterr().err.splitlines()
    usual = ("genssd: computing with", "genssd: the teacher and the student compute", "genssd: the student computes")
    notes = [note for note in notes if not re.fullmatch(r"genssd: \d+ checks before loading: all ok", note)]
    assert all(note.startswith((*usual, "Loading weights", "Writing model")) for note in notes)
    return line


@pytest.fixture
def select_words(tiny_pair: TinyPair, write_rows: Write, tmp_path: Path) -> list[Any]:
    data = write_rows([{"question": f"{i}+{i}?", "answer": str(2 * i)} for i in range(4)])
    flags = ["--teacher", tiny_pair.teacher, "--student", tiny_pair.student, "--data", data]
    small = ["--candidates", 2, "--chunk.tokens", 4, "--max-tokens", 4, "--memory-bytes", 1 << 24]
    return ["select", *flags, *small, "--output-dir", tmp_path / "run"]


@pytest.mark.parametrize("number", CODES)
def test_a_stopped_selection_says_what_is_on_disk(
    select_words: list[Any],
    tmp_path: Path,
    number: signal.Signals,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        stop_after(patch, number, 5)  # decisions and selection of two prompts, and the decisions of a third one
        line = stopped(capsys, CODES[number], select_words)
    path = tmp_path / "run/selections.jsonl"
    assert line == f"genssd: {VERBS[number]}; {path} holds 2 finished prompts; --resume continues"
    assert signal.getsignal(number) == before
    main([*map(str, select_words), "--resume"])
    assert sorted(json.loads(row)["index"] for row in path.read_text().splitlines()) == [0, 1, 2, 3]


def test_a_stopped_training_says_whether_there_is_a_checkpoint(
    tiny_pair: TinyPair,
    write_rows: Write,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = write_rows([{"prompt": f"{i}", "completion": "a"} for i in range(4)])
    words = ["train", "--model-name-or-path", tiny_pair.student, "--data", data, "--per-device-train-batch-size", 1]
    words += ["--logging-steps", 1, "--max-steps", 4, "--output-dir"]
    for name, more, rest in (
        ("none", [], f"{tmp_path}/none holds no checkpoint (save_steps writes them); the training begins anew"),
        (
            "some",
            ["--save-steps", 2],
            f"{tmp_path}/some/checkpoint-2 is complete; --resume-from-checkpoint last continues",
        ),
    ):
        with monkeypatch.context() as patch:
            stop_after(patch, signal.SIGINT, 3)
            assert stopped(capsys, 130, [*words, tmp_path / name, *more]) == f"genssd: interrupted; {rest}"


def test_a_signal_before_the_first_result_leaves_no_directory(
    select_words: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("genssd.distill.select.run.keep_complete", stop)
    assert stopped(capsys, 143, select_words) == "genssd: terminated; nothing was written"
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("words", [["--version"], ["--help"], ["select", "--help"]])
def test_a_full_disk_under_standard_output(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with open("/dev/full", "w") as full:
        monkeypatch.setattr("sys.stdout", full)
        assert stopped(capsys, 2, words) == "genssd: the output cannot be read or written: No space left on device"
        monkeypatch.undo()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_results_are_on_disk_where_they_cannot_be_printed(
    select_words: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with open("/dev/full", "w") as full:
        monkeypatch.setattr("sys.stdout", full)
        assert "No space left on device" in stopped(capsys, 2, select_words)
        monkeypatch.undo()
    assert json.loads((tmp_path / "run/summary.json").read_text())["prompts"] == 4


def run_shell(redirections: str) -> subprocess.CompletedProcess[str]:
    script = f"{sys.executable} -m genssd --help {redirections}; echo $? >&3"
    with open(os.devnull) as null:
        return subprocess.run(["bash", "-c", f"({script}) 3>&1"], stdin=null, capture_output=True, text=True)


def test_streams_that_cannot_be_written_end_in_one_line_and_the_exit_code() -> None:
    full = "genssd: the output cannot be read or written: No space left on device\n"
    if Path("/dev/full").exists():
        done = run_shell(">/dev/full")
        assert (done.stdout, done.stderr) == ("2\n", full)
        done = run_shell(">/dev/full 2>/dev/full")
        assert (done.stdout, done.stderr) == ("2\n", "")
    done = run_shell(">&- 2>&-")
    assert (done.stdout, done.stderr) == ("0\n", "")


def test_names_that_the_output_cannot_encode_are_escaped() -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii:strict"}
    done = subprocess.run([*GENSSD, "s\u00e9lect"], env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "genssd: unknown command 's\\xe9lect'; did you mean 'select'?\n"


def test_a_reader_that_has_gone() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([*GENSSD, "--help"], stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, "genssd: the reader of the output has gone\n")
