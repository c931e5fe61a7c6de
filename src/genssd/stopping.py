"""Signals that stop a command: one line, the exit code of the signal, and what is on disk."""

from __future__ import annotations

import os
import signal
import threading

TYPE_CHECKING = False  # this file imports little: it is read before anything else
if TYPE_CHECKING:
    from types import FrameType
    from typing import Any

VERBS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated", signal.SIGHUP: "terminated: the terminal is gone"}
"""What the message of each signal says."""


class StopSignals:
    """Handlers of SIGINT, SIGTERM and SIGHUP. Use as a context manager.

    Before the command works, a signal ends the process at once: nothing has been written. Afterwards the first one
    raises KeyboardInterrupt, so that files and the lock are closed, and a second one ends the process at once.
    """

    def __init__(self, *, restore: bool) -> None:
        self._restore = restore
        self._previous: dict[int, Any] = {}
        self._output_dir: str | None = None
        self.is_working = False
        """Whether the command has begun: it may have written something."""
        self.received: signal.Signals | None = None
        """The signal that has stopped the command."""

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in VERBS:
                if signal.getsignal(number) != signal.SIG_IGN:  # under nohup, or in the background of a script
                    self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: Any) -> None:
        if self._restore:
            for number, handler in self._previous.items():
                signal.signal(number, handler)

    def begin_work(self, output_dir: str | None) -> None:
        """Note that the command begins. output_dir: the directory that it writes to, if it has one."""
        self.is_working = True
        self._output_dir = None if output_dir is None else os.path.expanduser(output_dir)

    @property
    def exit_code(self) -> int:
        """Exit code of a command that was stopped."""
        return 128 + (self.received or signal.SIGINT)

    def describe(self, error: KeyboardInterrupt) -> str:
        """Return what has happened, and what is on disk: the note of the outermost run that the error went through."""
        notes = getattr(error, "__notes__", [])
        if not notes and (self._output_dir is None or not os.path.exists(f"{self._output_dir}/run.json")):
            notes = ["nothing was written"]
        return "; ".join([VERBS[self.received or signal.SIGINT], *notes[-1:]])

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self.is_working or self.received is not None:
            written = "nothing was written" if not self.is_working else "ended at once, while it closed its files"
            if is_main_process():
                os.write(2, f"genssd: {VERBS[signal.Signals(number)]}; {written}\n".encode())
            os._exit(128 + number)
        self.received = signal.Signals(number)
        raise KeyboardInterrupt


def is_main_process() -> bool:
    """Return whether this process prints: of several under torchrun, only the first one does."""
    return os.environ.get("RANK", "0") == "0"
