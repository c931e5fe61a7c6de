"""How a command loads its models: the flags of every command that runs the engine."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, ClassVar

from genssd.distill.runs.effects import Need, Needs
from genssd.distill.runs.progress import SILENT, Progress
from genssd.distill.runs.settings import Operational
from genssd.engine.amounts import format_bytes, format_count
from genssd.engine.chat_options import ChatOptions
from genssd.engine.checkpoint import locate
from genssd.engine.engine import Engine
from genssd.engine.language_model import Backend
from genssd.engine.options_check import check_types
from genssd.engine.pair_prompts import render_with
from genssd.engine.runner import Role
from genssd.engine.served.address import is_url
from genssd.engine.text import Tokenizer
from genssd.engine.threads import announce, choose_engine_threads


@dataclass(frozen=True, kw_only=True)  # no slots: a class derives from only one base that has them
class EngineOptions:
    """The arguments of `Engine.from_pretrained` other than the models."""

    NEEDS: ClassVar[Needs] = {
        "memory_utilization": Need(lambda o: o.memory_bytes is None, "no memory_bytes, which replace it")
    }

    device: Operational[str | None] = None
    """Device of the models. None: CUDA where there is one, else the CPU."""
    dtype: str = "auto"
    """Data type of weights and cache. auto: the checkpoint's type, or float32 on a CPU without bf16 arithmetic."""
    memory_utilization: Operational[float] = 0.9
    """Fraction of the free memory that the KV caches take together; on a CPU less, where the computation needs more
    than the rest."""
    memory_bytes: Operational[int | None] = None
    """Size of the KV caches in bytes; if given, it replaces memory_utilization."""
    max_batch: Operational[int | None] = None
    """Maximum number of sequences decoded in one batch. None: 256 on a GPU; on a CPU 32 to 256, the fewer the larger
    the models are, and the more the more threads compute. A larger batch would hardly be faster there, and the first
    results would come later."""
    deterministic: Operational[bool] = True
    """On a GPU: take kernel configurations with which a token's bits do not depend on how many tokens are scored or
    drawn together. Otherwise the fastest for each number of tokens are taken (docs/tuning.md). On a CPU: no effect."""

    threads: Operational[int | None] = None
    """Number of CPU threads; results do not depend on it, but for the rounding of backend transformers. None:
    OMP_NUM_THREADS where it is set, else the cores that the process is given."""
    backend: Backend = "auto"
    """Who computes the models. genssd: the engine's own decoder. transformers: transformers' class of the model, which
    is slower. auto: the own decoder for every model whose model_type it knows, else transformers."""

    def __post_init__(self) -> None:
        check_types(self)

    def load(self, *, teacher: str | None = None, student: str | None = None, report: Progress = SILENT) -> Engine:
        """Return an engine over these models (hub ids or local directories).

        Logs the number of threads; reports how long the models took to load.
        """
        threads = choose_engine_threads(self.threads)
        report.begin(f"loading {name_models(teacher, student)}")
        started = time.monotonic()
        engine = Engine.from_pretrained(
            teacher=teacher,
            student=student,
            threads=threads.count,
            **self.list_arguments(),
            **self.server_arguments(),
        )
        use = engine.cache_use
        if use.pages:
            report.note(
                f"{name_models(teacher, student)} loaded in {time.monotonic() - started:.1f} s; "
                f"the caches hold {format_count(use.pages, 'page')} ({format_bytes(use.bytes)})"
            )
            announce(threads)  # when nothing about the models can be refused any more
        return engine

    def list_arguments(self) -> dict[str, Any]:
        """Return the arguments of `Engine.from_pretrained` other than models, server and threads."""
        names = (
            "device", "dtype", "memory_utilization", "memory_bytes", "max_batch", "deterministic", "backend",
        )  # fmt: skip
        return {name: getattr(self, name) for name in names}

    def server_arguments(self) -> dict[str, Any]:
        """Return the arguments of `Engine.from_pretrained` for a teacher that a server runs."""
        return {}

    def open_engine(
        self,
        engine: Engine | None,
        chat: ChatOptions,
        *,
        teacher: str | None = None,
        student: str | None = None,
        report: Progress = SILENT,
    ) -> Engine:
        """Return an engine that renders chats under the options: the given one, or a new one over these models.

        Raises InputError naming a variable that a chat template does not read, before any weights are loaded.
        """
        names: dict[Role, str | None] = {"teacher": teacher, "student": student}
        if engine is None and any(chat.for_model(role).template_kwargs for role in names):
            here = {role: name for role, name in names.items() if name is not None and not is_url(name)}
            render_with({role: Tokenizer(locate(name)) for role, name in here.items()}, chat)
        return (engine or self.load(teacher=teacher, student=student, report=report)).with_chat(chat)


def name_models(teacher: str | None, student: str | None) -> str:
    """Return the models of an engine as part of a sentence."""
    if teacher == student:
        return f"teacher and student {teacher}"
    names = [f"{role} {name}" for role, name in (("teacher", teacher), ("student", student)) if name is not None]
    return " and ".join(names)
