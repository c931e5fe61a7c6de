"""Kills of worker processes, and of the command itself, at random moments: is every prompt done once?

    python -m bench.robustness.pool_kills [--workers 30] [--commands 10] [--json bench/results/pool_kills.json]

`genssd select --processes 2` runs on the small pair as a user starts it. After a random time a random one of its worker
processes gets SIGKILL, or the command itself, which is then resumed, until so many have been killed; what is left is
done in peace. The journal must hold every prompt once, with the rows of an uninterrupted run of one process, and no
worker may outlive its command.

With --forked the command is forked from this process, and its workers from a server that has imported everything:
nearly all of the time of a start is imports.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a forked process has no threads of its parent

import genssd
import genssd.commands
from genssd.cli import main as run_command_line
from genssd.distill import small_pair
from genssd.distill.pool import starting
from genssd.distill.small_pair.problems import make_problems
from genssd.engine.host.machine import read_cpu_name

PAIR = Path(next(iter(small_pair.__path__)))
PAUSE = (0.5, 8.0)
"""Seconds between two kills, or since a prompt was finished after the one before: the shortest and the longest time."""
AT_ANY_TIME = 0.25
"""Fraction of the kills that do not wait until a prompt is finished, and so meet workers that load their models."""
PATIENCE = 30.0
"""Seconds after which a worker that is still there after its command counts as an orphan."""
TIMES = frozenset(("seconds", "checksum"))
"""Keys of rows that hold times, and the checksum of such a row."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=30, help="number of kills of worker processes")
    parser.add_argument("--commands", type=int, default=10, help="number of kills of the command")
    parser.add_argument("--problems", type=int, default=100, help="number of problems of a run")
    parser.add_argument("--forked", action="store_true", help="fork processes instead of starting interpreters")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments and the victims")
    parser.add_argument("--json", type=Path, help="file for the result")
    options = parser.parse_args()
    draws = random.Random(options.seed)
    victims = ["worker"] * options.workers + ["command"] * options.commands
    draws.shuffle(victims)
    counts: Counter[str] = Counter()
    lifetimes: list[float] = []
    failures: list[str] = []
    with TemporaryDirectory(prefix="genssd-pool-kills-") as name:
        root = Path(name)
        lines = [{"question": p.question, "answer": p.answer} for p in make_problems(options.problems, seed=1)]
        (root / "problems.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        expected = run_alone(root, root / "whole")
        while victims:
            counts["runs"] += 1
            output_dir = root / f"run-{counts['runs']}"
            kill_until_finished(
                root,
                output_dir,
                victims,
                draws,
                counts,
                lifetimes,
                start=fork_command if options.forked else start_command,
            )
            failures += compare(expected, read_rows(output_dir))
            print(f"run {counts['runs']}: {dict(counts)}, failures {failures}", flush=True)
    result = {
        "command": " ".join(["python -m bench.robustness.pool_kills", *sys.argv[1:]]),
        "version": genssd.__version__,
        "cpu": read_cpu_name(),
        **counts,
        "prompts": options.problems,
        "longest_seconds_of_a_worker_after_its_command": round(max(lifetimes, default=0.0), 2),
        "failures": failures,
    }
    print(json.dumps(result, indent=1))
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(bool(failures or counts["orphans"]))


def words(root: Path, output_dir: Path) -> list[str]:
    """Return the command, but for the number of processes."""
    models = ["--teacher", str(PAIR / "teacher"), "--student", str(PAIR / "student")]
    search = ["--candidates", "2", "--chunk.tokens", "1", "--chunk.limit", "32", "--max-tokens", "96"]
    limits = ["--max-num-seqs", "8", "--memory-bytes", str(1 << 26), "--teacher-topk", "2"]
    files = ["--data", str(root / "problems.jsonl"), "--output-dir", str(output_dir)]
    return ["select", *models, *search, *limits, *files]


class ForkedCommand:
    """A command in a forked process, with the methods of `subprocess.Popen` that are needed here."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._code: int | None = None

    def poll(self) -> int | None:
        """Return the exit code; None while the command runs."""
        if self._code is None and (ended := os.waitpid(self.pid, os.WNOHANG))[0]:
            self._code = os.waitstatus_to_exitcode(ended[1])
        return self._code

    def wait(self) -> int:
        """Wait for the end, and return the exit code."""
        while self.poll() is None:
            time.sleep(0.01)
        assert self._code is not None
        return self._code


Command = ForkedCommand | subprocess.Popen[bytes]


def start_command(words: Sequence[str], log: Path) -> Command:
    """Start a command as a user does."""
    with log.open("a") as printed:
        return subprocess.Popen([sys.executable, "-m", "genssd", *words], stdout=printed, stderr=printed)


def fork_command(words: Sequence[str], log: Path, start_method: str = "forkserver") -> Command:
    """Start a command in a forked process. start_method: how it starts its own processes."""
    pid = os.fork()
    if pid:
        return ForkedCommand(pid)
    code = 1
    try:
        with log.open("a") as printed:
            os.dup2(printed.fileno(), 1)
            os.dup2(printed.fileno(), 2)
        starting.START_METHOD = start_method
        multiprocessing.get_context("forkserver").set_forkserver_preload(["genssd.commands"])
        run_command_line(words)
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    finally:
        os._exit(code)


def run_alone(root: Path, output_dir: Path) -> dict[str, dict[int, Any]]:
    """Run the search in one process without a kill, and return its rows."""
    assert fork_command(words(root, output_dir), output_dir.with_suffix(".log")).wait() == 0
    return read_rows(output_dir)


def kill_until_finished(
    root: Path,
    output_dir: Path,
    victims: list[str],
    draws: random.Random,
    counts: Counter[str],
    lifetimes: list[float],
    *,
    start: Callable[[Sequence[str], Path], Command],
) -> None:
    """Run the search in two processes, kill who is next in `victims` while there is somebody, and resume it.

    counts: gets the number of kills, of resumed commands and of orphans. lifetimes: gets the seconds that workers were
    still there after their command.
    """
    log = output_dir.with_suffix(".log")
    while True:
        resume = ["--resume"] if (output_dir / "run.json").exists() else []
        command = start([*words(root, output_dir), "--processes", "2", *resume], log)
        while victims:
            await_moment(command, output_dir / "selections.jsonl", draws)
            workers = find_workers(command.pid)
            if command.poll() is not None:
                break
            if victims[-1] == "command":
                os.kill(command.pid, signal.SIGKILL)
                counts["killed_commands"] += 1
                victims.pop()
                command.wait()
                await_end(workers, counts, lifetimes)
                break
            if workers:
                os.kill(draws.choice(workers), signal.SIGKILL)
                counts["killed_workers"] += 1
                victims.pop()
        code = command.wait()
        if code == 0:
            return
        if code != -signal.SIGKILL:
            said = log.read_text().splitlines()[-1:]
            if not any("3 times one after the other" in line for line in said):
                raise SystemExit(f"the command ended with {code}: {log.read_text()[-2000:]}")
            counts["ended_after_three_kills_of_loading_workers"] += 1


def await_moment(command: Command, journal: Path, draws: random.Random) -> None:
    """Wait until the next kill is due, or the command has ended."""
    size = journal.stat().st_size if journal.exists() else 0
    waits, pause = draws.random() >= AT_ANY_TIME, draws.uniform(*PAUSE)
    while waits and command.poll() is None and not (journal.exists() and journal.stat().st_size > size):
        time.sleep(0.01)
    until = time.monotonic() + pause
    while time.monotonic() < until and command.poll() is None:
        time.sleep(0.01)


def find_workers(pid: int) -> list[int]:
    """Return the worker processes of a command: its own children, or those of its fork server."""
    parents: dict[int, int] = {}
    lines: dict[int, bytes] = {}
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            fields = (directory / "stat").read_text().rsplit(")", 1)[1].split()
            lines[int(directory.name)] = (directory / "cmdline").read_bytes()
        except OSError:
            continue
        if fields[0] != "Z":
            parents[int(directory.name)] = int(fields[1])
    children = {process for process, parent in parents.items() if parent == pid}
    servers = {child for child in children if b"multiprocessing.forkserver" in lines[child]}
    started = {child for child in children if b"multiprocessing.spawn" in lines[child]}
    return sorted(started | {process for process, parent in parents.items() if parent in servers})


def await_end(workers: list[int], counts: Counter[str], lifetimes: list[float]) -> None:
    """Wait until the workers of a killed command have ended."""
    started = time.monotonic()
    while left := [pid for pid in workers if is_running(pid)]:
        if time.monotonic() - started > PATIENCE:
            counts["orphans"] += len(left)
            break
        time.sleep(0.005)
    lifetimes.append(time.monotonic() - started)


def is_running(pid: int) -> bool:
    """Return whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def read_rows(output_dir: Path) -> dict[str, dict[int, Any]]:
    """Return the rows of the two journals by the index of their prompt; a prompt that is there twice is refused."""
    rows: dict[str, dict[int, Any]] = {}
    topk = (output_dir / "teacher_topk.bin").read_bytes()
    for name in ("selections.jsonl", "decisions.jsonl"):
        by_index = rows[name] = {}
        for line in (output_dir / name).read_text().splitlines():
            row = without_times(json.loads(line))
            assert row["index"] not in by_index, f"{output_dir / name}: prompt {row['index']} is there twice"
            if (place := row.get("teacher_topk")) is not None:  # where it is follows from the order of the prompts
                row["teacher_topk"] = {**place, "offset": None, "bytes": _cut(topk, place)}
            by_index[row["index"]] = row
    return rows


def _cut(topk: bytes, place: dict[str, Any]) -> str:
    return topk[place["offset"] : place["offset"] + place["bytes"]].hex()


def without_times(value: Any) -> Any:
    """Return a row without what differs from run to run."""
    if isinstance(value, dict):
        return {name: without_times(part) for name, part in value.items() if name not in TIMES}
    return [without_times(part) for part in value] if isinstance(value, list) else value


def compare(expected: dict[str, dict[int, Any]], rows: dict[str, dict[int, Any]]) -> list[str]:
    """Return what differs between two runs, by file and prompt."""
    return [
        f"{name}: prompt {index}"
        for name in expected
        for index in sorted(expected[name].keys() | rows[name].keys())
        if expected[name].get(index) != rows[name].get(index)
    ]


if __name__ == "__main__":
    main()
