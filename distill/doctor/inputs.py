"""The inputs of the checks: the models' small files, and the first rows of the data. No weights are read.

What cannot be opened is a finding of its own; the checks that need it are then left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from genssd.distill.doctor.findings import Finding
from genssd.distill.doctor.model_files import ModelFiles, Pair, make_pairs, make_readers, open_model, render_as
from genssd.distill.doctor.rows import Rows, read_example_rows, read_problem_rows
from genssd.distill.doctor.settings import Settings
from genssd.distill.select.unfit import PromptCheck
from genssd.distill.train.models import TeacherReader, find_foreign_tokenizer
from genssd.engine.checkpoints.address import is_url
from genssd.engine.common.errors import GenssdError, InputError
from genssd.engine.common.model_choices import Role

ROLES: tuple[Role, ...] = ("teacher", "student")


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptLengths:
    """The prompts of problems as token ids."""

    ids: Mapping[int, Mapping[str, list[int]]] = field(default_factory=dict)
    """Token ids of every prompt as each model reads it, by the index of its row and the model's title."""
    faults: tuple[str, ...] = ()
    """A message naming file and line for every prompt that the models cannot use."""

    def list_lengths(self) -> list[Mapping[str, int]]:
        """Return the number of tokens of every prompt as each model reads it, by the model's title."""
        return [{title: len(ids) for title, ids in by_title.items()} for by_title in self.ids.values()]


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """What all checks read."""

    settings: Settings
    models: Mapping[str, ModelFiles]
    """Models that read the prompts or write, by their titles: "teacher", "student", and "teacher 2" and so on for
    teachers that compete with the first one."""
    training_teacher: ModelFiles | None = None
    """Teacher that the training loads next to the student: that of `models`, or another one. None where it has none."""
    is_foreign: bool = False
    """Whether the training's teacher has another tokenizer than the student, and renders the chats of the rows."""
    pairs: tuple[Pair, ...] = ()
    """Every teacher of `models` with the student; none without both."""
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

    def list_chat_models(self) -> list[ModelFiles]:
        """Return all models whose chat templates render the command's messages, each once."""
        return self.list_models() if self.is_foreign else list(self.models.values())


def open_inputs(settings: Settings, limit: int, *, formula_seconds: float = 0.0) -> Inputs:
    """Open the models' files and read the first `limit` rows of the data. formula_seconds: see `Inputs`."""
    faults: list[Finding] = []
    models = _open_models(settings, faults)
    opened = Inputs(settings=settings, models=models, formula_seconds=formula_seconds, pairs=make_pairs(models))
    opened = _add_training_teacher(opened, faults)
    rows, prompts = Rows(), PromptLengths()
    try:
        if settings.data and settings.reads_examples and opened.student is not None:
            rows = read_examples(opened, settings.data, limit)
        elif settings.data and not settings.reads_examples:
            rows = read_problem_rows(settings, limit)
            prompts = _encode_prompts(rows, opened)
    except GenssdError as error:
        faults.append(Finding(name="data", level="error", line=str(error)))
    return replace(opened, rows=rows, prompts=prompts, faults=tuple(faults))


def read_examples(inputs: Inputs, files: Sequence[str], limit: int, *, is_held_out: bool = False) -> Rows:
    """Return the first rows of data files to train on, as the training will read them. is_held_out: of eval_data.

    Raises InputError on a file that cannot be read.
    """
    assert inputs.student is not None, "the student could not be opened"
    foreign = inputs.training_teacher if inputs.is_foreign else None
    return read_example_rows(
        files,
        inputs.settings,
        inputs.student.tokenizer,
        limit,
        max_length=find_max_length(inputs),
        teacher=None if foreign is None else foreign.tokenizer,
        reader=_find_training_reader(inputs),
        is_held_out=is_held_out,
    )


def find_max_length(inputs: Inputs) -> int:
    """Return the maximum number of tokens in an example: the option max_length, or the positions of a model."""
    assert inputs.settings.training is not None
    models = [model for model in (inputs.student, inputs.training_teacher) if model is not None]
    return min(inputs.settings.training.max_length, *(model.config.max_position_embeddings for model in models))


def _open_models(settings: Settings, faults: list[Finding]) -> dict[str, ModelFiles]:
    """Open the small files of the models by their titles; add findings about those that cannot be opened."""
    names: list[tuple[str, Role, str]] = [
        (role, role, settings.models[role]) for role in ROLES if role in settings.models
    ]
    names += [(f"teacher {number}", "teacher", name) for number, name in enumerate(settings.further_teachers, start=2)]
    models: dict[str, ModelFiles] = {}
    for title, role, name in names:
        if is_url(name):
            line = f"served at {name}: it is asked when the command begins, and not examined here"
            faults.append(Finding(name=title, level="ok", line=line))
            continue
        try:
            models[title] = open_model(role, name, settings, settings.chat.for_model(role), title=title)
        except GenssdError as error:
            faults.append(Finding(name=title, level="error", line=str(error)))
    return models


def _add_training_teacher(inputs: Inputs, faults: list[Finding]) -> Inputs:
    """Return the inputs with the teacher of the training; one that cannot be opened is added to the faults.

    One that reads the student's ids renders no chats; another one renders those of the rows under the student's
    options. None is foreign where the training refuses it, which is a finding of its own.
    """
    training, settings = inputs.settings.training, inputs.settings
    name = None if training is None else training.teacher_model_name_or_path
    if training is None or name is None:
        return inputs
    title = "teacher" if settings.reads_examples else "teacher of the training"
    try:
        is_known = name == settings.models.get("teacher")
        teacher = inputs.teacher if is_known else open_model("teacher", name, settings, title=title)
    except GenssdError as error:
        faults.append(Finding(name=title, level="error", line=str(error)))
        return inputs
    if teacher is None or inputs.student is None or not settings.reads_examples:
        return replace(inputs, training_teacher=teacher)
    try:
        if find_foreign_tokenizer(teacher.tokenizer, inputs.student.tokenizer, training) is None:
            return replace(inputs, training_teacher=teacher)
        teacher = render_as(teacher, inputs.student.tokenizer.chat.options)
    except GenssdError:
        return replace(inputs, training_teacher=teacher)
    return replace(inputs, training_teacher=teacher, is_foreign=True)


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


def _encode_prompts(rows: Rows, inputs: Inputs) -> PromptLengths:
    """Return the prompts of the problems as the command will encode them for every model."""
    readers = make_readers(inputs.models, inputs.pairs)
    if readers is None:
        return PromptLengths()
    pairs = inputs.pairs
    roles = ROLES if pairs else (next(iter(inputs.models.values())).role,)
    check = PromptCheck(readers, roles)
    ids: dict[int, dict[str, list[int]]] = {}
    faults: list[str] = []
    for problem in rows.problems:
        try:
            each = check.encode(problem.prompt)
            fault = check.find_unreadable(each) or check.find_disagreement(problem.prompt)
        except InputError as error:
            fault = str(error)
        if fault is not None:
            faults.append(f"{problem.where}: {fault}")
            continue
        if pairs:
            by_title = {pair.teacher.title: list(one["teacher"]) for pair, one in zip(pairs, each, strict=True)}
            ids[problem.index] = {**by_title, "student": list(each[0]["student"])}
        else:
            ids[problem.index] = {title: list(one[roles[0]]) for title, one in zip(inputs.models, each, strict=True)}
    return PromptLengths(ids=ids, faults=tuple(faults))
