"""The parts of `genssd demo` in two processes: where two cores are given, the arms run at the same time.

The process of the command runs parts itself, and a second one takes the next part whenever it has ended one.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from types import TracebackType

from rich.console import Console
from transformers.utils import logging as transformers_logging

from genssd.distill.console import ProgressLine, describe
from genssd.distill.demo.config import DemoConfig
from genssd.distill.demo.parts import COLD_START, Arm, load_pair, run_part
from genssd.distill.evaluate.run import Evaluation
from genssd.distill.pool.messages import Failed, Log, Refused, receive, send
from genssd.distill.pool.starting import describe_end, describe_error, start_process
from genssd.distill.pool.worker import forward_log
from genssd.distill.runs.progress import Progress, Stage, measure
from genssd.engine.common.errors import GenssdError, WorkerError
from genssd.engine.engine import Engine
from genssd.engine.host.threads import ThreadChoice, announce, choose_engine_threads

TOLD = 0.5
"""Seconds between two lines in which the second process says how far it is."""
COSTS = ("selected", "post-hoc", "standard", COLD_START)
"""Parts in the order in which they are begun, those that take longest first."""


@dataclass(frozen=True, slots=True)
class Line:
    """How far the second process is, in words."""

    text: str


@dataclass(frozen=True, slots=True)
class Done:
    """The second process has ended a part."""

    result: Evaluation | Arm


@dataclass(slots=True)
class Results:
    """Results of the parts, by their names."""

    by_name: dict[str, Evaluation | Arm] = field(default_factory=dict)

    @property
    def cold_start(self) -> Evaluation:
        """Evaluation of the student before its training."""
        result = self.by_name[COLD_START]
        assert isinstance(result, Evaluation)
        return result

    def list_arms(self, names: Sequence[str]) -> list[Arm]:
        """Return the results of the arms among the parts of these names, in their order."""
        return [result for name in names if isinstance(result := self.by_name[name], Arm)]


def divide_threads(config: DemoConfig) -> tuple[DemoConfig, int]:
    """Return the config of each process, with its number of threads, and the number of processes: 1 or 2."""
    choice = choose_engine_threads(config.threads)
    if choice.count == 1:
        return config, 1
    # the models are too small to gain by a second thread, and with one the results are the same on any machine
    count = choice.count // 2 if choice.is_of_user else 1
    announce(ThreadChoice(count=count, reason=f"in each of two processes; {choice.reason}"))
    return dataclasses.replace(config, threads=count), 2


def run_parts(
    names: Sequence[str], engine: Engine, config: DemoConfig, num_processes: int, progress: Console
) -> Results:
    """Run the parts of these names, in this process or also in a second one.

    engine: the small pair in this process. config: of each process. Raises the errors of the parts, and WorkerError
    where the second process is killed or fails otherwise.
    """
    waiting = deque(sorted(names, key=COSTS.index))
    results = Results()

    def run(name: str, beside: Callable[[], str] | None = None) -> None:
        results.by_name[name] = run_part(name, engine, config, lambda title: ProgressLine(title, progress, beside))

    if num_processes == 1:
        for name in waiting:
            run(name)
        return results
    longest = waiting.popleft()  # before the other process, which has to start first, can take it
    with _SecondProcess(waiting, results, config) as second:
        run(longest, second.tell)
        with suppress(IndexError):  # the other one took the last part
            while not second.has_failed:
                run(waiting.popleft(), second.tell)
        with ProgressLine("the other process is at work", progress, second.tell):
            second.wait()
    return results


class _SecondProcess:
    """The second process, and the thread that gives it parts; a context manager, which ends it."""

    def __init__(self, waiting: deque[str], results: Results, config: DemoConfig) -> None:
        self._waiting = waiting
        self._results = results
        self._process, self._pipe = start_process(serve_parts, config)
        self._text = ""
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._hand_out, daemon=True)
        self._thread.start()

    @property
    def has_failed(self) -> bool:
        """Whether a part has failed there, or the process was killed."""
        return self._error is not None

    def tell(self) -> str:
        """Return how far the process is, in words; nothing where that is not known."""
        return self._text

    def wait(self) -> None:
        """Wait until the process has ended its parts. Raises the error of the one that failed."""
        self._thread.join()
        if self._error is not None:
            raise self._error

    def __enter__(self) -> _SecondProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.join()
        self._thread.join()
        self._pipe.close()

    def _hand_out(self) -> None:
        """Give the process one part after the other, and take what it says; the body of the thread."""
        with suppress(IndexError):
            while self._error is None:
                name = self._waiting.popleft()
                try:
                    send(self._pipe, name)
                    self._results.by_name[name] = self._take_result()
                except GenssdError as error:
                    self._error = error
                except (EOFError, OSError):
                    self._process.join()
                    self._error = WorkerError(f"the process of {name} {describe_end(self._process, None)}")
        self._text = ""

    def _take_result(self) -> Evaluation | Arm:
        """Return the result of the part that the process runs. Raises the errors of the part."""
        while True:
            message = receive(self._pipe)
            if isinstance(message, Done):
                return message.result
            if isinstance(message, Line):
                self._text = message.text
            elif isinstance(message, Log):
                logging.getLogger("genssd.demo").log(message.level, "%s", message.text)
            elif isinstance(message, Refused):
                raise message.kind(message.message)
            elif isinstance(message, Failed):
                raise WorkerError(f"the second process failed ({message.reason})")


class _Told(Progress):
    """Progress of the second process, which is sent to the first one; a context manager."""

    def __init__(self, title: str, say: Callable[[object], None]) -> None:
        self._title = title
        self._say = say
        self._stage = Stage(name="")
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._tell, daemon=True)

    def show(self, stage: Stage) -> None:
        self._stage = stage

    def __call__(self, done: float, total: float, detail: str = "") -> None:
        self._stage.done, self._stage.total, self._stage.detail = done, total, detail

    def __enter__(self) -> _Told:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped.set()
        self._thread.join()

    def _tell(self) -> None:
        """Send a line every now and then; the body of the thread."""
        with suppress(OSError):
            while not self._stopped.wait(TOLD):
                self._say(Line(describe(self._title, self._stage, measure(self._stage, time.monotonic()))))


def serve_parts(pipe: Connection, config: DemoConfig) -> None:
    """Run the parts whose names come through the pipe; the body of the second process."""
    transformers_logging.disable_progress_bar()
    lock = threading.Lock()

    def say(message: object) -> None:
        with lock:  # lines come from a thread of their own
            send(pipe, message)

    forward_log(say)
    logging.getLogger("genssd").setLevel(logging.WARNING)  # what else there is to say, the first process says as well
    try:
        engine = load_pair(config.threads)
        while True:
            name = receive(pipe)
            assert isinstance(name, str)
            say(Done(run_part(name, engine, config, lambda title: _Told(title, say))))
    except GenssdError as error:
        say(Refused(type(error), str(error)))
    except (EOFError, OSError):
        pass
    except BaseException as error:
        say(Failed(describe_error(error)))
    os._exit(1)
