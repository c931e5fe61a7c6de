"""The number of threads of a training on the CPU: chosen once, recorded, and taken again when it is resumed.

The rounding of torch's operators depends on it, so it is a setting like any other: `threads` in run.json and in the
trainer_state.json of every checkpoint. It follows from the cores that the process is given and the work of a forward
pass, never from how busy the machine is.
"""

from __future__ import annotations

import dataclasses

from genssd.distill.runs.journal import read_json
from genssd.distill.train.config import TrainConfig
from genssd.distill.train.distributed import World
from genssd.distill.train.resume import find_start, is_of_other_processes
from genssd.engine.checkpoints.checkpoint import locate
from genssd.engine.checkpoints.parameters import count_stored_parameters
from genssd.engine.host.threads import ThreadChoice, choose_training_threads


def fix_threads(config: TrainConfig, world: World) -> tuple[TrainConfig, ThreadChoice]:
    """Return the config with the number of threads: its own, that of the checkpoint, or one that suits the student.

    All processes take the number of the first. Also returns what decided it. Raises InputError when there is no
    checkpoint to resume from.
    """
    recorded = None if config.threads is not None else _recorded_threads(config, world)
    if recorded is not None:
        choice = ThreadChoice(count=recorded, reason="as this training was begun")
    else:
        parameters = count_stored_parameters(locate(config.model_name_or_path))
        choice = choose_training_threads(config.threads, parameters, examples=config.per_device_train_batch_size)
    choice = world.gather([choice])[0]
    return dataclasses.replace(config, threads=choice.count), choice


def _recorded_threads(config: TrainConfig, world: World) -> int | None:
    """Return the number of threads of the checkpoint that is resumed; None without one of so many processes."""
    checkpoint = find_start(config)
    settings = None if checkpoint is None else read_json(checkpoint / "trainer_state.json").get("settings")
    is_of_these = isinstance(settings, dict) and not is_of_other_processes(settings, world.size)
    threads = settings.get("threads") if isinstance(settings, dict) and is_of_these else None
    return threads if isinstance(threads, int) and threads > 0 else None  # others are refused when it is resumed
