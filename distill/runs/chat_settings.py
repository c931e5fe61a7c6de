"""How a command renders chats: the flags of every command that does."""

from __future__ import annotations

import datetime
import json
from dataclasses import dataclass, fields, replace
from typing import Any

from genssd.engine.common.errors import InputError
from genssd.engine.common.options_check import check_types
from genssd.engine.texts.chat_options import ChatOptions

PYTHON_WORDS = {"True": True, "False": False, "None": None}
"""Values of variables as Python writes them, which JSON would not read."""


@dataclass(frozen=True, kw_only=True)  # no slots: a class derives from only one base that has them
class ChatSettings:
    """Options of the rendering of chats that apply to all models of a command."""

    system_prompt: str | None = None
    """System message of every conversation that has none of its own. Prompts that are raw text are then refused."""
    chat_template_kwargs: tuple[str, ...] = ()
    """Variables of the chat template: name=value for each (enable_thinking=false), or one JSON object."""
    template_date: str | None = None
    """Date that the chat template prints as today's, such as 2026-11-26. None: the day on which the run begins, also
    when it is resumed."""
    special_tokens_in_text: bool = False
    """Whether the names of control tokens (<|im_end|>) in questions and in messages of users, systems and tools become
    these tokens, as in transformers. Otherwise they are text."""

    def __post_init__(self) -> None:
        check_types(self)

    def make_chat_options(self, template_date: str) -> ChatOptions:
        """Return the options for the engine.

        template_date: date of the run, which replaces a field that is None. Raises InputError on variables or a date
        that cannot be read.
        """
        return ChatOptions(
            system_prompt=self.system_prompt,
            template_kwargs=parse_template_kwargs(self.chat_template_kwargs),
            date=parse_date(self.template_date or template_date),
            special_tokens_in_text=self.special_tokens_in_text,
        )


@dataclass(frozen=True, kw_only=True)  # no slots: a class derives from only one base that has them
class PairChatSettings(ChatSettings):
    """Options of the rendering of chats of a command with a teacher and a student."""

    teacher_template_kwargs: tuple[str, ...] = ()
    """Variables of the teacher's chat template alone, as chat_template_kwargs, which they replace."""
    student_template_kwargs: tuple[str, ...] = ()
    """Variables of the student's chat template alone, as chat_template_kwargs, which they replace."""

    def make_chat_options(self, template_date: str) -> ChatOptions:
        """Return the options for the engine, as `ChatSettings.make_chat_options` does."""
        return replace(
            super().make_chat_options(template_date),
            teacher_template_kwargs=parse_template_kwargs(self.teacher_template_kwargs, "teacher_template_kwargs"),
            student_template_kwargs=parse_template_kwargs(self.student_template_kwargs, "student_template_kwargs"),
        )

    def as_student_settings(self) -> dict[str, Any]:
        """Return the fields of `ChatSettings` for a command that has the student alone."""
        shared = {field.name: getattr(self, field.name) for field in fields(ChatSettings)}
        return shared | {"chat_template_kwargs": (*self.chat_template_kwargs, *self.student_template_kwargs)}


def parse_template_kwargs(words: tuple[str, ...], option: str = "chat_template_kwargs") -> dict[str, Any]:
    """Return the variables of a chat template from name=value pairs and JSON objects.

    option: name of the option, for messages. Raises InputError on other words.
    """
    variables: dict[str, Any] = {}
    for word in words:
        if word.lstrip().startswith("{"):
            try:
                variables |= json.loads(word)
            except ValueError as error:
                raise InputError(f"{option}: {word} is no JSON object: {error}") from None
            continue
        name, equals, value = word.partition("=")
        if not equals or not name.isidentifier():
            raise InputError(f"{option}: {word!r} must be name=value or a JSON object")
        try:
            variables[name] = PYTHON_WORDS[value] if value in PYTHON_WORDS else json.loads(value)
        except ValueError:
            variables[name] = value
    return variables


def parse_date(text: str) -> datetime.date:
    """Return a date that is written as 2026-11-26. Raises InputError on anything else."""
    try:
        return datetime.date.fromisoformat(text)
    except ValueError:
        raise InputError(f"template_date must be a date such as 2026-11-26, not {text!r}") from None


def choose_date(config: object, recorded: str | None = None) -> str | None:
    """Return the date that the chat templates of a run print, as text; None for a config without such a field.

    recorded: date of an earlier part of the run.
    """
    if not isinstance(config, ChatSettings):
        return None
    return config.template_date or recorded or read_clock().isoformat()


def read_clock() -> datetime.date:
    """Return today's date."""
    return datetime.date.today()
