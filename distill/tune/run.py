"""The command `genssd tune`: the fastest kernel configurations for the user's GPU and models, kept in a file.

    genssd tune --teacher Qwen/Qwen3-8B --student Qwen/Qwen3-0.6B

Every later command on this card takes what the file holds for the shapes of its models (see kernels/tuned.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from genssd.distill.tune.config import TuneConfig
from genssd.engine.checkpoints.checkpoint import locate
from genssd.engine.checkpoints.config import ModelConfig
from genssd.engine.common.errors import InputError
from genssd.engine.models.tuning import Shape, tune_models
from genssd.engine.setup.memory import choose_device, choose_dtype
from genssd.kernels.tune_file import TuneFileError, add_entries, default_path, read_entries
from genssd.kernels.tuned import card_of, forget


@dataclass(frozen=True, slots=True, kw_only=True)
class TuneSummary:
    """What a tuning has kept. problems: number of operators times shapes."""

    path: Path
    card: str
    problems: int


def run_tune(config: TuneConfig, *, report: Callable[[str], None] = lambda line: None) -> TuneSummary:
    """Tune the kernels for the models of a config and add the winners to the tune file.

    report: receives one line per result. Raises InputError without a model, without a CUDA device, and on a tune file
    that cannot be written; CheckpointError on a model that cannot be read.
    """
    trained = [name for name in (config.model_name_or_path, config.student) if name is not None]
    if not trained and config.teacher is None:
        raise InputError("tune needs --model-name-or-path, --teacher or --student: their shapes are tuned for")
    if config.seconds <= 0:
        raise InputError(f"seconds must be above 0, not {config.seconds}")
    if not torch.cuda.is_available():
        raise InputError("tune times kernels on a CUDA device, and torch finds none")
    device = choose_device(config.device)
    if device.type != "cuda":
        raise InputError(f"tune times kernels on a CUDA device, not on {device}")
    device = torch.device("cuda", device.index or 0)
    path = default_path() if config.tune_file is None else Path(config.tune_file)

    def read_shape(name: str) -> Shape:
        directory = locate(name)
        return choose_dtype(directory, config.dtype, device), ModelConfig.load(directory)

    teacher = None if config.teacher is None else read_shape(config.teacher)
    models = [read_shape(name) for name in trained]
    try:
        read_entries(path)  # a file that cannot be used is refused before two minutes of work
        entries = tune_models(models, device, teacher=teacher, seconds=config.seconds, report=report)
        add_entries(path, card_of(device), entries)
    except TuneFileError as error:
        raise InputError(f"{error}; delete it, or name another file with --tune-file") from None
    forget()
    return TuneSummary(path=path, card=card_of(device).name, problems=len(entries))
