"""Trainings in several processes on the CPU, with the variables that torchrun sets.

A process that has imported everything forks the ranks of each job: imports take longer than trainings.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]
LIMIT = 300.0
"""Seconds after which a job is ended."""
GRACE = 5.0
"""Seconds that the other ranks have to end by themselves when one has failed."""


@dataclass(frozen=True, slots=True)
class Rank:
    """How one process of a job has ended."""

    status: int
    """Exit code; minus the signal that ended it."""
    result: Any
    """What the function returned; None where it raised."""
    error: str
    """Message of the error that it raised, with the name of its class; empty without one."""


class Ranks:
    """The process that forks the ranks. `close` ends it."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS.parent}"}
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from support.ranks import serve; serve()"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip

    def run(self, size: int, job: str, *arguments: Any) -> list[Rank]:
        """Run a function of support.rank_jobs in so many processes, with arguments that JSON can hold."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([size, job, arguments]) + "\n")
        self._process.stdin.flush()
        return [Rank(*fields) for fields in json.loads(self._process.stdout.readline())]

    def results(self, size: int, job: str, *arguments: Any) -> list[Any]:
        """Run a function as `run` does, and return the results of processes of which none fails."""
        ranks = self.run(size, job, *arguments)
        assert [(rank.status, rank.error) for rank in ranks] == [(0, "")] * size, ranks
        return [rank.result for rank in ranks]

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


@contextlib.contextmanager
def open_ranks() -> Iterator[Ranks]:
    ranks = Ranks()
    try:
        yield ranks
    finally:
        ranks.close()


def serve() -> None:
    """Run the jobs that standard input asks for, until it ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the ranks print is no answer
    from support import rank_jobs

    for line in sys.stdin:
        size, job, arguments = json.loads(line)
        answers.write(json.dumps(_run_ranks(size, getattr(rank_jobs, job), arguments)) + "\n")
        answers.flush()


def _run_ranks(size: int, function: Any, arguments: list[Any]) -> list[list[Any]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pids, pipes = [], []
    for rank in range(size):
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            if size > 1:
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            _run_rank(function, arguments, writer)
        os.close(writer)
        pids.append(pid)
        pipes.append(reader)
    statuses = _wait(pids)
    outcomes = []
    for status, reader in zip(statuses, pipes, strict=True):
        with os.fdopen(reader) as stream:
            outcomes.append([status, *json.loads(stream.read() or '[null, ""]')])
    return outcomes


def _run_rank(function: Any, arguments: list[Any], writer: int) -> None:
    result, error = None, ""
    try:
        result = function(*arguments)
    except BaseException as failure:
        error = f"{type(failure).__name__}: {failure}"
    with os.fdopen(writer, "w") as stream:
        stream.write(json.dumps([result, error]))
    os._exit(1 if error else 0)  # the threads of the group would abort an ordinary end


def _wait(pids: list[int]) -> list[int]:
    """Return the statuses of the ranks. Those that go on when one has failed, waiting for it, are ended."""
    statuses: dict[int, int] = {}
    deadline = time.monotonic() + LIMIT
    while len(statuses) < len(pids):
        for pid in pids:
            if pid in statuses:
                continue
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                statuses[pid] = os.waitstatus_to_exitcode(status)
                if statuses[pid] != 0:
                    deadline = min(deadline, time.monotonic() + GRACE)
        if time.monotonic() > deadline:
            for pid in set(pids) - set(statuses):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    return [statuses[pid] for pid in pids]
