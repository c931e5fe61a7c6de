"""How a command runs its models in several processes: the flags, and the pool that follows from them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from genssd.distill.pool.placing import Place, check_numbers, choose_gpus, divide_cpu
from genssd.distill.pool.pool import OwnProcess, Pool
from genssd.distill.pool.processes import ProcessPool
from genssd.distill.pool.remote_models import RemoteModels
from genssd.distill.pool.worker import Recipe
from genssd.distill.runs.engine_options import EngineOptions, name_models
from genssd.distill.runs.progress import SILENT, Progress
from genssd.distill.runs.settings import Operational
from genssd.engine.amounts import format_bytes, format_count
from genssd.engine.chat_options import ChatOptions
from genssd.engine.checkpoint import locate
from genssd.engine.engine import Engine
from genssd.engine.errors import InputError
from genssd.engine.loading import choose_reader
from genssd.engine.pair_prompts import render_with
from genssd.engine.reading import Reader
from genssd.engine.runner import Role
from genssd.engine.served.address import is_url
from genssd.engine.text import Tokenizer
from genssd.engine.threads import choose_engine_threads
from genssd.engine.token_map import TokenMap


@dataclass(frozen=True, kw_only=True)  # no slots: a class derives from only one base that has them
class PoolOptions(EngineOptions):
    """The options of a command that can run its models in several processes of this machine."""

    processes: Operational[int | None] = None
    """Number of processes on a CPU that divide the prompts, the threads and the memory. Each holds the models, so this
    is for models that are small beside the memory. memory_bytes and max_batch are those of each process. None: this
    process alone."""
    devices: Operational[str | None] = None
    """GPUs that divide the prompts, a process for each: all, or numbers such as 0,1,2. Each holds the models;
    memory_bytes and max_batch are those of each. None: one GPU, in this process."""

    @contextmanager
    def open_pool(
        self,
        engine: Engine | None,
        chat: ChatOptions,
        *,
        teacher: str | None = None,
        student: str | None = None,
        items: int | None = None,
        report: Progress = SILENT,
    ) -> Iterator[Pool]:
        """Yield the engines that these options ask for, and end their processes afterwards.

        engine: one to use instead of loading the models. items: number of things to do, where it is known. Raises
        InputError where the machine has no such devices, and the errors of `open_engine`.
        """
        places = self._choose_places(engine, teacher, items)
        if not places:
            yield OwnProcess(self.open_engine(engine, chat, teacher=teacher, student=student, report=report))
            return
        names: dict[Role, str] = {}
        if teacher is not None:
            names["teacher"] = teacher
        if student is not None:
            names["student"] = student
        tokenizers = render_with({role: Tokenizer(locate(name)) for role, name in names.items()}, chat)
        reader: Reader = TokenMap()
        if teacher is not None and student is not None:
            reader = choose_reader(
                tokenizers["teacher"], tokenizers["student"], f"teacher {teacher}", f"student {student}"
            )
        count = format_count(len(places), "process")
        report.begin(f"loading {name_models(teacher, student)} in {count}")
        started = time.monotonic()
        recipes = [self._make_recipe(place, names, chat) for place in places]
        with ProcessPool(RemoteModels(tokenizers, reader), recipes) as pool:
            pool.open()
            use = pool.models.cache_use
            report.note(
                f"{name_models(teacher, student)} loaded in {count} in {time.monotonic() - started:.1f} s; "
                f"the caches hold {format_count(use.pages, 'page')} ({format_bytes(use.bytes)}) together; "
                f"{format_count(pool.models.threads, 'CPU thread')} in all"
            )
            yield pool

    def _choose_places(self, engine: Engine | None, teacher: str | None, items: int | None) -> list[Place]:
        """Return the places of the workers; none where this process does everything."""
        check_numbers(self.processes, self.devices)
        if self.processes is None and self.devices is None:
            return []
        name = "devices" if self.processes is None else "processes"
        if engine is not None:
            raise InputError(f"{name}: an engine is given, which works in this process; leave one of them out")
        threads = choose_engine_threads(self.threads).count
        if self.devices is not None:
            places = choose_gpus(self.devices, self.device, threads, items)
        else:
            assert self.processes is not None
            places = divide_cpu(self.processes, self.device, threads, items)
        if places and teacher is not None and is_url(teacher):
            raise InputError(
                f"{name} divides what models compute here, and the teacher is the URL of a server; leave {name} out"
            )
        return places

    def _make_recipe(self, place: Place, names: dict[Role, str], chat: ChatOptions) -> Recipe:
        arguments: dict[str, Any] = {**self.list_arguments(), "device": place.device, "threads": place.threads}
        arguments |= {str(role): name for role, name in names.items()}
        return Recipe(arguments=arguments, chat=chat, visible_device=place.visible_device, memory=place.memory)
