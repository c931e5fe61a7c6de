"""How a command loads its models, under its options."""

from __future__ import annotations

import time
from typing import Any

from genssd.distill.runs.engine_options import EngineOptions
from genssd.distill.runs.progress import SILENT, Progress
from genssd.distill.runs.teacher_options import TeacherNames
from genssd.engine.checkpoints.address import is_url
from genssd.engine.checkpoints.checkpoint import locate
from genssd.engine.common.amounts import format_bytes, format_count
from genssd.engine.common.model_choices import Role
from genssd.engine.engine import Engine
from genssd.engine.host.threads import announce, choose_engine_threads
from genssd.engine.readers.pair_prompts import render_with
from genssd.engine.texts.chat_options import ChatOptions
from genssd.engine.texts.text import Tokenizer


def load_engine(
    options: EngineOptions,
    *,
    teacher: TeacherNames | None = None,
    student: str | None = None,
    report: Progress = SILENT,
) -> Engine:
    """Return an engine over these models (hub ids or local directories).

    Logs the number of threads; reports how long the models took to load.
    """
    threads = choose_engine_threads(options.threads)
    report.begin(f"loading {name_models(teacher, student)}")
    started = time.monotonic()
    engine = Engine.from_pretrained(
        teacher=teacher,
        student=student,
        threads=threads.count,
        **list_arguments(options),
        **options.server_arguments(),
    )
    use = engine.cache_use
    if use.pages:
        report.note(
            f"{name_models(teacher, student)} loaded in {time.monotonic() - started:.1f} s; "
            f"the caches hold {format_count(use.pages, 'page')} ({format_bytes(use.bytes)})"
        )
        announce(threads)  # when nothing about the models can be refused any more
    return engine


def list_arguments(options: EngineOptions) -> dict[str, Any]:
    """Return the arguments of `Engine.from_pretrained` other than models, server and threads."""
    names = (
        "device", "dtype", "memory_utilization", "memory_bytes", "max_num_seqs", "deterministic", "backend",
    )  # fmt: skip
    return {name: getattr(options, name) for name in names}


def open_engine(
    options: EngineOptions,
    engine: Engine | None,
    chat: ChatOptions,
    *,
    teacher: TeacherNames | None = None,
    student: str | None = None,
    report: Progress = SILENT,
) -> Engine:
    """Return an engine that renders chats under the options: the given one, or a new one over these models.

    Raises InputError naming a variable that a chat template does not read, before any weights are loaded.
    """
    roles: tuple[Role, Role] = ("teacher", "student")
    if engine is None and any(chat.for_model(role).template_kwargs for role in roles):
        teachers = (teacher,) if teacher is None or isinstance(teacher, str) else teacher
        for one in teachers:
            names: dict[Role, str | None] = {"teacher": one, "student": student}
            here = {role: name for role, name in names.items() if name is not None and not is_url(name)}
            render_with({role: Tokenizer(locate(name)) for role, name in here.items()}, chat)
    return (engine or load_engine(options, teacher=teacher, student=student, report=report)).with_chat(chat)


def name_models(teacher: TeacherNames | None, student: str | None) -> str:
    """Return the models of an engine as part of a sentence."""
    if isinstance(teacher, tuple):
        return f"teachers {', '.join(teacher)} and student {student}"
    if teacher == student:
        return f"teacher and student {teacher}"
    names = [f"{role} {name}" for role, name in (("teacher", teacher), ("student", student)) if name is not None]
    return " and ".join(names)
