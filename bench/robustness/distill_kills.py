"""Kills of `genssd distill` at random moments: are the rows and the weights those of a run that nobody disturbed?

    python -m bench.robustness.distill_kills [--kills 10] [--json FILE]

`genssd distill --processes 2` runs on the small pair: in each of two rounds two worker processes select, two training
processes train, and two workers evaluate. After a random time, drawn from the time of an undisturbed run, the process
of the command gets SIGKILL, and the command is given again with --resume. A run that ends is compared with the
undisturbed one, and the next one begins, until so many kills have happened. The rows that are trained on, the weights
of every round, the evaluations and the summary must be the same, bit by bit but for times, and no process may outlive
its command.

Commands are forked from this process, and their processes from the command, which has imported everything and computes
nothing itself: nearly all of the time of a start is imports.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bench.robustness.pool_kills import PAIR, await_end, fork_command, without_times

import genssd
from genssd.distill.small_pair.problems import make_problems
from genssd.engine.host.machine import read_cpu_name

ROUNDS = 2
PLACES = frozenset(("output_dir", "resume", "data", "model_name_or_path", "student", "model"))
"""Keys of summaries that name the output directory of their run, or say how it was resumed."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10, help="number of kills of the command")
    parser.add_argument("--problems", type=int, default=24, help="number of problems")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments")
    parser.add_argument("--json", type=Path, help="file for the result")
    options = parser.parse_args()
    draws = random.Random(options.seed)
    counts: Counter[str] = Counter(kills=0, orphans=0)
    kills: list[dict[str, Any]] = []
    lifetimes: list[float] = []
    differences: list[str] = []
    with TemporaryDirectory(prefix="genssd-distill-kills-") as name:
        root = Path(name)
        problems = make_problems(options.problems + 8, seed=1)
        for file, part in (("problems", problems[:-8]), ("eval", problems[-8:])):
            lines = [{"question": p.question, "answer": p.answer} for p in part]
            (root / f"{file}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        started = time.monotonic()
        log = root / "whole.log"
        assert fork_command(list_words(root, root / "whole"), log, "fork").wait() == 0, log.read_text()[-2000:]
        seconds = time.monotonic() - started
        expected = read_results(root / "whole")
        print(f"an undisturbed run takes {seconds:.1f} s and writes {sorted(expected)}", flush=True)
        while counts["kills"] < options.kills:
            counts["runs"] += 1
            output_dir = root / f"run-{counts['runs']}"
            run_with_kills(root, output_dir, seconds, options.kills, draws, counts, kills, lifetimes)
            results = read_results(output_dir)
            names = sorted(expected.keys() | results.keys())
            differences += [f"{output_dir.name}: {n}" for n in names if expected.get(n) != results.get(n)]
            print(f"run {counts['runs']}: {dict(counts)}, differences {differences}", flush=True)
    result = {
        "command": " ".join(["python -m bench.robustness.distill_kills", *sys.argv[1:]]),
        "version": genssd.__version__, "cpu": read_cpu_name(), "load": round(os.getloadavg()[0], 1), **counts,
        "rounds": ROUNDS, "problems": options.problems, "seconds_of_an_undisturbed_run": round(seconds, 1),
        "longest_seconds_of_a_process_after_its_command": round(max(lifetimes, default=0.0), 2),
        "compared": sorted(expected), "differences": differences, "moments": kills,
    }  # fmt: skip
    print(json.dumps(result, indent=1))
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(bool(differences or counts["orphans"]))


def list_words(root: Path, output_dir: Path) -> list[str]:
    """Return the command. Every training step leaves a checkpoint, so that a resumed one goes on inside of a round."""
    models = ["--teacher", str(PAIR / "teacher"), "--student", str(PAIR / "student")]
    files = ["--data", str(root / "problems.jsonl"), "--eval-data", str(root / "eval.jsonl")]
    select = ["--select.candidates", "2", "--select.chunk.tokens", "1", "--select.chunk.limit", "32"]
    select += ["--select.max-tokens", "64", "--select.max-num-seqs", "8", "--select.memory-bytes", str(1 << 26)]
    train = ["--train.per-device-train-batch-size", "4", "--train.save-steps", "1", "--train.learning-rate", "1e-3"]
    rounds = ["--rounds", str(ROUNDS), "--no-require-correct", "--processes", "2"]
    return ["distill", *models, *files, *select, *train, *rounds, "--output-dir", str(output_dir)]


def run_with_kills(
    root: Path,
    output_dir: Path,
    seconds: float,
    most: int,
    draws: random.Random,
    counts: Counter[str],
    kills: list[dict[str, Any]],
    lifetimes: list[float],
) -> None:
    """Run the command, kill it at random moments while fewer than `most` kills have happened, and resume it.

    seconds: those of an undisturbed run. kills: gets the moment of each and the file that was written last before it.
    """
    log = output_dir.with_suffix(".log")
    while True:
        resume = ["--resume"] if (output_dir / "run.json").exists() else []
        command = fork_command([*list_words(root, output_dir), *resume], log, "fork")
        until = time.monotonic() + draws.uniform(0.0, seconds)
        is_killed = counts["kills"] < most
        while command.poll() is None and not (is_killed and time.monotonic() >= until):
            time.sleep(0.005)
        if command.poll() is not None:
            if command.wait() != 0:
                raise SystemExit(f"the command ended with {command.wait()}: {log.read_text()[-2000:]}")
            return
        others = find_descendants(command.pid)
        os.kill(command.pid, signal.SIGKILL)
        command.wait()
        counts["kills"] += 1
        kills.append({"run": output_dir.name, "processes": len(others) + 1, "last_written": find_last(output_dir)})
        print(kills[-1], flush=True)
        await_end(others, counts, lifetimes)


def find_descendants(pid: int) -> list[int]:
    """Return all processes that a process has started, and those that they have started."""
    parents: dict[int, int] = {}
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            fields = (directory / "stat").read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if fields[0] != "Z":
            parents[int(directory.name)] = int(fields[1])
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return sorted(found - {pid})


def find_last(output_dir: Path) -> str:
    """Return the name of the file that was written last; nothing where there is none."""
    files = [(path.stat().st_mtime, path) for path in output_dir.rglob("*") if path.is_file()]
    return str(max(files)[1].relative_to(output_dir)) if files else ""


def read_results(output_dir: Path) -> dict[str, Any]:
    """Return what counts of a run, by file: rows and summaries without times, and digests of weights."""
    results: dict[str, Any] = {}
    for path in sorted(output_dir.rglob("*")):
        name = str(path.relative_to(output_dir))
        if "checkpoint-" in name or not path.is_file():
            continue
        if path.suffix == ".safetensors":
            results[name] = sha256(path.read_bytes()).hexdigest()
        elif path.name in ("kept.jsonl", "selections.jsonl", "decisions.jsonl", "evaluations.jsonl", "samples.jsonl"):
            lines = path.read_text().replace(str(output_dir), "").splitlines()
            rows = [without_times(json.loads(line)) for line in lines]
            results[name] = sorted(json.dumps(row, sort_keys=True) for row in rows)
        elif path.name == "summary.json":
            results[name] = strip(json.loads(path.read_text()))
    return results


def strip(value: Any) -> Any:
    """Return a summary without times and without the places of its run."""
    if isinstance(value, dict):
        return {key: strip(part) for key, part in value.items() if key not in PLACES and "second" not in key}
    return list(map(strip, value)) if isinstance(value, Sequence) and not isinstance(value, str) else value


if __name__ == "__main__":
    main()
