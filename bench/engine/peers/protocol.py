"""Protocol between a benchmark and an engine's worker in another interpreter: a line of JSON in, a line of JSON out.

    {"workload": "score", "round": 2, "changes": {"candidates": 4}}  ->  {"seconds": 3.9, ...} | {"error": "..."}

changes replace sizes that the worker was started with. A worker's first line is its Description. What libraries print
goes to standard error. This file imports the standard library only, because every interpreter runs it.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO

from bench.engine.peers.workloads import SIZES, Sizes


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Result of one run of a workload."""

    seconds: float
    values: list[list[float | None]] | None = None
    """Log-probabilities [candidate][token] of `score`, None where the engine returns none; None for other workloads."""
    prefix_seconds: float | None = None
    """Seconds for the prefix that `score` and `decode` read from the cache; not included in seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """Description of a worker. notes: by workload, how its work differs from the description of the workload."""

    version: str
    settings: str
    workloads: list[str]
    notes: dict[str, str]


Workload = Callable[[Sizes, int], Measured]


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerOptions:
    """Command-line options of a worker."""

    directory: Path
    """Directory that holds model/ and an engine's conversions of it."""
    sizes: Sizes
    threads: int
    top_p: float
    """Top-p of the draws of `decode` and `select_expand`; 1 keeps every token."""


def parse_worker_options() -> WorkerOptions:
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("--sizes", choices=SIZES, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--top-p", type=float, required=True)
    options = parser.parse_args()
    return WorkerOptions(
        directory=options.directory, sizes=SIZES[options.sizes], threads=options.threads, top_p=options.top_p
    )


def take_stdout() -> IO[str]:
    """Return the real standard output; later writes to it by others, C++ included, go to standard error."""
    kept = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return kept


def serve(
    out: IO[str], sizes: Sizes, version: str, settings: str, workloads: Mapping[str, Workload], notes: dict[str, str]
) -> None:
    """Answer requests until standard input ends. A workload that raises is answered with its error."""
    description = Description(version=version, settings=settings, workloads=list(workloads), notes=notes)
    print(json.dumps(asdict(description)), file=out, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = asdict(workloads[request["workload"]](replace(sizes, **request["changes"]), request["round"]))
        except Exception as error:  # the report shows it, and the other engines continue
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=out, flush=True)


class WorkerFailed(RuntimeError):
    """Error raised when a worker has ended or a workload has raised."""


class Peer:
    """Worker process of one engine, which loads the model once. Its arguments are those of WorkerOptions."""

    def __init__(self, name: str, python: str, directory: Path, sizes: str, threads: int, top_p: float = 1.0) -> None:
        self.name = name
        self._log = directory / f"{name}.log"
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": str(Path(__file__).resolve().parents[3]),
        }
        command = [python, "-m", f"bench.engine.peers.{name}_worker", str(directory), "--sizes", sizes]
        command += ["--threads", str(threads), "--top-p", str(top_p)]
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment,
                start_new_session=True,  # Ctrl-C reaches the benchmark only, which reports and then ends the workers
            )
        self.description = Description(**self._read())

    def run(self, workload: str, round_: int, **changes: int) -> Measured:
        """Run a workload once. changes: sizes to replace. Raises WorkerFailed."""
        assert self._process.stdin is not None
        request = json.dumps({"workload": workload, "round": round_, "changes": changes})
        with suppress(BrokenPipeError):  # reading its answer below reveals a worker that has ended
            print(request, file=self._process.stdin, flush=True)
        answer = self._read()
        if "error" in answer:
            raise WorkerFailed(f"{self.name}, {workload}: {answer['error']}")
        return Measured(**answer)

    def close(self) -> None:
        """Kill the worker and its child processes at once, even in the middle of a workload."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _read(self) -> dict[str, object]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            words = "\n".join(self._log.read_text().splitlines()[-10:])
            raise WorkerFailed(f"{self.name} ended with {self._process.wait()}; its last words:\n{words}")
        return json.loads(line)
