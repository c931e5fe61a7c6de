"""The inputs of the checks: the models' small files, and the first rows of the data. No weights are read.

What cannot be opened is a finding of its own; the checks that need it are then left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from genssd.distill.doctor.findings import Finding
from genssd.distill.doctor.rows import Rows, read_example_rows, read_problem_rows
from genssd.distill.doctor.settings import Settings
from genssd.engine.basic_config import BasicConfig
from genssd.engine.checkpoint import locate
from genssd.engine.config import load_config
from genssd.engine.errors import GenssdError, InputError
from genssd.engine.loading import has_own_decoder
from genssd.engine.pair_prompts import PairEncoder
from genssd.engine.runner import Role
from genssd.engine.served.address import is_url
from genssd.engine.text import Tokenizer

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
                models[role] = _open_model(role, settings.models[role], settings)
            except GenssdError as error:
                faults.append(Finding(name=f"{role}", level="error", line=str(error)))
    further = _open_further(settings, faults)
    rows, prompts = Rows(), PromptLengths()
    try:
        if settings.data and settings.reads_examples and "student" in models:
            rows = read_example_rows(settings, models["student"].tokenizer, find_max_length(settings, models), limit)
        elif settings.data and not settings.reads_examples:
            rows = read_problem_rows(settings, limit)
            prompts = _encode_prompts(rows, models)
    except GenssdError as error:
        faults.append(Finding(name="data", level="error", line=str(error)))
    return Inputs(
        settings=settings,
        models=models,
        further=further,
        rows=rows,
        prompts=prompts,
        formula_seconds=formula_seconds,
        faults=tuple(faults),
    )


def find_max_length(settings: Settings, models: Mapping[Role, ModelFiles]) -> int:
    """Return the maximum number of tokens in an example: the option max_length, or the positions of a model."""
    assert settings.training is not None
    return min(settings.training.max_length, *(model.config.max_position_embeddings for model in models.values()))


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


def _open_model(role: Role, name: str, settings: Settings) -> ModelFiles:
    """Open the small files of a model. Raises GenssdError on what cannot be used."""
    directory = locate(name, weights=False)
    config = load_config(directory)
    # a training computes in transformers; what its student is to the engine counts where the command loads one
    own = has_own_decoder(directory, settings.engine.backend if settings.engine is not None else "auto")
    tokenizer = Tokenizer(directory).with_chat(settings.chat.for_model(role))
    return ModelFiles(
        role=role, name=name, directory=directory, config=config, tokenizer=tokenizer, has_own_decoder=own
    )


def _encode_prompts(rows: Rows, models: Mapping[Role, ModelFiles]) -> PromptLengths:
    ids: dict[int, dict[Role, list[int]]] = {}
    faults: list[str] = []
    pairs = None
    if len(models) == 2:
        pairs = PairEncoder(models["teacher"].tokenizer, models["student"].tokenizer)
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
