"""Kills at random moments: commands that are killed and resumed until they finish, compared with uninterrupted runs.

    python -m bench.robustness.kills [--loops 50] [--command select ...] [--json bench/results/kills.json]

Every loop runs a command on the small pair in a new directory, sends it SIGKILL after a random time, resumes it, and so
on until it ends by itself. Every byte that it has written must then be that of a run without a kill, except for times.
The program imports everything once and forks a process for each part of a run.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a forked process has no threads of its parent

import genssd
from genssd.cli import main as run_command_line
from genssd.configs import CONFIGS
from genssd.distill import small_pair
from genssd.distill.small_pair.problems import make_problems
from genssd.distill.train.checkpoints import list_checkpoints

PAIR = Path(next(iter(small_pair.__path__)))
MODELS = {"teacher": ["--teacher", str(PAIR / "teacher")], "student": ["--student", str(PAIR / "student")]}
SMALL = ["--memory-bytes", str(1 << 26)]
VARYING = frozenset(("seconds", "tokens_per_second", "checksum"))
"""Keys of lines of metrics.jsonl and of summary.json that hold times, and the checksum of such a line."""
UNORDERED = frozenset(("selections.jsonl", "decisions.jsonl", "responses.jsonl"))
"""Journals whose lines are in the order in which prompts end, which depends on what is decoded beside them."""
MAX_PARTS = 200
"""Number of parts after which a run that is killed again and again is left to end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopResult:
    """One run that was killed until it ended."""

    kills: int
    differences: tuple[str, ...]
    """Files that differ from those of the uninterrupted run, or that only one of the two has."""
    failures: tuple[str, ...]
    """Messages of parts that ended with an error."""


def main() -> None:
    """Run the loops of every command, print a table and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--loops", type=int, default=50, help="number of runs of each command")
    parser.add_argument("--command", nargs="+", choices=NAMES, default=list(NAMES), help="commands to kill")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments of the kills")
    parser.add_argument("--json", type=Path, help="file for the results")
    arguments = parser.parse_args()
    rows = []
    print(f"{'command':<10}{'loops':>6}{'kills':>7}{'seconds of a run':>18}{'different':>11}{'failed':>8}")
    with TemporaryDirectory(prefix="genssd-kills-") as root:
        files = _write_data(Path(root))
        for command in arguments.command:
            row = _run_loops(command, _words(command, files), Path(root) / command, arguments.loops, arguments.seed)
            rows.append(row)
            print(
                f"{command:<10}{row['loops']:>6}{row['kills']:>7}{row['seconds']:>18.2f}{row['different']:>11}"
                f"{row['failed']:>8}",
                flush=True,
            )
    if arguments.json is not None:
        described = {"command": " ".join(["python -m bench.robustness.kills", *sys.argv[1:]])}
        arguments.json.write_text(
            json.dumps({**described, "version": genssd.__version__, "rows": rows}, indent=1) + "\n"
        )
    sys.exit(any(row["different"] or row["failed"] for row in rows))


def _write_data(root: Path) -> dict[str, Path]:
    """Write problems, and the teacher's responses to them, which `score` and `train` read."""
    problems = root / "problems.jsonl"
    lines = [{"question": p.question, "answer": p.answer, "hint": "Carry."} for p in make_problems(8, seed=1)]
    problems.write_text("".join(json.dumps(line) + "\n" for line in lines))
    code, message = _run_part(_words("generate", {"problems": problems}), root / "pool", kill_after=None)
    assert code == 0, message
    return {"problems": problems, "pool": root / "pool" / "responses.jsonl"}


def _words(command: str, files: dict[str, Path]) -> list[str]:
    """Return the words of a command but for its output directory."""
    problems, pool = str(files["problems"]), str(files.get("pool"))
    flags: dict[str, list[str]] = {
        "select": [*MODELS["teacher"], *MODELS["student"], "--data", problems, "--candidates", "2", "--chunk.tokens",
                   "1", "--chunk.limit", "32", "--max-tokens", "64", "--max-num-seqs", "4", *SMALL],
        "generate": [*MODELS["teacher"], "--data", problems, "--n", "2", "--max-tokens", "64", "--max-num-seqs", "4",
                     *SMALL],
        "score": [*MODELS["student"], "--data", pool, "--criteria", "ppl", "rsr", *SMALL],
        "prefix": [*MODELS["student"], "--data", pool, "--judge", "solves", "--batch", "2", "--max-tokens", "48",
                   "--limit", "4", *SMALL],
        "diagnose": [*MODELS["student"], *MODELS["teacher"], "--data", problems, "--limit", "3", "--rollouts", "1",
                     "--completions", "2", "--budget", "12", "--max-tokens", "48", *SMALL],
        "train": ["--model-name-or-path", str(PAIR / "student"), "--data", pool, "--save-steps", "1",
                  "--save-total-limit", "2", "--per-device-train-batch-size", "4", "--statuses", "finished", "length"],
        "evaluate": ["--model", str(PAIR / "student"), "--data", problems, "--samples", "1", "--max-tokens", "64",
                     *SMALL],
    }  # fmt: skip
    return [command, *flags[command]]


