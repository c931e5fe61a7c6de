"""A limit on the time that a function computes, in any thread.

A chat template is a program of its own, which may run for ever. A watching thread raises an exception in the thread
that exceeds its limit; a single step that does not return to Python (a huge power) is not stopped.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from genssd.engine.common.errors import CheckpointError

T = TypeVar("T")

INTERVAL = 0.25
"""Seconds between two looks of the watching thread."""


class TimeLimitError(CheckpointError):
    """A chat template that computes for longer than its limit: the fault of a checkpoint, not of a row."""


class _Expired(BaseException):
    """Raised in the thread that exceeds its limit; no `except Exception` of a template's filter catches it."""


class _Block:
    """A call that runs under a limit."""

    def __init__(self, seconds: float) -> None:
        self.thread = threading.get_ident()
        self.clock = time.pthread_getcpuclockid(self.thread) if hasattr(time, "pthread_getcpuclockid") else None
        self.limit = self.read_clock() + seconds
        self.is_expired = False

    def read_clock(self) -> float:
        """Return the seconds that the block's thread has computed; wall-clock time where no such clock exists."""
        return time.monotonic() if self.clock is None else time.clock_gettime(self.clock)


class _Watcher:
    """A thread that stops the blocks which exceed their limits."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget all blocks, as a forked process must, which has none of its parent's threads."""
        self._lock = threading.Lock()
        self._blocks: set[_Block] = set()
        self._thread: threading.Thread | None = None

    def add(self, block: _Block) -> None:
        with self._lock:
            self._blocks.add(block)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="genssd time limits", daemon=True)
                self._thread.start()

    def remove(self, block: _Block) -> None:
        with self._lock:
            self._blocks.discard(block)

    def _run(self) -> None:
        while True:
            time.sleep(INTERVAL)
            with self._lock:
                for block in [block for block in self._blocks if block.read_clock() > block.limit]:
                    self._blocks.discard(block)
                    block.is_expired = True
                    _raise_in(block.thread, _Expired)


_watcher = _Watcher()
os.register_at_fork(after_in_child=_watcher.reset)


def call_within(seconds: float, name: str, work: Callable[[], T]) -> T:
    """Return the result of a function that may compute for so many seconds.

    Raises TimeLimitError, whose message begins with the name, when it takes longer. Calls are not nested.
    """
    block = _Block(seconds)
    # one frame holds all of it, so that the exception cannot arrive between the work and what catches it
    try:
        try:
            _watcher.add(block)
            result = work()
        finally:
            _watcher.remove(block)
            if block.is_expired:  # the exception may still be on its way
                _raise_in(block.thread, None)
    except _Expired:
        _watcher.remove(block)
    if block.is_expired:
        raise TimeLimitError(f"{name} takes more than {seconds:g} seconds")
    return result


def _raise_in(thread: int, kind: type[BaseException] | None) -> None:
    """Raise an exception in a thread at its next step of Python code; None takes back one that was not raised yet."""
    argument = ctypes.py_object(kind) if kind is not None else None
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), argument)
