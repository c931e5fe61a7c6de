"""What the GPU probe measures: an operation of one shape, with the implementations that compute it."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from bench.gpu.timing import Implementation


class NotInstalled(Exception):
    """Raised by an implementation that needs a library which this machine lacks."""


Build = Callable[[], Implementation]
"""Function that makes the inputs of an implementation on the device. Raises NotInstalled."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """An operation of one shape."""

    name: str
    shape: str
    flops: float
    """Operations that any implementation computes."""
    num_bytes: float
    """Bytes that any implementation reads and writes."""
    implementations: Mapping[str, Build]
    """Ways to compute it; the first is ours."""


def load(module: str, name: str) -> Any:
    """Return a function or class of another library. Raises NotInstalled."""
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise NotInstalled(f"{module}.{name}: {error}") from None
