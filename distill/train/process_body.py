"""The body of a training process that a command has started, as torchrun starts one for each device.

The process gets the variables that torchrun's agent sets, and its place from `genssd.distill.pool.placing`; from there
on it is `run_train`, which joins the others (distributed.py).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection

from transformers.utils import logging as transformers_logging

from genssd.distill.pool.messages import Failed, Refused, send
from genssd.distill.pool.starting import describe_error, end_with_parent
from genssd.distill.pool.worker import forward_log
from genssd.distill.train.config import TrainConfig
from genssd.distill.train.trainer import TrainProgress, TrainSummary, run_train
from genssd.engine.common.errors import GenssdError
from genssd.engine.host.machine import limit_own_memory


@dataclass(frozen=True, slots=True)
class StepTaken:
    """The first process has taken an optimizer step."""

    progress: TrainProgress


@dataclass(frozen=True, slots=True)
class Trained:
    """A process has ended the training."""

    summary: TrainSummary


def run_training_process(
    pipe: Connection, config: TrainConfig, environment: Mapping[str, str], memory: int | None
) -> None:
    """Train with the other processes of a training, and say to the other end of the pipe what becomes of it.

    environment: variables that tell this process its place. memory: bytes that it may take on a CPU; None: no limit of
    its own.
    """
    end_with_parent()
    os.environ.update(environment)  # torch has not asked for devices yet
    if memory is not None:
        limit_own_memory(memory)
    transformers_logging.disable_progress_bar()
    forward_log(lambda message: send(pipe, message))
    try:
        send(pipe, Trained(run_train(config, report=lambda progress: send(pipe, StepTaken(progress)))))
    except GenssdError as error:
        send(pipe, Refused(type(error), str(error)))
    except BaseException as error:
        logging.getLogger("genssd.train").debug("a training process failed", exc_info=True)
        send(pipe, Failed(describe_error(error)))
    else:
        os._exit(0)
    os._exit(1)
