"""The body of a worker process: an engine that does what is handed out, until nobody hands out any more."""

from __future__ import annotations

import logging
import os
import pickle
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any

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
from genssd.distill.pool.pool import Work
from genssd.distill.pool.starting import describe_error, end_with_parent
from genssd.engine.budget import Budget
from genssd.engine.chat_options import ChatOptions
from genssd.engine.engine import Engine
from genssd.engine.errors import GenssdError
from genssd.engine.machine import limit_own_memory
from genssd.engine.model_choices import Role
from genssd.engine.threads import limit_torch_threads

COUNT_INTERVAL = 0.25
"""Seconds between two reports of what a worker has done."""
GRACE = 0.05
"""Seconds for which a worker with other items waits for an answer before it goes on with them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How a worker opens its engine."""

    arguments: Mapping[str, Any]
    """Arguments of `Engine.from_pretrained`."""
    chat: ChatOptions
    visible_device: str | None = None
    """The only CUDA device that the worker sees, as in CUDA_VISIBLE_DEVICES; None changes nothing."""
    memory: int | None = None
    """Bytes of memory that the worker may take on a CPU; None for no limit of its own."""

    def open(self) -> Engine:
        """Load the models. Raises the errors of `Engine.from_pretrained`."""
        if self.visible_device is not None:  # torch has not asked for devices yet
            os.environ["CUDA_VISIBLE_DEVICES"] = self.visible_device
        if self.memory is not None:
            limit_own_memory(self.memory)
        limit_torch_threads()
        return Engine.from_pretrained(**self.arguments).with_chat(self.chat)


class Link:
    """The worker's end of the pipe: the `Feed` of its engine. Any thread may send."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._lock = threading.Lock()
        self._is_asked = False
        """Whether an item was asked for and has not come yet."""
        self._is_over = False

    def send(self, message: object) -> None:
        """Send a message. Raises OSError where the command has ended."""
        with self._lock:
            send(self._pipe, message)

    def await_work(self) -> Work[Any]:
        """Wait for the next work. Raises EOFError or OSError where there will be none."""
        message = receive(self._pipe)
        assert isinstance(message, Begin)
        self._is_asked = self._is_over = False
        work: Work[Any] = pickle.loads(message.work)
        return work

    def take(self, *, wait: bool) -> int | None:
        """Return an item that is handed out to this worker; see `Feed`."""
        if self._is_over:
            return None
        grace = 0.0
        if not self._is_asked:
            self.send(Wanted())
            self._is_asked, grace = True, GRACE
        if not wait and not self._pipe.poll(grace):
            return None
        message = receive(self._pipe)
        if isinstance(message, NoMore):
            self._is_over = True
            return None
        assert isinstance(message, Item)
        self._is_asked = False
        return message.number


def run_worker(pipe: Connection, recipe: Recipe) -> None:
    """Work for the process at the other end of the pipe until it ends or closes the pipe."""
    end_with_parent()
    link = Link(pipe)
    forward_log(link.send)
    try:
        engine = recipe.open()
        link.send(_describe(engine))
        threading.Thread(target=_report_counts, args=(engine, link), daemon=True).start()
        while True:
            work = link.await_work()
            for number, result in work.run(engine, link, Budget()):
                link.send(_count(engine))  # budgets are held to it
                link.send(Finished(number, result))
            link.send(_count(engine))
            link.send(Idle())
    except (EOFError, ConnectionError):  # the command has ended, or wants no more
        os._exit(0)
    except GenssdError as error:
        link.send(Refused(type(error), str(error)))
    except BaseException as error:
        link.send(Failed(describe_error(error)))
        logging.getLogger("genssd.worker").debug("a worker failed", exc_info=True)
    os._exit(1)


def _describe(engine: Engine) -> Ready:
    return Ready(
        pairs=[_measure(one) for one in engine.teachers],
        threads=engine.threads,
        launches=engine.launches,
        cache_use=engine.cache_use,
    )


def _measure(engine: Engine) -> PairSizes:
    roles: list[Role] = list(engine.fingerprints)
    return PairSizes(
        positions={role: engine.positions(role) for role in roles},
        vocabulary={role: engine.vocabulary(role) for role in roles},
        max_sequence_length={role: engine.max_sequence_length(role) for role in roles},
        fingerprints=engine.fingerprints,
    )


def _count(engine: Engine) -> Counts:
    return Counts(replace(engine.usage), engine.cache_use)


def _report_counts(engine: Engine, link: Link) -> None:
    """Send what the engine has done, as often as it has changed; the body of a thread."""
    pause, sent = threading.Event(), None
    while not pause.wait(COUNT_INTERVAL):
        counts = _count(engine)
        if counts != sent:
            try:
                link.send(counts)
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
