"""Comparison of LaTeX formulas by math-verify, within a time limit that holds in every thread.

math-verify's own limit is a signal: only the main thread can take it, and it does not interrupt arithmetic on huge
integers. So math-verify runs in a process of its own, which is killed when it takes too long.
"""

from __future__ import annotations

import atexit
import json
import os
import select
import subprocess
import sys
import threading
from functools import lru_cache
from pathlib import Path
from typing import Literal

from genssd.engine.common.errors import GenssdError

TIME_LIMIT = 5.0
"""Seconds that math-verify may take to read and compare one pair."""
START_LIMIT = 120.0
"""Seconds that the process of math-verify may take to start."""

Comparison = Literal["equal", "different", "unreadable", "slow"]
"""unreadable: math-verify finds no mathematics in the reference. slow: it took too long, or too much memory."""


class _Worker:
    """The process of math-verify. One lock serves all threads; a forked child starts a process of its own."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0

    def compare(self, reference: str, response: str) -> Comparison:
        with self._lock:
            if self._process is None or self._owner != os.getpid():
                self._start()
            assert self._process is not None
            assert self._process.stdin is not None
            try:
                self._process.stdin.write(json.dumps([reference, response]).encode() + b"\n")
                self._process.stdin.flush()
            except BrokenPipeError:
                self.stop()
                return "slow"
            word = self._read_line(TIME_LIMIT)
            if word in ("equal", "different", "unreadable"):
                return word  # type: ignore[return-value]  # mypy does not narrow a str to a Literal
            self.stop()
            return "slow"

    def stop(self) -> None:
        if self._process is not None and self._owner == os.getpid():
            self._process.kill()
            self._process.communicate()
        self._process = None

    def _start(self) -> None:
        # -P: modules beside the script must not stand in for those that math-verify imports
        command = [sys.executable, "-P", str(Path(__file__).with_name("math_worker.py"))]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        self._owner = os.getpid()
        if self._read_line(START_LIMIT) != "ready":
            self.stop()
            raise GenssdError(f"math-verify does not start; `{' '.join(command)}` shows why")

    def _read_line(self, seconds: float) -> str:
        assert self._process is not None
        assert self._process.stdout is not None
        readable, _, _ = select.select([self._process.stdout], [], [], seconds)
        return self._process.stdout.readline().decode().strip() if readable else ""


_worker = _Worker()
atexit.register(_worker.stop)


@lru_cache(maxsize=4096)
def compare_formulas(reference: str, response: str) -> Comparison:
    """Return how math-verify compares the LaTeX of a response with that of the reference, at most TIME_LIMIT long."""
    return _worker.compare(reference, response)
