"""The inputs of the checks: the models' small files, and the first rows of the data. No weights are read.

What cannot be opened is a finding of its own; the checks that need it are then left out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from genssd.distill.doctor.findings import Finding
from genssd.distill.doctor.rows import Rows, read_example_rows, read_problem_rows
from genssd.distill.doctor.settings import Settings
from genssd.distill.train.models import TeacherReader, find_foreign_tokenizer
from genssd.engine.basic_config import BasicConfig
from genssd.engine.byte_reader import ByteReader, find_reader
from genssd.engine.chat_options import ChatOptions
from genssd.engine.checkpoint import locate
from genssd.engine.config import load_config
from genssd.engine.errors import GenssdError, InputError
from genssd.engine.loading import has_own_decoder
from genssd.engine.model_choices import Role
from genssd.engine.pair_prompts import PairEncoder
from genssd.engine.served.address import is_url
from genssd.engine.text import Tokenizer
from genssd.engine.token_map import TokenMap

ROLES: tuple[Role, ...] = ("teacher", "student")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFiles:
    """The small files of one model: config.json, tokenizer and chat template."""

    role: Role
    name: str
    """Hub id or local directory, as it was given."""
    directory: Path
    config: BasicConfig
    tokenizer: Tokenizer
    """Tokenizer with the command's options of rendering chats."""
    has_own_decoder: bool
    """Whether the engine's own decoder computes the model; otherwise transformers does."""
    title: str
    """What the findings call the model."""

    @property
    def has_weights(self) -> bool:
        """Whether weight files are there: those of a hub id may not have been fetched yet."""
        return any(self.directory.glob("*.safetensors"))


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptLengths:
    """The prompts of problems as token ids."""

    ids: Mapping[int, Mapping[Role, list[int]]] = field(default_factory=dict)
    """Token ids of every prompt as each model reads it, by the index of its row."""
    faults: tuple[str, ...] = ()
    """A message naming file and line for every prompt that a model cannot read."""

    def list_lengths(self) -> list[Mapping[Role, int]]:
        """Return the number of tokens of every prompt as each model reads it."""
        return [{role: len(ids) for role, ids in by_role.items()} for by_role in self.ids.values()]


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """What all checks read."""

    settings: Settings
    models: Mapping[Role, ModelFiles]
    training_teacher: ModelFiles | None = None
    """Teacher that the training loads next to the student: that of `models`, or another one. None where it has none."""
    pairs: PairEncoder | None = None
    """Encoder of prompts for both models; None without two models."""
    reader: TokenMap | ByteReader | None = None
    """How the student reads the teacher's tokens; None without two models, or where it cannot."""
    further: Mapping[str, ModelFiles] = field(default_factory=dict)
    """Teachers that compete with the first one, by "teacher 2" and so on."""
    rows: Rows = field(default_factory=Rows)
    prompts: PromptLengths = field(default_factory=PromptLengths)
    formula_seconds: float = 0.0
    """Time in seconds for trying whether reference answers that are formulas can be verified; 0: they are not tried."""
    faults: tuple[Finding, ...] = ()
    """Findings about what cannot be opened, which the command refuses with the same words, or is opened elsewhere."""

    @property
    def teacher(self) -> ModelFiles | None:
        return self.models.get("teacher")

    @property
    def student(self) -> ModelFiles | None:
        return self.models.get("student")

    def list_models(self) -> list[ModelFiles]:
        """Return all models that the command loads, each once."""
        models, further = list(self.models.values()), self.training_teacher
        return models if further is None or further in models else [*models, further]


def open_inputs(settings: Settings, limit: int, *, formula_seconds: float = 0.0) -> Inputs:
    """Open the models' files and read the first `limit` rows of the data. formula_seconds: see `Inputs`."""
    faults: list[Finding] = []
    models: dict[Role, ModelFiles] = {}
    for role in ROLES:
        if role in settings.models:
            if is_url(settings.models[role]):
                line = f"served at {settings.models[role]}: it is asked when the command begins, and not examined here"
                faults.append(Finding(name=f"{role}", level="ok", line=line))
                continue
            try:
                models[role] = _open_model(role, settings.models[role], settings, settings.chat.for_model(role))
            except GenssdError as error:
                faults.append(Finding(name=f"{role}", level="error", line=str(error)))
    opened = Inputs(
        settings=settings,
        models=models,
        training_teacher=_open_training_teacher(settings, models, faults),
        further=_open_further(settings, faults),
        formula_seconds=formula_seconds,
        **_pair(models),
    )
    rows, prompts = Rows(), PromptLengths()
    try:
        if settings.data and settings.reads_examples and opened.student is not None:
            rows = read_example_rows(
                settings,
                opened.student.tokenizer,
                limit,
                max_length=find_max_length(opened),
                teacher=_find_foreign_tokenizer(opened),
                reader=_find_training_reader(opened),
            )
        elif settings.data and not settings.reads_examples:
            rows = read_problem_rows(settings, limit)
            prompts = _encode_prompts(rows, opened)
    except GenssdError as error:
        faults.append(Finding(name="data", level="error", line=str(error)))
    return replace(opened, rows=rows, prompts=prompts, faults=tuple(faults))


