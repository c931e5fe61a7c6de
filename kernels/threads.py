"""Number of threads of the native CPU kernels, and its peace with the threads of torch.

The native kernels have a pool of threads of their own (csrc/threads.hpp), torch has another (OpenMP). The idle threads
of torch's pool wait for more work in a loop that occupies a core, for up to a quarter of a second after each operator
that was computed in parallel. So torch computes with one thread where the native kernels do the work.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from genssd import _core

_native_threads: ContextVar[int | None] = ContextVar("native_threads", default=None)


def num_threads() -> int:
    """Return the number of threads of a native kernel: that of the innermost `native_threads` block, else torch's."""
    return _native_threads.get() or torch.get_num_threads()


@contextmanager
def native_threads(count: int) -> Iterator[None]:
    """Let native kernels inside the block use `count` threads, and torch's operators one.

    On a processor without native kernels torch's operators do all work, and get the threads. Torch's number is restored
    after the block. The results of the native kernels do not depend on the number.
    """
    token = _native_threads.set(count)
    try:
        with torch_threads(count if _core.instruction_set() is None else 1):
            yield
    finally:
        _native_threads.reset(token)


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Let torch's operators on the CPU use `count` threads inside the block. Their rounding depends on the number."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
