"""Processes that work for the process of a command: how they start, end with it, and how their end is described."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Callable
from multiprocessing import connection, parent_process, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnContext
from multiprocessing.process import BaseProcess
from typing import Any, cast

START_METHOD = "spawn"
"""How `multiprocessing` starts a process: as a new interpreter, because a forked one cannot use CUDA or the threads
that this process has started."""
KEPT_SIGNALS = (signal.SIGINT, signal.SIGHUP)
"""Signals of a terminal to all of its processes, which only the process of the command answers."""


def start_process(body: Callable[..., None], *arguments: Any) -> tuple[BaseProcess, Connection]:
    """Start a process that runs body(pipe, *arguments); return it with this process's end of the pipe.

    It ends as soon as this one has ended, also while it imports what body and arguments need.
    """
    context = cast(SpawnContext, multiprocessing.get_context(START_METHOD))
    pipe, far_end = context.Pipe()
    content = pickle.dumps((body, arguments), protocol=pickle.HIGHEST_PROTOCOL)
    process = context.Process(target=_run, args=(far_end, content), daemon=True)
    resource_tracker.ensure_running()  # it unblocks signals when it starts
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, KEPT_SIGNALS)
    try:
        process.start()  # it inherits what is blocked
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        far_end.close()
    return process, pipe


def _run(pipe: Connection, content: bytes) -> None:
    """Watch the parent, and run the body that the pickle holds; the first function of a process."""
    threading.Thread(target=_await_end_of_parent, daemon=True).start()
    body, arguments = pickle.loads(content)  # imports nearly everything
    body(pipe, *arguments)


def _await_end_of_parent() -> None:
    """End this process when its parent has ended; the body of a thread."""
    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def describe_end(process: BaseProcess, reason: str | None) -> str:
    """Return what ended a process, which has ended, in words. reason: its own words; None where it had none."""
    if reason is not None:
        return f"failed ({reason})"
    code = process.exitcode
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        return f"was killed by {name}{' (out of memory?)' if name == 'SIGKILL' else ''}"
    return f"ended with exit code {code}"


def describe_error(error: BaseException) -> str:
    """Return an error that no user has caused as one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
