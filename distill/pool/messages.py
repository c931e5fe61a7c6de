"""What the process of a command and its workers say to each other, over a pipe or a mailbox for each worker.

    command   Begin            Item, Item, ... | NoMore                    Begin ...
    worker    Ready  Wanted, Wanted, ...  Finished, Finished, ...  Idle    ...

A worker on another node says first where it is (Placed). Between them a worker sends Counts and Log. Refused and
Failed are its last words. Ended is what the process of the command itself finds out.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from genssd.engine.common.model_choices import Role
from genssd.engine.common.usage import CacheUse, Usage
from genssd.engine.models.launches import LaunchRecord
from genssd.engine.served.record import ServerRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class PairSizes:
    """A teacher and the student of an engine, or one of them."""

    positions: Mapping[Role, int]
    vocabulary: Mapping[Role, int]
    max_sequence_length: Mapping[Role, int]
    fingerprints: Mapping[Role, str]


@dataclass(frozen=True, slots=True)
class Placed:
    """A worker runs, and has not loaded anything yet."""

    node: str
    """Address of its node."""
    pid: int
    """Number of its process on that node."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """A worker has loaded its engine."""

    pairs: Sequence[PairSizes]
    """Each of the teachers with the student, in the order of the teachers."""
    threads: int
    instruction_set: str | None
    """Instruction set of the CPU kernels; None where kernels of a GPU compute."""
    launches: LaunchRecord | None
    cache_use: CacheUse
    server: ServerRecord | None
    """The server that runs a teacher; None where none does."""


@dataclass(frozen=True, slots=True)
class Begin:
    """The work that a worker begins, as a pickle, so that one is made for all workers."""

    work: bytes


@dataclass(frozen=True, slots=True)
class Wanted:
    """A worker has room for another item."""


@dataclass(frozen=True, slots=True)
class Item:
    """An item for a worker."""

    number: int


@dataclass(frozen=True, slots=True)
class NoMore:
    """No item is left to do."""


@dataclass(frozen=True, slots=True)
class Finished:
    """A worker has finished an item."""

    number: int
    result: Any


@dataclass(frozen=True, slots=True)
class Idle:
    """A worker has ended the work, and waits for another one."""


@dataclass(frozen=True, slots=True)
class Counts:
    """What the engine of a worker has done so far."""

    usage: Usage
    cache_use: CacheUse
    server: ServerRecord | None
    """The server that runs a teacher, with what it has done for this worker."""


@dataclass(frozen=True, slots=True)
class Log:
    """A line that a worker logs."""

    level: int
    text: str


@dataclass(frozen=True, slots=True)
class Refused:
    """An error that a user has caused, for which every worker would end."""

    kind: type[Exception]
    message: str


@dataclass(frozen=True, slots=True)
class Failed:
    """Any other error, in one line: the worker ends, and another one takes its place."""

    reason: str


@dataclass(frozen=True, slots=True)
class Ended:
    """A worker has ended, and says nothing any more."""


def send(connection: Connection, message: object) -> None:
    """Send a message. Raises OSError where nobody reads any more.

    The bytes go through the pipe: torch would put tensors into shared memory, which a kill leaves behind.
    """
    connection.send_bytes(pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL))


def receive(connection: Connection) -> object:
    """Wait for a message and return it. Raises EOFError or OSError where nobody writes any more."""
    return pickle.loads(connection.recv_bytes())  # of our own processes alone
