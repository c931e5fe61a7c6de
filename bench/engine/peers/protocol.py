"""How a benchmark talks to a peer in another interpreter: a line of JSON in, a line of JSON out.

    {"workload": "score", "round": 2, "changes": {"candidates": 4}}  ->  {"seconds": 3.9, ...} | {"error": "..."}

changes are to the sizes that the worker was started with. Its first line describes it. Whatever libraries print goes to
standard error. Standard library only.
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
    """One run. values: log-probabilities per candidate, of `score` alone; None where the engine gives none."""

    seconds: float
    values: list[list[float | None]] | None = None
    prefix_seconds: float | None = None
    """What the prefix took that `score` and `decode` found in the cache; not part of seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """What a worker says of itself. notes: where its work is not exactly that of the workload, by workload."""

    version: str
    settings: str
    workloads: list[str]
    notes: dict[str, str]


Workload = Callable[[Sizes, int], Measured]


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerOptions:
    directory: Path
    """Holds model/ and what a peer makes of it."""
    sizes: Sizes
    threads: int
    top_p: float
    """Of what `decode` and `select_expand` draw; 1 keeps every token."""


def worker_options() -> WorkerOptions:
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("--sizes", choices=SIZES, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--top-p", type=float, required=True)
    options = parser.parse_args()
    return WorkerOptions(
        directory=options.directory, sizes=SIZES[options.sizes], threads=options.threads, top_p=options.top_p
    )


def private_stdout() -> IO[str]:
    """The real standard output; what else is written to it from now on, by C++ too, goes to standard error."""
    kept = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return kept


def serve(
    out: IO[str], sizes: Sizes, version: str, settings: str, workloads: Mapping[str, Workload], notes: dict[str, str]
) -> None:
    """Answer requests until standard input ends. A failing workload is an answer, too."""
    description = Description(version=version, settings=settings, workloads=list(workloads), notes=notes)
    print(json.dumps(asdict(description)), file=out, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = asdict(workloads[request["workload"]](replace(sizes, **request["changes"]), request["round"]))
        except Exception as error:  # the report says so, and the other engines go on
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=out, flush=True)


class WorkerFailed(RuntimeError):
    """A worker that ended, or a workload that raised."""


class Peer:
    """The other end: a worker of its own process, loaded once. Arguments as in WorkerOptions."""

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
                start_new_session=True,  # Ctrl-C is for the benchmark: it reports what there is, then ends its workers
            )
        self.description = Description(**self._read())

    def run(self, workload: str, round_: int, **changes: int) -> Measured:
        """changes: to the sizes. Raises WorkerFailed."""
        assert self._process.stdin is not None
        request = json.dumps({"workload": workload, "round": round_, "changes": changes})
        with suppress(BrokenPipeError):  # a worker that has ended is found out below
            print(request, file=self._process.stdin, flush=True)
        answer = self._read()
        if "error" in answer:
            raise WorkerFailed(f"{self.name}, {workload}: {answer['error']}")
        return Measured(**answer)

    def close(self) -> None:
        """End the worker and what it has started; what they are in the middle of is not waited for."""
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
