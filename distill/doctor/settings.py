"""What the checks need to know of a command's config, in one form for all commands that are examined."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from genssd.distill.evaluate.config import EvaluateConfig
from genssd.distill.rounds.config import DistillConfig
from genssd.distill.runs.chat_settings import ChatSettings, choose_date
from genssd.distill.runs.engine_options import EngineOptions
from genssd.distill.runs.teacher_options import list_teachers
from genssd.distill.select.config import SelectConfig, SelectSettings
from genssd.distill.select.generate_config import GenerateConfig
from genssd.distill.train.config import TrainConfig, TrainSettings
from genssd.engine.common.model_choices import Role
from genssd.engine.criteria.criterion import needs_answer
from genssd.engine.criteria.criterion_names import resolve
from genssd.engine.texts.chat_options import ChatOptions

EXAMINED: dict[str, type] = {
    "select": SelectConfig,
    "train": TrainConfig,
    "distill": DistillConfig,
    "generate": GenerateConfig,
    "evaluate": EvaluateConfig,
}
"""Config classes of the commands that are examined. A config file without a command is the first one that fits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The part of a command's config that its checks read."""

    command: str | None = None
    """Name of the command; None where models alone are examined."""
    config: Any = None
    """The command's config; None without a command."""
    models: dict[Role, str] = field(default_factory=dict)
    """Hub ids or local directories by role."""
    further_teachers: tuple[str, ...] = ()
    """Hub ids, local directories or URLs of the teachers that compete with the one of `models`."""
    data: tuple[str, ...] = ()
    """Names of the data files."""
    limit: int | None = None
    """Number of rows that the command reads; None: all."""
    chat: ChatOptions = ChatOptions()
    engine: EngineOptions | None = None
    """How the command loads an engine; None where it loads none."""
    search: SelectSettings | None = None
    training: TrainSettings | None = None
    """Options of the command's training; None where it trains nothing."""
    training_processes: int = 1
    """Number of processes on a CPU that divide a step of the training, and the memory."""
    max_tokens: int | None = None
    """Maximum number of tokens in a response that the command writes; None where it writes none."""
    sequences: int = 1
    """Number of sequences per prompt that are decoded at once."""
    needs_answers: bool = False
    """Whether problems without a reference answer cannot be used, or are left out of the training."""
    needs_correct: bool = False
    """Whether rows of a training must say that their response is correct."""
    writer: Literal["both", "teacher", "student"] = "both"
    """Whose chunks of rows by two writers a training trains."""
    output_dir: str | None = None

    @property
    def reads_examples(self) -> bool:
        """Whether the data are rows to train on, and not problems."""
        return self.command == "train"


def read_settings(command: str, config: Any) -> Settings:
    """Return what the checks read of a command's config.

    Raises InputError on chat_template_kwargs, a date or a criterion that cannot be read.
    """
    date = choose_date(config)
    chat = config.make_chat_options(date) if isinstance(config, ChatSettings) and date is not None else ChatOptions()
    common = {"command": command, "config": config, "chat": chat, "output_dir": config.output_dir}
    if isinstance(config, TrainConfig):
        return Settings(
            **common,
            models=_name_models(student=config.model_name_or_path),
            data=config.data,
            training=config,
            needs_correct=config.require_correct,
            writer=config.writer,
        )
    if isinstance(config, EvaluateConfig):
        return Settings(
            **common,
            models=_name_models(student=config.model),
            data=(config.data,),
            limit=config.limit,
            engine=config,
            max_tokens=config.max_tokens,
            sequences=1 + config.samples,
            needs_answers=True,
        )
    first, *further = list_teachers(config.teacher)
    models = _name_models(teacher=first, student=config.student)
    if isinstance(config, GenerateConfig):
        return Settings(
            **common,
            models=models,
            data=(config.data,),
            limit=config.limit,
            engine=config,
            max_tokens=config.max_tokens,
            sequences=config.n,
            needs_answers=_reads_answers(config),
        )
    is_distill = isinstance(config, DistillConfig)
    search: SelectSettings = config.make_select_settings() if is_distill else config
    return Settings(
        **common,
        models=models,
        further_teachers=tuple(further),
        data=(config.data,),
        limit=None if is_distill else config.limit,
        engine=search,
        search=search,
        training=config.train if is_distill else None,
        training_processes=(config.processes or 1) if is_distill else 1,
        max_tokens=search.max_tokens,
        sequences=search.candidates * search.beam * (1 + len(further)),
        needs_answers=(is_distill and config.require_correct) or needs_answer(resolve(search.criterion)),
    )


def make_settings(models: dict[Role, str], data: tuple[str, ...], *, has_responses: bool) -> Settings:
    """Return the settings of the command that models and data are meant for, with its defaults.

    has_responses: whether the data are finished responses. Those are for a training of the student; problems are for a
    selection, or, with one model, for its evaluation or its responses. Without data no command is meant.
    """
    teacher, student = models.get("teacher"), models.get("student")
    if not data:
        return Settings(models=models)
    if has_responses and student is not None:
        settings = read_settings("train", TrainConfig(model_name_or_path=student, data=data))
        return dataclasses.replace(settings, models=models)
    if teacher is not None and student is not None:
        return read_settings("select", SelectConfig(teacher=teacher, student=student, data=data[0]))
    if teacher is not None:
        return read_settings("generate", GenerateConfig(teacher=teacher, data=data[0]))
    assert student is not None, "no model was named"
    return read_settings("evaluate", EvaluateConfig(model=student, data=data[0]))


def _reads_answers(config: GenerateConfig) -> bool:
    """Return whether the method of `generate` leaves out problems without a reference answer."""
    if config.method == "alternate":
        return needs_answer(resolve(config.alternate.criterion))
    return config.method == "relay" and config.relay.error == "answer"


def _name_models(*, teacher: str | None = None, student: str | None = None) -> dict[Role, str]:
    """Return the models that are named, by role."""
    models: dict[Role, str] = {}
    if teacher is not None:
        models["teacher"] = teacher
    if student is not None:
        models["student"] = student
    return models