def find_max_length(inputs: Inputs) -> int:
    """Return the maximum number of tokens in an example: the option max_length, or the positions of a model."""
    assert inputs.settings.training is not None
    models = [model for model in (inputs.student, inputs.training_teacher) if model is not None]
    return min(inputs.settings.training.max_length, *(model.config.max_position_embeddings for model in models))


def _open_training_teacher(
    settings: Settings, models: Mapping[Role, ModelFiles], faults: list[Finding]
) -> ModelFiles | None:
    """Return the teacher of the training; one that cannot be opened is added to the faults."""
    name = None if settings.training is None else settings.training.teacher_model_name_or_path
    if name is None or name == settings.models.get("teacher"):
        return None if name is None else models.get("teacher")
    title = "teacher of the training"
    try:
        return _open_model("teacher", name, settings, title=title)  # it renders no chats
    except GenssdError as error:
        faults.append(Finding(name=title, level="error", line=str(error)))
        return None


def _pair(models: Mapping[Role, ModelFiles]) -> dict[str, Any]:
    """Return what `Inputs` has of two models together."""
    if len(models) < 2:
        return {}
    teacher, student = models["teacher"], models["student"]
    reader: TokenMap | ByteReader | None = None
    with contextlib.suppress(InputError):  # a finding of its own
        reader = find_reader(teacher.tokenizer, student.tokenizer, *name_pair(teacher, student))
    return {"reader": reader, "pairs": PairEncoder(teacher.tokenizer, student.tokenizer, reader or TokenMap())}


def name_pair(teacher: ModelFiles, student: ModelFiles) -> tuple[str, str]:
    """Return the names of two models in messages about their tokens."""
    return f"teacher {teacher.name}", f"student {student.name}"


def _find_foreign_tokenizer(inputs: Inputs) -> Tokenizer | None:
    """Return the tokenizer by which a training's rows are read for its teacher as well; None for those of the student.

    None as well where the training refuses the teacher, which is a finding of its own.
    """
    teacher, student, training = inputs.training_teacher, inputs.student, inputs.settings.training
    if teacher is None or student is None or training is None:
        return None
    try:
        return find_foreign_tokenizer(teacher.tokenizer, student.tokenizer, training)
    except GenssdError:
        return None


def _open_further(settings: Settings, faults: list[Finding]) -> dict[str, ModelFiles]:
    """Open the small files of the teachers after the first one; add findings about those that cannot be opened."""
    further: dict[str, ModelFiles] = {}
    for number, name in enumerate(settings.further_teachers, start=2):
        label = f"teacher {number}"
        if is_url(name):
            line = f"served at {name}: it is asked when the command begins, and not examined here"
            faults.append(Finding(name=label, level="ok", line=line))
            continue
        try:
            further[label] = _open_model("teacher", name, settings)
        except GenssdError as error:
            faults.append(Finding(name=label, level="error", line=str(error)))
    return further


def _find_training_reader(inputs: Inputs) -> TeacherReader | None:
    """Return how a training's teacher reads what is trained on; None without one, or where the training refuses it."""
    teacher, student, training = inputs.training_teacher, inputs.student, inputs.settings.training
    if teacher is None or student is None or training is None:
        return None
    positions = teacher.config.max_position_embeddings
    try:
        return TeacherReader.of(teacher.tokenizer, student.tokenizer, positions, over_spans=training.is_over_spans)
    except GenssdError:
        return None


def _open_model(
    role: Role, name: str, settings: Settings, chat: ChatOptions = ChatOptions(), *, title: str | None = None
) -> ModelFiles:
    """Open the small files of a model. title: its name in findings; None for its role.

    Raises GenssdError on what cannot be used.
    """
    directory = locate(name, weights=False)
    config = load_config(directory)
    # a training computes in transformers; what its student is to the engine counts where the command loads one
    own = has_own_decoder(directory, settings.engine.backend if settings.engine is not None else "auto")
    tokenizer = Tokenizer(directory).with_chat(chat)
    return ModelFiles(
        role=role,
        name=name,
        directory=directory,
        config=config,
        tokenizer=tokenizer,
        has_own_decoder=own,
        title=title or role,
    )


def _encode_prompts(rows: Rows, inputs: Inputs) -> PromptLengths:
    ids: dict[int, dict[Role, list[int]]] = {}
    faults: list[str] = []
    models, pairs = inputs.models, inputs.pairs
    for problem in rows.problems:
        try:
            if pairs is None:
                ids[problem.index] = {role: m.tokenizer.encode_prompt(problem.prompt) for role, m in models.items()}
            else:
                pair = pairs.encode(problem.prompt)
                ids[problem.index] = {"teacher": list(pair.teacher), "student": list(pair.student)}
        except InputError as error:
            faults.append(f"{problem.where}: {error}")
    return PromptLengths(ids=ids, faults=tuple(faults))
