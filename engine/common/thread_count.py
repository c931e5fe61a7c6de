"""The range of a number of threads."""

from __future__ import annotations

from genssd.engine.common.errors import InputError

MAX_THREADS = 1024


def check_threads(threads: int | None) -> None:
    """Raise InputError on a number of threads below 1 or above MAX_THREADS; None is allowed."""
    if threads is not None and not 1 <= threads <= MAX_THREADS:
        raise InputError(f"threads must be in 1..{MAX_THREADS}, not {threads}")
