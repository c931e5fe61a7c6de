"""A training in several processes of this machine that a command starts itself, one for each device.

What torchrun's agent does for one machine: it holds the store over which the processes find each other, gives each its
rank, shows what they log, and ends all of them where one ends. None is started again: a training goes on from its last
checkpoint when its command is resumed.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing import connection
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

from torch.distributed import TCPStore  # type: ignore[attr-defined]  # torch does not list it

from genssd.distill.pool.messages import Failed, Log, Refused, receive
from genssd.distill.pool.placing import Place, name_visible_variable
from genssd.distill.pool.starting import describe_end, start_process
from genssd.distill.train.checkpoints import list_checkpoints
from genssd.distill.train.config import TrainConfig
from genssd.distill.train.process_body import StepTaken, Trained, run_training_process
from genssd.distill.train.trainer import Report, TrainSummary
from genssd.engine.common.errors import WorkerError

logger = logging.getLogger("genssd.train")

HOST = "127.0.0.1"
LAST_WORDS = 3.0
"""Seconds that the others have to end by themselves after one process has: the first to be heard of may only have lost
its connection to the one that failed."""


def train_in_processes(
    config: TrainConfig, places: Sequence[Place], report: Report = lambda progress: None
) -> TrainSummary:
    """Train in a process for each place, and return the summary of the training.

    config: of one process. places: all on GPUs, or all on the CPU. Raises the errors of `run_train`, and WorkerError
    where a process is killed or fails otherwise; the others have then been ended.
    """
    store = TCPStore(HOST, 0, is_master=True, wait_for_workers=False)
    with _Processes(config, places, store.port) as processes:
        return processes.watch(report)


def _list_variables(places: Sequence[Place], rank: int, port: int) -> dict[str, str]:
    """Return the variables of torchrun for a process, and the devices that all of them see."""
    size = str(len(places))
    variables = {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size,
        "MASTER_ADDR": HOST, "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True",
    }  # fmt: skip
    visible = [place.visible_device for place in places if place.visible_device is not None]
    return variables | ({name_visible_variable(): ",".join(visible)} if visible else {})


class _Processes:
    """The processes of one training; a context manager, which ends them."""

    def __init__(self, config: TrainConfig, places: Sequence[Place], port: int) -> None:
        self._output_dir = Path(config.output_dir)
        self._processes: list[BaseProcess] = []
        self._running: dict[Connection, int] = {}
        """Rank of every process that has not ended the training, by its pipe."""
        self._reasons: dict[int, str] = {}
        """Own words of the processes that failed, by rank."""
        self._refused: Refused | None = None
        self._summaries: dict[int, TrainSummary] = {}
        self._logged: set[str] = set()
        try:
            for rank, place in enumerate(places):
                arguments = (config, _list_variables(places, rank, port), place.memory)
                process, pipe = start_process(run_training_process, *arguments)
                self._processes.append(process)
                self._running[pipe] = rank
        except BaseException:
            self.__exit__()
            raise

    def watch(self, report: Report) -> TrainSummary:
        """Pass on what the processes say until all have ended the training; return the summary of the first."""
        while self._running:
            self._listen(report, None)
            if self._refused is not None or len(self._summaries) + len(self._running) < len(self._processes):
                self._raise_failure()
        return self._summaries[0]

    def __enter__(self) -> _Processes:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        for pipe in self._running:
            pipe.close()

    def _listen(self, report: Report, timeout: float | None) -> None:
        """Take a message of every process that says something, after waiting for the first one."""
        for pipe in connection.wait(list(self._running), timeout):
            assert isinstance(pipe, Connection)
            rank = self._running[pipe]
            try:
                message = receive(pipe)
            except (EOFError, OSError):
                del self._running[pipe]
                pipe.close()
                continue
            if isinstance(message, StepTaken):
                report(message.progress)
            elif isinstance(message, Log) and message.text not in self._logged:  # once, and not for every process
                self._logged.add(message.text)
                logger.log(message.level, "%s", message.text)
            elif isinstance(message, Refused):
                self._refused = self._refused or message
            elif isinstance(message, Failed):
                self._reasons[rank] = message.reason
            elif isinstance(message, Trained):
                self._summaries[rank] = message.summary
                del self._running[pipe]
                pipe.close()

    def _raise_failure(self) -> None:
        """Raise the error of the process that has ended the training: an error of the user, then who was killed."""
        until = time.monotonic() + LAST_WORDS
        while self._running and time.monotonic() < until:  # the first process may be writing what it was that failed
            self._listen(lambda progress: None, until - time.monotonic())
        if self._refused is not None:
            raise self._refused.kind(self._refused.message)
        gone = sorted({*range(len(self._processes))} - self._summaries.keys() - {*self._running.values()})
        silent = [rank for rank in gone if rank not in self._reasons]
        rank = silent[0] if silent else next(iter(self._reasons))
        process = self._processes[rank]
        with suppress(ValueError):
            process.join(LAST_WORDS)
        end = describe_end(process, self._reasons.get(rank))
        checkpoints = list_checkpoints(self._output_dir)
        further = f"from {checkpoints[-1].name}" if checkpoints else "from its beginning: it has no checkpoint yet"
        raise WorkerError(
            f"training process {rank + 1} of {len(self._processes)} {end}, and the others were ended; in "
            f"{self._output_dir} the training goes on {further}"
        )
