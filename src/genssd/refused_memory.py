"""Errors that mean refused memory, in one line: those of Python, torch and CUDA, and of a library that is loaded."""

from __future__ import annotations

import re

from genssd.engine.host.machine import available_memory

MESSAGES = re.compile("allocate memory|out of memory|failed to map segment", re.IGNORECASE)
"""Messages of errors that mean refused memory."""


def means_refused_memory(error: BaseException) -> bool:
    """Return whether an error says that memory was refused."""
    return isinstance(error, MemoryError) or bool(MESSAGES.search(str(error)))


def describe_refused_memory(error: BaseException) -> str:
    """Return one line about memory that was refused."""
    text = str(error).strip()
    reason = f"out of memory{f': {text.splitlines()[0]}' if text else ''}"
    remedy = "raise the limit (ulimit -v, the container's), or take smaller batches or models"
    try:
        return f"{reason}; {available_memory():,} bytes of memory are left for this process: {remedy}"
    except MemoryError:
        return f"{reason}; {remedy}"