def _can_resume(command: str) -> bool:
    fields = {field.name for field in dataclasses.fields(CONFIGS[command])}
    return bool(fields & {"resume", "resume_from_checkpoint"})


NAMES = tuple(filter(_can_resume, ("select", "generate", "score", "prefix", "diagnose", "train", "evaluate")))


def _run_loops(command: str, words: Sequence[str], root: Path, loops: int, seed: int) -> dict[str, Any]:
    """Run a command without a kill, and then so many times with kills; return the counts."""
    seconds = math.inf
    for name in ("first", "whole"):  # the first one reads files that the others find in memory
        started = time.monotonic()
        code, message = _run_part(words, root / name, kill_after=None)
        assert code == 0, message
        seconds = min(seconds, time.monotonic() - started)
    expected = _read_results(root / "whole")
    draws = random.Random(f"{seed} {command}")
    results = [_kill_until_finished(words, root / f"run-{i}", seconds, expected, draws) for i in range(loops)]
    return {
        "command": command,
        "loops": loops,
        "kills": sum(result.kills for result in results),
        "median_kills": median(result.kills for result in results),
        "seconds": seconds,
        "different": sum(bool(result.differences) for result in results),
        "failed": sum(bool(result.failures) for result in results),
        "examples": [dataclasses.asdict(result) for result in results if result.differences or result.failures][:3],
    }


def _kill_until_finished(
    words: Sequence[str], output_dir: Path, seconds: float, expected: dict[str, Any], draws: random.Random
) -> LoopResult:
    """Run a command in parts, each of which is killed at a random moment, until one ends by itself."""
    kills, failures = 0, []
    for part in range(MAX_PARTS + 1):
        # a part that begins anew needs all of the time, which grows while other programs are at work
        kill_after = None if part == MAX_PARTS else draws.uniform(0.0, seconds * (1.0 + part / 10.0))
        code, message = _run_part([*words, *_resume_words(words[0], output_dir)], output_dir, kill_after=kill_after)
        if code == -signal.SIGKILL:
            kills += 1
        elif code == 0 and kills == 0:
            shutil.rmtree(output_dir)  # it was faster than its kill: begin anew
        elif code == 0:
            break
        else:
            failures.append(message)
            break
    results = _read_results(output_dir)
    names = sorted(results.keys() | expected.keys())
    different = tuple(name for name in names if results.get(name) != expected.get(name))
    return LoopResult(kills=kills, differences=different, failures=tuple(failures))


def _resume_words(command: str, output_dir: Path) -> list[str]:
    if command == "train":
        return ["--resume-from-checkpoint", "last"] if list_checkpoints(output_dir) else []
    return ["--resume"] if output_dir.exists() else []


def _run_part(words: Sequence[str], output_dir: Path, *, kill_after: float | None) -> tuple[int, str]:
    """Run a command in a forked process; return its exit code (-9 if it was killed) and what it printed."""
    printed = output_dir.with_suffix(".log")
    printed.parent.mkdir(parents=True, exist_ok=True)
    printed.write_text("")
    process = os.fork()
    if process == 0:
        descriptor = os.open(printed, os.O_WRONLY)
        for stream in (1, 2):
            os.dup2(descriptor, stream)
        try:
            run_command_line([*words, "--output-dir", str(output_dir)])
        except SystemExit as stop:
            os._exit(stop.code if isinstance(stop.code, int) else 1)
        except BaseException as error:
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
            os._exit(3)
        os._exit(0)
    deadline = None if kill_after is None else time.monotonic() + kill_after
    while (ended := os.waitpid(process, os.WNOHANG)) == (0, 0):
        if deadline is not None and time.monotonic() >= deadline:
            os.kill(process, signal.SIGKILL)
            ended = os.waitpid(process, 0)
            break
        time.sleep(0.0005)
    return os.waitstatus_to_exitcode(ended[1]), printed.read_text(errors="replace")[-1000:]


def _read_results(output_dir: Path) -> dict[str, Any]:
    """Return what a run has written, by file: bytes, or JSON without times where it holds some."""
    results: dict[str, Any] = {}
    for path in sorted(p for p in output_dir.rglob("*") if p.is_file() and p.name != ".lock"):
        name, content = str(path.relative_to(output_dir)), path.read_bytes()
        if path.name in UNORDERED:
            results[name] = sorted(content.splitlines())
        elif path.name == "metrics.jsonl":
            results[name] = [_strip(json.loads(line)) for line in content.splitlines()]
        elif path.name == "summary.json":
            results[name] = _strip(json.loads(content))
        elif path.name == "run.json":
            results[name] = json.loads(content)["settings"]
        else:
            results[name] = content
    return results


def _strip(values: dict[str, Any]) -> dict[str, Any]:
    """Return results without times, without the name of the output directory and without how the run was resumed."""
    return {
        key: _strip(value) if key == "config" else value
        for key, value in values.items()
        if key not in {*VARYING, "output_dir", "resume"}
    }


if __name__ == "__main__":
    main()
