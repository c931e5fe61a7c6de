"""How long do commands take with one thread, two, and the number that they choose, alone and beside busy cores?

    python -m bench.commands.threads [--model DIRECTORY] [--rounds 3] --json bench/results/threads.json

Commands on the small pair: three steps of `train`, 60 with many and 80 with few examples in a forward pass, a short
`select`, `score` and `evaluate`; with --model also one step of `train` and a `score` with that model. Each is a process
of its own, timed after its imports, loading of the models included. The settings alternate in every round, which a
change of the machine's load then meets alike. "busy" is the same beside one process per core that only counts. The
ratio is the default's median time divided by the best setting's. Processor seconds (in parentheses) show threads that
wait in a loop, also where other work disturbs the times. A run is written as [seconds, processor seconds].
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from bench.engine.peers.machine import describe_machine

from genssd.distill import small_pair
from genssd.distill.small_pair.problems import make_problems
from genssd.engine.host.machine import available_cores

PAIR = Path(next(iter(small_pair.__path__)))
SETTINGS: dict[str, tuple[str, ...]] = {"1": ("--threads", "1"), "2": ("--threads", "2"), "default": ()}
BOUND = 1.3
"""Largest ratio of the default to the best setting that is accepted."""


TIMED = """
import sys, time
from genssd import cli

load = cli.import_module

def load_timed(name):
    module = load(name)
    if name == "genssd.commands":
        run = module.run_command
        def run_timed(*arguments):
            started = time.perf_counter(), time.process_time()
            run(*arguments)
            print("seconds", time.perf_counter() - started[0], time.process_time() - started[1])
        module.run_command = run_timed
    return module

cli.import_module = load_timed
cli.main(sys.argv[1:])
"""
"""Program that runs a command of genssd and prints its seconds and processor seconds after its imports."""


class Times(NamedTuple):
    """Seconds that a command takes, and those of processors that it uses."""

    seconds: float
    processor_seconds: float


def run_genssd(words: list[str], output_dir: Path) -> Times:
    """Run a command of genssd in a new output directory. Raises CalledProcessError."""
    shutil.rmtree(output_dir, ignore_errors=True)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "KMP_"))}
    command = [sys.executable, "-c", TIMED, *words, "--output-dir", str(output_dir)]
    printed = subprocess.run(
        command, check=True, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    seconds, processor_seconds = map(float, printed.stdout.split()[-2:])
    return Times(seconds, processor_seconds)


def make_commands(directory: Path, prompts: int, model: str | None) -> dict[str, list[str]]:
    """Write the data of the commands and return the words of each, by name."""
    problems = [
        json.dumps({"problem": problem.question, "answer": problem.answer}) for problem in make_problems(prompts, 0)
    ]
    data = directory / "problems.jsonl"
    data.write_text("\n".join(problems) + "\n")
    teacher, student = str(PAIR / "teacher"), str(PAIR / "student")
    pair = ["--teacher", teacher, "--student", student]
    select = ["select", *pair, "--data", str(data), "--max-tokens", "192"]
    run_genssd(select, directory / "traces")
    traces = str(directory / "traces" / "selections.jsonl")
    train = ["train", "--data", traces, "--per-device-train-batch-size"]
    train_student = ["--model-name-or-path", student, "--max-steps"]
    commands = {
        "train": [*train, "16", *train_student, "3"],
        "train many": [*train, "48", *train_student, "60"],
        "train few": [*train, "4", *train_student, "80"],
        "select": select,
        "score": ["score", "--student", student, "--data", traces, "--criteria", "ppl", "rsr"],
        "evaluate": ["evaluate", "--model", student, "--data", str(data), "--max-tokens", "192"],
    }
    if model is not None:
        commands |= {
            "train MODEL": [*train, "4", "--model-name-or-path", model, "--max-steps", "1"],
            "score MODEL": ["score", "--student", model, "--data", traces, "--criteria", "ppl"],
        }
    return commands


@contextmanager
def busy_cores(count: int) -> Iterator[None]:
    """Keep so many cores busy while the block runs."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def measure(commands: dict[str, list[str]], directory: Path, rounds: int, neighbours: str) -> list[dict[str, object]]:
    """Time every command with every setting, print a line for each command, and return the rows."""
    rows: list[dict[str, object]] = []
    for name, words in commands.items():
        runs: dict[str, list[Times]] = {setting: [] for setting in SETTINGS}
        for _ in range(rounds):
            for setting, flags in SETTINGS.items():
                runs[setting].append(run_genssd([*words, *flags], directory / "run"))
        medians = {
            setting: Times(*(statistics.median(values) for values in zip(*times, strict=True)))
            for setting, times in runs.items()
        }
        ratio = medians["default"].seconds / min(median.seconds for median in medians.values())
        times = "  ".join(f"{name} {m.seconds:6.2f} s ({m.processor_seconds:6.2f})" for name, m in medians.items())
        print(f"{name:12} {neighbours:6} {times}  ratio {ratio:.2f}{'' if ratio <= BOUND else '  ABOVE'}", flush=True)
        rows.append({"command": name, "machine": neighbours, "runs": runs, "ratio": round(ratio, 3)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="directory of a larger model, for train and score")
    parser.add_argument("--rounds", type=int, default=3, help="number of runs of every command and setting")
    parser.add_argument("--prompts", type=int, default=48, help="number of problems")
    parser.add_argument("--only", nargs="+", help="names of the commands to time; all by default")
    parser.add_argument("--json", type=Path, help="file of the rows")
    options = parser.parse_args()
    cores = available_cores()
    with TemporaryDirectory() as name:
        directory = Path(name)
        commands = make_commands(directory, options.prompts, options.model)
        commands = {name: words for name, words in commands.items() if options.only is None or name in options.only}
        load = os.getloadavg()[0]
        rows = measure(commands, directory, options.rounds, "alone")
        with busy_cores(cores):
            rows += measure(commands, directory, options.rounds, "busy")
    if options.json:
        model = " --model DIRECTORY" if options.model else ""
        command = f"python -m bench.commands.threads{model} --rounds {options.rounds} --prompts {options.prompts}"
        result = {"command": command, "load_before": load, **describe_machine(cores), "rows": rows}
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
