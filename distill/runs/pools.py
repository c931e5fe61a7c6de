"""How a command runs its models in several processes or on a cluster: the pool that follows from its options."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from genssd.distill.pool.placing import Place, check_numbers, choose_gpus, divide_cpu
from genssd.distill.pool.pool import OwnProcess, Pool
from genssd.distill.pool.processes import ProcessPool
from genssd.distill.pool.ray_cluster import RayCluster
from genssd.distill.pool.ray_options import choose_team
from genssd.distill.pool.ray_pool import RayPool
from genssd.distill.pool.remote_models import LocalTokens, RemoteModels
from genssd.distill.pool.worker import EngineRecipe
from genssd.distill.runs.clusters import hold_cluster
from genssd.distill.runs.engines import list_arguments, name_models, open_engine
from genssd.distill.runs.pool_options import PoolOptions, ProcessOptions
from genssd.distill.runs.progress import SILENT, Progress
from genssd.distill.runs.teacher_options import TeacherNames, list_teachers
from genssd.engine.checkpoints.address import is_url
from genssd.engine.checkpoints.checkpoint import fingerprint, locate
from genssd.engine.checkpoints.model_names import find_directory
from genssd.engine.common.amounts import format_bytes, format_count
from genssd.engine.common.errors import InputError
from genssd.engine.common.model_choices import Role
from genssd.engine.engine import Engine
from genssd.engine.host.threads import choose_engine_threads
from genssd.engine.readers.pair_prompts import render_with
from genssd.engine.readers.token_map import TokenMap
from genssd.engine.served.options import ServerOptions
from genssd.engine.served.teacher import find_served_tokenizer
from genssd.engine.setup.loading import choose_reader
from genssd.engine.setup.team_loading import check_teachers, read_alike
from genssd.engine.texts.chat_options import ChatOptions
from genssd.engine.texts.text import Tokenizer


@contextmanager
def open_pool(
    options: PoolOptions,
    engine: Engine | None,
    chat: ChatOptions,
    *,
    teacher: TeacherNames | None = None,
    student: str | None = None,
    items: int | None = None,
    report: Progress = SILENT,
) -> Iterator[Pool]:
    """Yield the engines that the options of a command ask for, and end their processes afterwards.

    engine: one to use instead of loading the models. items: number of things to do, where it is known. Raises
    InputError where the machine has no such devices, and the errors of `open_engine`.
    """
    names = () if teacher is None else list_teachers(teacher)
    places = choose_engine_places(options, engine, names, student, items)
    if options.ray is not None:
        with hold_cluster(options) as cluster:
            assert cluster is not None
            with _open_ray_pool(options, cluster, chat, teacher, student, items, report) as ray_pool:
                yield ray_pool
        return
    if not places:
        yield OwnProcess(open_engine(options, engine, chat, teacher=teacher, student=student, report=report))
        return
    server = _divide_server(options, names, student, len(places))
    tokens = _read_tokenizers(names, student, chat, server.get("teacher_tokenizer"))
    count = format_count(len(places), "process")
    report.begin(f"loading {name_models(teacher, student)} in {count}")
    started = time.monotonic()
    models: dict[str, Any] = {"teacher": teacher, "student": student, **server}
    recipes = [
        EngineRecipe(
            arguments={**list_arguments(options), **models, "device": place.device, "threads": place.threads},
            chat=chat,
            visible_device=place.visible_device,
            memory=place.memory,
        )
        for place in places
    ]
    with ProcessPool(RemoteModels(tokens), recipes) as pool:
        pool.open()
        report.note(_describe_loaded(pool, name_models(teacher, student), count, started))
        yield pool


@contextmanager
def _open_ray_pool(
    options: PoolOptions,
    cluster: RayCluster,
    chat: ChatOptions,
    teacher: TeacherNames | None,
    student: str | None,
    items: int | None,
    report: Progress,
) -> Iterator[Pool]:
    """Yield a pool of actors of a cluster, and end them afterwards. The arguments are those of `open_pool`."""
    names = () if teacher is None else list_teachers(teacher)
    tokens = _read_tokenizers(names, student, chat, None)
    first: dict[Role, str | None] = {"teacher": names[0] if names else None, "student": student}
    fingerprints = {role: fingerprint(locate(name)) for role, name in first.items() if name is not None}
    report.begin("reaching the Ray cluster" if cluster.address != "local" else "starting Ray here")
    ray = cluster.connect()
    team = choose_team(cluster.list_nodes(), cluster.actors, cluster.cpus, options.device, items)
    count = format_count(team.range.most, "Ray actor")
    report.begin(f"loading {name_models(teacher, student)} in {count} with {team.describe_each()} each")
    started = time.monotonic()
    models: dict[str, Any] = {
        "teacher": tuple(map(_locate_everywhere, names)) if isinstance(teacher, tuple) else _locate_everywhere(teacher),
        "student": _locate_everywhere(student),
    }
    device = "cuda" if team.gpus else "cpu"
    arguments = {**list_arguments(options), **models, "device": device, "threads": team.threads}
    recipe = EngineRecipe(arguments=arguments, chat=chat)
    with RayPool(RemoteModels(tokens), ray, recipe, team, fingerprints) as pool:
        pool.open()
        ready = format_count(len(pool.models.ready), "Ray actor")
        report.note(_describe_loaded(pool, name_models(teacher, student), ready, started))
        yield pool


def _locate_everywhere(name: str | None) -> str | None:
    """Return the name of a model as it is found from any working directory."""
    if name is None:
        return None
    directory = find_directory(name)
    return name if directory is None else os.path.abspath(directory)


def _describe_loaded(pool: ProcessPool[Engine] | RayPool[Engine], models: str, count: str, started: float) -> str:
    """Return how long the models took to load, and what the workers have together. count: of the workers, in words."""
    use = pool.models.cache_use
    return (
        f"{models} loaded in {count} in {time.monotonic() - started:.1f} s; "
        f"the caches hold {format_count(use.pages, 'page')} ({format_bytes(use.bytes)}) together; "
        f"{format_count(pool.models.threads, 'CPU thread')} in all"
    )


def _divide_server(options: PoolOptions, teachers: Sequence[str], student: str | None, count: int) -> Mapping[str, Any]:
    """Return the arguments of each of `count` engines for a teacher that a server runs; none where no server does.

    They have the same tokenizer, and its part of the requests that wait for the server at once.
    """
    url = next(filter(is_url, teachers), None)
    if url is None:
        return {}
    given = options.server_arguments()
    server: ServerOptions = given.get("server", ServerOptions())
    directory = None if student is None else locate(student)
    return {
        "teacher_tokenizer": find_served_tokenizer(url, server, given.get("teacher_tokenizer"), directory),
        "server": replace(server, in_flight=max(1, server.in_flight // count)),
    }


def _read_tokenizers(
    teachers: Sequence[str], student: str | None, chat: ChatOptions, served: Path | None
) -> list[LocalTokens]:
    """Return the tokenizers of each teacher and the student, and how the student reads; without weights.

    served: directory of the tokenizer of a teacher that is the URL of a server. Raises the errors of loading the models
    as far as tokenizers cause them.
    """
    own: dict[Role, Tokenizer] = {} if student is None else {"student": Tokenizer(locate(student))}
    if not teachers:
        return [LocalTokens(tokenizers=render_with(own, chat), reader=TokenMap())]
    check_teachers(teachers, student)
    directories = [served if served is not None and is_url(name) else locate(name) for name in teachers]
    each = [render_with({"teacher": Tokenizer(directory), **own}, chat) for directory in directories]
    if student is None:
        return [LocalTokens(tokenizers=each[0], reader=TokenMap())]
    names, own_name = [f"teacher {name}" for name in teachers], f"student {student}"
    readers = [
        choose_reader(tokenizers["teacher"], tokenizers["student"], name, own_name)
        for tokenizers, name in zip(each, names, strict=True)
    ]
    alike = read_alike(readers, [one["teacher"] for one in each], each[0]["student"], names, own_name)
    return [LocalTokens(tokenizers=one, reader=reader) for one, reader in zip(each, alike, strict=True)]


def choose_places(options: ProcessOptions, device: str | None, threads: int, items: int | None) -> list[Place]:
    """Return the places of the workers that the options ask for; none where this process does everything.

    device, threads and items: as for `divide_cpu`. Raises InputError where the machine has no such devices.
    """
    check_numbers(options.processes, options.devices)
    if options.devices is not None:
        return choose_gpus(options.devices, device, threads, items)
    if options.processes is not None:
        return divide_cpu(options.processes, device, threads, items)
    return []


def choose_engine_places(
    options: PoolOptions, engine: Engine | None, teachers: Sequence[str], student: str | None, items: int | None
) -> list[Place]:
    """Return the places of workers with an engine each. Raises InputError on options that do not go together."""
    check_numbers(options.processes, options.devices)
    set_options = [name for name in ("ray", "devices", "processes") if getattr(options, name) is not None]
    if not set_options:
        return []
    name = set_options[0]
    if len(set_options) > 1:
        raise InputError(
            f"give ray, which divides the prompts among the nodes of a cluster, or {set_options[1]}, which divides "
            "them on this machine, not both"
        )
    if engine is not None:
        raise InputError(f"{name}: an engine is given, which works in this process; leave one of them out")
    if options.ray is not None and any(map(is_url, teachers)):
        raise InputError("ray divides what models compute, and the teacher is the URL of a server; leave ray out")
    if options.ray is not None:
        return []
    places = choose_places(options, options.device, choose_engine_threads(options.threads).count, items)
    if places and student is None and all(map(is_url, teachers)):
        raise InputError(
            f"{name} divides what models compute here, and the only one is the URL of a server; leave {name} out, and "
            "raise server.in_flight where the server could do more at once"
        )
    return places
