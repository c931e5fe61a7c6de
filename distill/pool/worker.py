"""The body of a worker: models that do what is handed out, until nobody hands out any more."""

from __future__ import annotations

import logging
import os
import pickle
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any, Generic, Protocol, TypeVar

from transformers.utils import logging as transformers_logging

from genssd.distill.pool.messages import (
    Begin,
    Counts,
    Failed,
    Finished,
    Idle,
    Item,
    Log,
    NoMore,
    PairSizes,
    Ready,
    Refused,
    Wanted,
    receive,
    send,
)
from genssd.distill.pool.placing import name_visible_variable
from genssd.distill.pool.pool import Work
from genssd.distill.pool.starting import describe_error
from genssd.engine.common.errors import GenssdError
from genssd.engine.common.model_choices import Role
from genssd.engine.engine import Engine
from genssd.engine.host.machine import limit_own_memory
from genssd.engine.host.threads import limit_torch_threads
from genssd.engine.search.budget import Budget
from genssd.engine.setup.model_facts import ModelCounts
from genssd.engine.texts.chat_options import ChatOptions
from genssd.kernels import native

COUNT_INTERVAL = 0.25
"""Seconds between two reports of what a worker has done."""
GRACE = 0.05
"""Seconds for which a worker with other items waits for an answer before it goes on with them."""


class WorkerModels(ModelCounts, Protocol):
    """What a worker reports of its models. `Engine` is one."""

    @property
    def teachers(self) -> Sequence[Engine]:
        """Engines over each of the teachers and the student; none where no engine computes."""
        ...


M_co = TypeVar("M_co", bound=WorkerModels, covariant=True)


@dataclass(frozen=True, kw_only=True)
class Recipe(ABC, Generic[M_co]):
    """How a worker opens its models. It can be pickled."""

    visible_device: str | None = None
    """The only GPU that the worker sees, by its number or UUID (placing.py); None changes nothing."""
    memory: int | None = None
    """Bytes of memory that the worker may take on a CPU; None for no limit of its own."""

    def open(self) -> M_co:
        """Load the models within what the worker is given. Raises the errors of `load`."""
        if self.visible_device is not None:  # torch has not asked for devices yet
            os.environ[name_visible_variable()] = self.visible_device
        if self.memory is not None:
            limit_own_memory(self.memory)
        limit_torch_threads()
        return self.load()

    @abstractmethod
    def load(self) -> M_co:
        """Load the models."""


@dataclass(frozen=True, kw_only=True)
class EngineRecipe(Recipe[Engine]):
    """How a worker opens an engine."""

    arguments: Mapping[str, Any]
    """Arguments of `Engine.from_pretrained`."""
    chat: ChatOptions

    def load(self) -> Engine:
        """Load the models. Raises the errors of `Engine.from_pretrained`."""
        return Engine.from_pretrained(**self.arguments).with_chat(self.chat)


class Channel(Protocol):
    """The worker's end of a connection with the process of the command."""

    def post(self, message: object) -> None:
        """Send a message. Raises OSError where the command has ended."""
        ...

    def receive(self) -> object:
        """Wait for a message and return it. Raises EOFError or OSError where the command has ended."""
        ...

    def poll(self, timeout: float) -> bool:
        """Return whether a message has arrived, after waiting for one for at most `timeout` seconds."""
        ...


