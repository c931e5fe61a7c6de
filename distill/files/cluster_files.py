"""Data files that a cluster reads: the place at which a command says that it has one, and which names are for it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterRow:
    """One row of a file that a cluster has read."""

    file: str
    """Name of the file in the directory, or on the object storage, that was named."""
    unit: str
    """What its rows are called: "line" or "row"."""
    number: int
    """Number of the line or row in that file, from 1."""
    text: bytes
    """JSON text of the row."""


class ClusterReader(Protocol):
    """What reads data files through a cluster."""

    def read(self, name: str) -> Sequence[ClusterRow]:
        """Return all rows of a directory or a URL: file after file by their names. Raises InputError."""
        ...


_reader: ContextVar[ClusterReader | None] = ContextVar("cluster_reader", default=None)


@contextmanager
def read_with(reader: ClusterReader) -> Iterator[None]:
    """Let directories and URLs be read by a cluster while the block runs."""
    token = _reader.set(reader)
    try:
        yield
    finally:
        _reader.reset(token)


def find_cluster_reader(name: str) -> ClusterReader | None:
    """Return what reads a data file through a cluster; None where this process opens it itself, or has no cluster."""
    return _reader.get() if is_for_cluster(name) else None


def is_for_cluster(name: str) -> bool:
    """Return whether a name means what only a cluster reads: a URL, or a directory."""
    return ("://" in name and not os.path.lexists(name)) or os.path.isdir(name)
