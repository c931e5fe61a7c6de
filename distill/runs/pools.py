"""How a command runs its models in several processes or on a cluster: the pool that follows from its options."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from genssd.distill.pool.placing import Place, check_numbers, choose_gpus, divide_cpu
from genssd.distill.pool.pool import OwnProcess, Pool
from genssd.distill.pool.processes import ProcessPool
from genssd.distill.pool.ray_cluster import RayCluster
from genssd.distill.pool.ray_options import choose_team
from genssd.distill.pool.ray_pool import RayPool
from genssd.distill.pool.remote_models import LocalTokens, RemoteModels
from genssd.distill.pool.worker import Recipe
from genssd.distill.runs.clusters import hold_cluster
from genssd.distill.runs.engines import list_arguments, name_models, open_engine
from genssd.distill.runs.pool_options import PoolOptions
from genssd.distill.runs.progress import SILENT, Progress
from genssd.distill.runs.teacher_options import TeacherNames, list_teachers
from genssd.engine.amounts import format_bytes, format_count
from genssd.engine.chat_options import ChatOptions
from genssd.engine.checkpoint import fingerprint, locate
from genssd.engine.engine import Engine
from genssd.engine.errors import InputError
from genssd.engine.loading import choose_reader
from genssd.engine.model_choices import Role
from genssd.engine.model_names import find_directory
from genssd.engine.pair_prompts import render_with
from genssd.engine.served.address import is_url
from genssd.engine.team_loading import check_teachers, read_alike
from genssd.engine.text import Tokenizer
from genssd.engine.threads import choose_engine_threads
from genssd.engine.token_map import TokenMap


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
    places = _choose_places(options, engine, names, items)
    if options.ray is not None:
        with hold_cluster(options) as cluster:
            assert cluster is not None
            with _open_ray_pool(options, cluster, chat, teacher, student, items, report) as ray_pool:
                yield ray_pool
        return
    if not places:
        yield OwnProcess(open_engine(options, engine, chat, teacher=teacher, student=student, report=report))
        return
    tokens = _read_tokenizers(names, student, chat)
    count = format_count(len(places), "process")
    report.begin(f"loading {name_models(teacher, student)} in {count}")
    started = time.monotonic()
    models: dict[str, Any] = {"teacher": teacher, "student": student}
    recipes = [
        Recipe(
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
    tokens = _read_tokenizers(names, student, chat)
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
    recipe = Recipe(arguments=arguments, chat=chat)
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


def _describe_loaded(pool: ProcessPool | RayPool, models: str, count: str, started: float) -> str:
    """Return how long the models took to load, and what the workers have together. count: of the workers, in words."""
    use = pool.models.cache_use
    return (
        f"{models} loaded in {count} in {time.monotonic() - started:.1f} s; "
        f"the caches hold {format_count(use.pages, 'page')} ({format_bytes(use.bytes)}) together; "
        f"{format_count(pool.models.threads, 'CPU thread')} in all"
    )


def _read_tokenizers(teachers: Sequence[str], student: str | None, chat: ChatOptions) -> list[LocalTokens]:
    """Return the tokenizers of each teacher and the student, and how the student reads; without weights.

    Raises the errors of loading the models as far as tokenizers cause them.
    """
    own: dict[Role, Tokenizer] = {} if student is None else {"student": Tokenizer(locate(student))}
    if not teachers:
        return [LocalTokens(tokenizers=render_with(own, chat), reader=TokenMap())]
    check_teachers(teachers, student)
    each = [render_with({"teacher": Tokenizer(locate(name)), **own}, chat) for name in teachers]
    if student is None:
        return [LocalTokens(tokenizers=each[0], reader=TokenMap())]
    names, own_name = [f"teacher {name}" for name in teachers], f"student {student}"
    readers = [
        choose_reader(tokenizers["teacher"], tokenizers["student"], name, own_name)
        for tokenizers, name in zip(each, names, strict=True)
    ]
    alike = read_alike(readers, [one["teacher"] for one in each], each[0]["student"], names, own_name)
    return [LocalTokens(tokenizers=one, reader=reader) for one, reader in zip(each, alike, strict=True)]


def _choose_places(
    options: PoolOptions, engine: Engine | None, teachers: Sequence[str], items: int | None
) -> list[Place]:
    """Return the places of the workers; none where this process does everything."""
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
    threads = choose_engine_threads(options.threads).count
    if options.devices is not None:
        places = choose_gpus(options.devices, options.device, threads, items)
    else:
        assert options.processes is not None
        places = divide_cpu(options.processes, options.device, threads, items)
    if places and any(map(is_url, teachers)):
        raise InputError(
            f"{name} divides what models compute here, and the teacher is the URL of a server; leave {name} out"
        )
    return places
