"""A disk that refuses a write of a command: one line, everything journaled before is kept, and the run goes on.

The k-th write fails, for a few k of every command; GENSSD_FULL_DISK=1 takes every k, in about half an hour.
"""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.failing_disk import FailingDisk
from support.small_runs import JOURNALS, SmallRun, make_small_runs, read_results
from support.tiny_pair import TinyPair

import genssd.distill.runs.journal
from genssd.distill.train.checkpoints import list_checkpoints
from genssd.engine.common.errors import InputError
from genssd.kernels import tuned

FEW = {
    "select": 6, "generate": 6, "score": 2, "reselect": 3, "prefix": 4, "leaf": 1, "train": 2, "evaluate": 3,
    "diagnose": 2, "distill": 2,
}  # fmt: skip
"""Number of writes of each command that fail in the normal tests."""
EVERY = os.environ.get("GENSSD_FULL_DISK") == "1"
CODES = (errno.ENOSPC, errno.EIO, errno.EDQUOT)


@pytest.fixture(scope="module")
def small_runs(tiny_pair: TinyPair, tmp_path_factory: pytest.TempPathFactory) -> dict[str, SmallRun]:
    return make_small_runs(tiny_pair, tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Let torch use one thread: its threads would wait for each other longer than these models compute."""
    torch.set_num_threads(1)


def choose(total: int, few: int) -> list[int]:
    """Return the numbers of the writes that fail: all, or a few in equal distances."""
    if EVERY or total <= few:
        return list(range(total))
    return [(2 * i + 1) * total // (2 * few) for i in range(few)]


class Acknowledged:
    """The lines of a journal whose append has returned: they must be on disk, whatever happens."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.lines: list[tuple[Path, bytes]] = []
        whole = genssd.distill.runs.journal.Journal.append_line

        def append_line(journal: Any, line: bytes) -> None:
            whole(journal, line)
            self.lines.append((journal._file.path, line))

        monkeypatch.setattr(genssd.distill.runs.journal.Journal, "append_line", append_line)

    def check(self) -> None:
        for path in {path for path, _ in self.lines}:
            held = path.read_bytes().splitlines(keepends=True)
            assert all(line in held for file, line in self.lines if file == path), f"{path} has lost a line"


@pytest.mark.parametrize("command", FEW)
def test_a_write_that_fails(
    small_runs: dict[str, SmallRun], command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = small_runs[command]
    with FailingDisk(tmp_path).patched() as disk:
        small.run(tmp_path / "whole")
    expected = read_results(tmp_path / "whole")
    assert expected
    for number in choose(disk.count, FEW[command]):
        output_dir = tmp_path / f"run-{number}"
        code = CODES[number % 3]
        with monkeypatch.context() as patch:
            acknowledged = Acknowledged(patch)
            failing = FailingDisk(tmp_path, number, code, once=number % 2 == 1)
            with failing.patched():
                message = run_until_refused(small, output_dir)
        assert failing.has_failed
        assert message is not None, f"write {number} failed without a word"
        assert os.strerror(code) in message, f"write {number}"
        assert "\n" not in message, f"write {number}"
        acknowledged.check()
        can_resume = small.can_resume and (command != "train" or bool(list_checkpoints(output_dir)))
        if command == "reselect" and (output_dir / "summary.json").exists():
            can_resume = False  # all is written, and the directory could not be synced
        again = output_dir if can_resume else tmp_path / f"again-{number}"
        small.run(again, resume=True)
        results = read_results(again)
        assert results.keys() == expected.keys(), f"write {number}"
        assert all(results[name] == expected[name] for name in expected), f"write {number}"


def run_until_refused(small: SmallRun, output_dir: Path, *, resume: bool = False) -> str | None:
    """Run a command on a disk that refuses something; return its one line, or None where nothing was refused."""
    try:
        small.run(output_dir, resume=resume)
    except InputError as error:
        return str(error)
    return None


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB in memory, of which the test takes what it needs."""
    path = tmp_path / "disk"
    path.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(path)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no file system in memory can be mounted")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


@pytest.mark.parametrize("command", ["select", "generate", "score", "train"])
def test_a_disk_that_is_full(small_runs: dict[str, SmallRun], command: str, small_disk: Path, tmp_path: Path) -> None:
    """The run is resumed on a larger disk again and again, until nothing is refused."""
    small = small_runs[command]
    small.run(tmp_path / "whole")
    sizes = iter(range(4, 10_000, 800 if command == "train" else 20))  # KiB
    output_dir, refused = small_disk / "run", 0
    while True:
        subprocess.run(["mount", "-o", f"remount,size={next(sizes)}k", str(small_disk)], check=True)
        message = run_until_refused(small, output_dir, resume=refused > 0)
        if message is None:
            break
        assert "No space left on device" in message
        assert "\n" not in message
        refused += 1
        if command == "train" and not list_checkpoints(output_dir):
            shutil.rmtree(output_dir, ignore_errors=True)  # a model without a checkpoint is not trained further
    assert refused
    assert read_results(output_dir) == read_results(tmp_path / "whole")


def test_a_tune_file_on_a_full_disk(tmp_path: Path) -> None:
    card = tuned.Card(name="card", capability="sm_90", versions=("1", "2", "3"))
    entry = tuned.Entry(deterministic=None, fastest=({"block": 1},) * 4, microseconds=(1.0,) * 4)
    problems = [tuned.Problem(operator="score", dtype="float32", shape=(n, 8)) for n in (1, 2)]
    path = tmp_path / "tune.json"
    tuned.add_entries(path, card, {problems[0]: entry})
    before = path.read_bytes()
    with FailingDisk(tmp_path).patched() as disk:
        tuned.add_entries(tmp_path / "other.json", card, {problems[1]: entry})
    for number in range(disk.count):
        with (
            FailingDisk(tmp_path, number).patched(),
            pytest.raises(tuned.TuneFileError, match=r"tune\.json cannot be written: No space left"),
        ):
            tuned.add_entries(path, card, {problems[1]: entry})
        is_last = number == disk.count - 1  # the file has its new content, and the directory cannot be synced
        assert is_last or path.read_bytes() == before
        assert sorted(file.name for file in tmp_path.iterdir() if file.name.startswith("tune")) == [
            "tune.json", "tune.json.lock"
        ]  # fmt: skip


def test_every_command_with_a_journal_is_tried() -> None:
    assert set(JOURNALS) < set(FEW)