class Pipe:
    """The `Channel` of a process on the same machine. Any thread may post."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._lock = threading.Lock()

    def post(self, message: object) -> None:
        """Send a message. Raises OSError where the command has ended."""
        with self._lock:
            send(self._connection, message)

    def receive(self) -> object:
        """Wait for a message and return it. Raises EOFError or OSError where the command has ended."""
        return receive(self._connection)

    def poll(self, timeout: float) -> bool:
        """Return whether a message has arrived, after waiting for one for at most `timeout` seconds."""
        return self._connection.poll(timeout)


class ItemFeed:
    """The `Feed` of a worker's engine: it asks the process of the command for every item."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._is_asked = False
        """Whether an item was asked for and has not come yet."""
        self._is_over = False

    def take(self, *, wait: bool) -> int | None:
        """Return an item that is handed out to this worker; see `Feed`."""
        if self._is_over:
            return None
        grace = 0.0
        if not self._is_asked:
            self._channel.post(Wanted())
            self._is_asked, grace = True, GRACE
        if not wait and not self._channel.poll(grace):
            return None
        message = self._channel.receive()
        if isinstance(message, NoMore):
            self._is_over = True
            return None
        assert isinstance(message, Item)
        self._is_asked = False
        return message.number


def run_worker(connection: Connection, recipe: Recipe[WorkerModels]) -> None:
    """Work for the process at the other end of the pipe until it ends or closes the pipe; the body of a process."""
    pipe = Pipe(connection)
    forward_log(pipe.post)
    os._exit(0 if serve(pipe, recipe.open) else 1)


def serve(channel: Channel, open_models: Callable[[], WorkerModels], place: str = "") -> bool:
    """Load the models and do the works that come, until the command has ended.

    place: what messages say of where the worker is. Returns False where the worker has failed, after its last words.
    """
    transformers_logging.disable_progress_bar()  # those of several processes would be written over each other
    try:
        models = open_models()
        channel.post(_describe(models))
        threading.Thread(target=_report_counts, args=(models, channel), daemon=True).start()
        while True:
            begin = channel.receive()
            assert isinstance(begin, Begin)
            work: Work[Any, Any] = pickle.loads(begin.work)
            for number, result in work.run(models, ItemFeed(channel), Budget()):
                channel.post(_count(models))  # budgets are held to it
                channel.post(Finished(number, result))
            channel.post(_count(models))
            channel.post(Idle())
    except (EOFError, ConnectionError):  # the command has ended, or wants no more
        return True
    except GenssdError as error:
        channel.post(Refused(type(error), f"{place}{error}"))
    except BaseException as error:
        channel.post(Failed(describe_error(error)))
        logging.getLogger("genssd.worker").debug("a worker failed", exc_info=True)
    return False


def _describe(models: WorkerModels) -> Ready:
    return Ready(
        pairs=[_measure(one) for one in models.teachers],
        threads=models.threads,
        instruction_set=native.instruction_set() if models.launches is None else None,
        launches=models.launches,
        cache_use=models.cache_use,
        server=models.server,
    )


def _measure(engine: Engine) -> PairSizes:
    roles: list[Role] = list(engine.fingerprints)
    return PairSizes(
        positions={role: engine.positions(role) for role in roles},
        vocabulary={role: engine.vocabulary(role) for role in roles},
        max_sequence_length={role: engine.max_sequence_length(role) for role in roles},
        fingerprints=engine.fingerprints,
    )


def _count(models: WorkerModels) -> Counts:
    return Counts(replace(models.usage), models.cache_use, models.server)


def _report_counts(models: WorkerModels, channel: Channel) -> None:
    """Send what the models have done, as often as it has changed; the body of a thread."""
    pause, sent = threading.Event(), None
    while not pause.wait(COUNT_INTERVAL):
        counts = _count(models)
        if counts != sent:
            try:
                channel.post(counts)
            except OSError:
                return
            sent = counts


def forward_log(send_message: Callable[[object], None]) -> None:
    """Send every record of our log to the process of the command, by this function, in place of all handlers."""
    log = logging.getLogger("genssd")
    log.handlers, log.propagate = [_LogHandler(send_message)], False
    log.setLevel(logging.INFO)


class _LogHandler(logging.Handler):
    """A handler that sends every record as a message."""

    def __init__(self, send_message: Callable[[object], None]) -> None:
        super().__init__()
        self._send = send_message

    def emit(self, record: logging.LogRecord) -> None:
        self._send(Log(record.levelno, record.getMessage()))
