"""The Ray cluster of a command, from the reading of its data to the end of its engines."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Concatenate, ParamSpec, TypeVar, cast

from genssd.distill.files.cluster_files import read_with
from genssd.distill.files.ray_rows import RayRows
from genssd.distill.pool.ray_cluster import RayCluster
from genssd.distill.pool.ray_options import check_ray_options
from genssd.distill.runs.pool_options import PoolOptions

C = TypeVar("C", bound=PoolOptions)
P = ParamSpec("P")
T = TypeVar("T")

_held: ContextVar[RayCluster | None] = ContextVar("cluster", default=None)


@contextmanager
def hold_cluster(options: PoolOptions) -> Iterator[RayCluster | None]:
    """Yield the cluster that the options of a command ask for, and leave it afterwards; None where they ask for none.

    It is reached when it is first needed, and data are read through it while the block runs. Inside of another such
    block it is that block's cluster. Raises InputError on options of Ray that cannot be followed.
    """
    check_ray_options(options.ray, options.ray_actors, options.ray_cpus, options.device)
    held = _held.get()
    if options.ray is None or held is not None:
        yield None if options.ray is None else held
        return
    cluster = RayCluster(options.ray, options.ray_actors, options.ray_cpus)
    token = _held.set(cluster)
    try:
        with read_with(RayRows(cluster.connect)):
            yield cluster
    finally:
        _held.reset(token)
        cluster.close()


def on_cluster(run: Callable[Concatenate[C, P], T]) -> Callable[Concatenate[C, P], T]:
    """Let the function of a command hold the cluster that its config asks for."""

    @functools.wraps(run)
    def run_on_cluster(config: C, *arguments: P.args, **named: P.kwargs) -> T:
        with hold_cluster(config):
            return run(config, *arguments, **named)

    return cast(Callable[Concatenate[C, P], T], run_on_cluster)
