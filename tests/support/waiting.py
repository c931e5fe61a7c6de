"""A process that waits for its parent's end, without the imports of a worker."""

from __future__ import annotations

import time
from multiprocessing.connection import Connection

from genssd.distill.pool.starting import end_with_parent


def wait(pipe: Connection) -> None:
    end_with_parent()
    time.sleep(600)
