"""The small files of the models that a command names, and the tokenizers of a teacher and a student as a pair."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from genssd.distill.doctor.settings import Settings
from genssd.engine.checkpoints.basic_config import BasicConfig
from genssd.engine.checkpoints.checkpoint import locate
from genssd.engine.checkpoints.config import load_config
from genssd.engine.common.errors import InputError
from genssd.engine.common.model_choices import Role
from genssd.engine.readers.byte_reader import find_reader
from genssd.engine.readers.pair_prompts import PairEncoder, PairPrompt
from genssd.engine.readers.reading import Reader
from genssd.engine.readers.token_map import TokenMap
from genssd.engine.setup.loading import has_own_decoder
from genssd.engine.setup.team_loading import read_alike
from genssd.engine.texts.chat_options import ChatOptions
from genssd.engine.texts.text import Prompt, Tokenizer


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
    """What the findings call the model: "teacher", "student", "teacher 2" ..."""

    @property
    def has_weights(self) -> bool:
        """Whether weight files are there: those of a hub id may not have been fetched yet."""
        return any(self.directory.glob("*.safetensors"))

    @property
    def phrase(self) -> str:
        """The title as part of a sentence: "the teacher", "teacher 2"."""
        return self.title if self.title[-1].isdigit() else f"the {self.title}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """A teacher with the student, and how the two read prompts and each other; a `PromptReaders`."""

    teacher: ModelFiles
    student: ModelFiles
    known_reader: Reader | None
    """How the student reads the teacher's tokens; None where it cannot, which is a finding of its own."""
    encoder: PairEncoder

    @property
    def reader(self) -> Reader:
        """How the student reads the teacher's tokens; by ids where it cannot read them."""
        return self.known_reader or TokenMap()

    @property
    def teachers(self) -> Sequence[Pair]:
        """This pair alone."""
        return (self,)

    @property
    def is_identity(self) -> bool:
        """Whether a token id means the same to both."""
        return self.known_reader is not None and self.known_reader.is_identity

    def tokenizer(self, model: Role) -> Tokenizer:
        """Return the tokenizer of a model."""
        return self.teacher.tokenizer if model == "teacher" else self.student.tokenizer

    def encode_pair(self, prompt: Prompt) -> PairPrompt:
        """Return a prompt as the search gives it to teacher and student. Raises InputError where one cannot read it."""
        return self.encoder.encode(prompt)


@dataclass(frozen=True, slots=True, kw_only=True)
class OneModel:
    """A model that reads prompts alone; a `PromptReaders`."""

    model: ModelFiles

    @property
    def reader(self) -> Reader:
        """There is nobody else to read: by ids."""
        return TokenMap()

    @property
    def teachers(self) -> Sequence[OneModel]:
        """This model alone."""
        return (self,)

    def tokenizer(self, model: Role) -> Tokenizer:
        """Return the tokenizer of the model, whatever its role."""
        return self.model.tokenizer

    def encode_pair(self, prompt: Prompt) -> PairPrompt:
        """Return a prompt whose two readings are those of the model."""
        ids = tuple(self.model.tokenizer.encode_prompt(prompt))
        return PairPrompt(teacher=ids, student=ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class Readers:
    """Everything that reads a command's prompts: a pair for each teacher, or one model; a `PromptReaders`."""

    teachers: tuple[Pair, ...] | tuple[OneModel, ...]

    @property
    def reader(self) -> Reader:
        """How the student reads the first teacher."""
        return self.teachers[0].reader

    def tokenizer(self, model: Role) -> Tokenizer:
        """Return the tokenizer of the first teacher, or of the student."""
        return self.teachers[0].tokenizer(model)

    def encode_pair(self, prompt: Prompt) -> PairPrompt:
        """Return a prompt as the first teacher and the student read it."""
        return self.teachers[0].encode_pair(prompt)


def open_model(
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


def make_pairs(models: Mapping[str, ModelFiles]) -> tuple[Pair, ...]:
    """Return every teacher with the student. models: by their titles; none without a teacher and a student."""
    student, teachers = models.get("student"), [model for model in models.values() if model.role == "teacher"]
    if student is None:
        return ()
    readers: list[Reader | None] = []
    for teacher in teachers:
        readers.append(None)
        with contextlib.suppress(InputError):  # a finding of its own
            readers[-1] = find_reader(teacher.tokenizer, student.tokenizer, *name_pair(teacher, student))
    known = [reader for reader in readers if reader is not None]
    if len(known) == len(readers) > 1:
        tokenizers, names = [one.tokenizer for one in teachers], [f"teacher {one.name}" for one in teachers]
        with contextlib.suppress(InputError):  # a finding of its own, too
            readers = list(read_alike(known, tokenizers, student.tokenizer, names, f"student {student.name}"))
    return tuple(
        Pair(
            teacher=teacher,
            student=student,
            known_reader=reader,
            encoder=PairEncoder(teacher.tokenizer, student.tokenizer, reader or TokenMap()),
        )
        for teacher, reader in zip(teachers, readers, strict=True)
    )


def make_readers(models: Mapping[str, ModelFiles], pairs: tuple[Pair, ...]) -> Readers | None:
    """Return what reads the prompts of a command; None where no model could be opened."""
    if pairs:
        return Readers(teachers=pairs)
    alone = tuple(OneModel(model=model) for model in models.values())
    return Readers(teachers=alone) if alone else None


def name_pair(teacher: ModelFiles, student: ModelFiles) -> tuple[str, str]:
    """Return the names of two models in messages about their tokens."""
    return f"teacher {teacher.name}", f"student {student.name}"


def render_as(model: ModelFiles, chat: ChatOptions) -> ModelFiles:
    """Return a model whose chat template renders under other options."""
    return replace(model, tokenizer=model.tokenizer.with_chat(chat))
