"""Kills of `genssd distill` in all of its phases: are the rows and the weights those of a run that nobody disturbed?

    python -m bench.robustness.distill_kills [--kills 10] [--json FILE]

`genssd distill --processes 2` runs on the small pair: in each of two rounds two worker processes select, two training
processes train, and two workers evaluate. The process of the command gets SIGKILL, and the command is given again with
--resume. The phases take turns in a random order (a third of the kills each, to training what is left over): a kill
waits until the files of the run say that its phase has begun and the processes of the phase are there, and then for a
random part of the time that the phase takes in an undisturbed run; where the phase is over by then, it waits for the
next one. A run that ends is compared with the undisturbed one, and the next one begins, until so many kills have
happened. The rows that are trained on, the weights of every round, the evaluations and the summary must be the same,
bit by bit but for times, and no process may outlive its command.

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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from bench.robustness.pool_kills import PAIR, Command, await_end, fork_command, without_times

import genssd
from genssd.distill.small_pair.problems import make_problems
from genssd.engine.host.machine import read_cpu_name

ROUNDS = 2
PLACES = frozenset(("output_dir", "resume", "data", "model_name_or_path", "student", "model"))
"""Keys of summaries that name the output directory of their run, or say how it was resumed."""


Phase = Literal["select", "train", "evaluate"]
PHASES: tuple[Phase, ...] = ("train", "select", "evaluate")


@dataclass
class Tally:
    """What has happened so far."""

    plan: list[Phase]
    """Phases of the kills to come; the last one is the next."""
    draws: random.Random
    lengths: Mapping[Phase, float]
    """Mean seconds that each phase takes in an undisturbed run, in one round."""
    counts: Counter[str] = field(default_factory=lambda: Counter(kills=0, orphans=0))
    kills: list[dict[str, Any]] = field(default_factory=list)
    lifetimes: list[float] = field(default_factory=list)
    """Seconds for which processes were still there after their command."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10, help="number of kills of the command")
    parser.add_argument("--problems", type=int, default=16, help="number of problems")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments")
    parser.add_argument("--json", type=Path, help="file for the result")
    options = parser.parse_args()
    draws, differences = random.Random(options.seed), list[str]()
    plan = [PHASES[number % len(PHASES)] for number in range(options.kills)]
    draws.shuffle(plan)
    with TemporaryDirectory(prefix="genssd-distill-kills-") as name:
        root = Path(name)
        problems = make_problems(options.problems + 8, seed=1)
        for file, part in (("problems", problems[:-8]), ("eval", problems[-8:])):
            lines = [{"question": p.question, "answer": p.answer} for p in part]
            (root / f"{file}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        tally = Tally(plan, draws, run_undisturbed(root, root / "whole"))
        expected = read_results(root / "whole")
        seconds = {phase: round(length, 1) for phase, length in tally.lengths.items()}
        print(f"an undisturbed round takes {seconds} s; files {sorted(expected)}", flush=True)
        while tally.plan:
            tally.counts["runs"] += 1
            output_dir = root / f"run-{tally.counts['runs']}"
            run_with_kills(root, output_dir, tally)
            results = read_results(output_dir)
            names = sorted(expected.keys() | results.keys())
            differences += [f"{output_dir.name}: {n}" for n in names if expected.get(n) != results.get(n)]
            print(f"{output_dir.name}: {dict(tally.counts)}, differences {differences}", flush=True)
    result = {
        "command": " ".join(["python -m bench.robustness.distill_kills", *sys.argv[1:]]),
        "version": genssd.__version__, "cpu": read_cpu_name(), "load": round(os.getloadavg()[0], 1), **tally.counts,
        "kills_by_phase": dict(Counter(kill["phase"] for kill in tally.kills)),
        "rounds": ROUNDS, "problems": options.problems, "seconds_of_a_phase_undisturbed": seconds,
        "longest_seconds_of_a_process_after_its_command": round(max(tally.lifetimes, default=0.0), 2),
        "compared": sorted(expected), "differences": differences, "moments": tally.kills,
    }  # fmt: skip
    print(json.dumps(result, indent=1))
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(bool(differences or tally.counts["orphans"]))


def list_words(root: Path, output_dir: Path) -> list[str]:
    """Return the command. Every training step leaves a checkpoint, so that a resumed one goes on inside of a round."""
    models = ["--teacher", str(PAIR / "teacher"), "--student", str(PAIR / "student")]
    files = ["--data", str(root / "problems.jsonl"), "--eval-data", str(root / "eval.jsonl")]
    select = ["--select.candidates", "2", "--select.chunk.tokens", "1", "--select.chunk.limit", "32"]
    select += ["--select.max-tokens", "64", "--select.max-num-seqs", "8", "--select.memory-bytes", str(1 << 26)]
    train = ["--train.per-device-train-batch-size", "2", "--train.save-steps", "1", "--train.learning-rate", "1e-3"]
    rounds = ["--rounds", str(ROUNDS), "--no-require-correct", "--processes", "2"]
    return ["distill", *models, *files, *select, *train, *rounds, "--output-dir", str(output_dir)]


def run_undisturbed(root: Path, output_dir: Path) -> dict[Phase, float]:
    """Run the command without a kill; return how many seconds each phase takes in a round."""
    log = output_dir.with_suffix(".log")
    command = fork_command(list_words(root, output_dir), log, "fork")
    lengths: dict[Phase, float] = dict.fromkeys(PHASES, 0.0)
    before = time.monotonic()
    while command.poll() is None:
        time.sleep(0.005)
        phase, now = find_phase(output_dir), time.monotonic()
        if phase is not None:
            lengths[phase] += now - before
        before = now
    assert command.wait() == 0, log.read_text()[-2000:]
    return {phase: lengths[phase] / ROUNDS for phase in PHASES}


def run_with_kills(root: Path, output_dir: Path, tally: Tally) -> None:
    """Run the command, kill it in the next phase of the plan while there is one, and resume it to its end."""
    log = output_dir.with_suffix(".log")
    while True:
        resume = ["--resume"] if (output_dir / "run.json").exists() else []
        command = fork_command([*list_words(root, output_dir), *resume], log, "fork")
        while tally.plan and not await_moment(command, output_dir, tally):
            pass
        if not tally.plan or command.poll() is not None:
            if command.wait() != 0:
                raise SystemExit(f"the command ended with {command.wait()}: {log.read_text()[-2000:]}")
            return
        others = find_descendants(command.pid)
        os.kill(command.pid, signal.SIGKILL)
        command.wait()
        tally.counts["kills"] += 1
        kill = {
            "run": output_dir.name, "round": find_round(output_dir), "phase": tally.plan.pop(),
            "checkpoints": len(list((output_dir / f"round-{find_round(output_dir)}").glob("train/checkpoint-*"))),
            "processes": len(others) + 1, "last_written": find_last(output_dir),
        }  # fmt: skip
        tally.kills.append(kill)
        print(kill, flush=True)
        await_end(others, tally.counts, tally.lifetimes)


def await_moment(command: Command, output_dir: Path, tally: Tally) -> bool:
    """Wait for the next phase of the plan and a random part of its time, or until the command ends.

    Returns False where the phase was over before.
    """
    phase = tally.plan[-1]
    while command.poll() is None and not (find_phase(output_dir) == phase and find_descendants(command.pid)):
        time.sleep(0.01)
    until = time.monotonic() + tally.draws.uniform(0.0, tally.lengths[phase])
    while command.poll() is None and find_phase(output_dir) == phase and time.monotonic() < until:
        time.sleep(0.002)
    return command.poll() is not None or find_phase(output_dir) == phase


def find_round(output_dir: Path) -> int:
    """Return the number of the last round that has begun; 0 for the evaluation before the first one."""
    return max((int(path.name[6:]) for path in output_dir.glob("round-*")), default=0)


def find_phase(output_dir: Path) -> Phase | None:
    """Return what the command does, by the files of its last round; None before it does anything, and between."""
    number = find_round(output_dir)
    directory = output_dir / f"round-{number}"
    if number and not (directory / "kept.jsonl").exists():
        return "select" if directory.exists() else None
    if number and not (directory / "train/finished.json").exists():
        return "train"
    return "evaluate" if directory.exists() and not (directory / "evaluate/summary.json").exists() else None


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
