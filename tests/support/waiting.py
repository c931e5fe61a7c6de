"""What a process imports that never gets done with it, in place of the imports of a worker."""

from __future__ import annotations

import multiprocessing
import time

if multiprocessing.parent_process() is not None:
    time.sleep(600)


def wait(pipe: object) -> None:
    raise AssertionError("it waits before it gets here")
