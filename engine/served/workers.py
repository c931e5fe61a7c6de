"""Threads that wait for a server: a limited number of calls runs at once, the others wait in a queue."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

Work = Callable[[], None]


class Workers:
    """Threads that do pieces of work, at most `limit` at once; they end when nothing is left to do.

    They are daemons: a process that ends does not wait for a server.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._waiting: deque[Work] = deque()
        self._num_running = 0
        self._lock = threading.Lock()

    def submit(self, work: Work, *, first: bool = False) -> None:
        """Do a piece of work as soon as a thread is free. first: before all that waits. It must not raise."""
        with self._lock:
            if first:
                self._waiting.appendleft(work)
            else:
                self._waiting.append(work)
            if self._num_running == self._limit:
                return
            self._num_running += 1
        threading.Thread(target=self._run, name="genssd-server", daemon=True).start()

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._num_running -= 1
                    return
                work = self._waiting.popleft()
            work()
