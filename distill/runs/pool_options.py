"""The options of every command that can run its models in several processes or on a cluster. pools.py starts them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from genssd.distill.runs.effects import Need, Needs
from genssd.distill.runs.engine_options import EngineOptions
from genssd.distill.runs.field_kinds import Operational

_HAS_CLUSTER = Need(lambda o: o.ray is not None, "ray")


@dataclass(frozen=True, kw_only=True)  # no slots: a class derives from only one base that has them
class ProcessOptions:
    """How many processes of this machine divide the work of a command."""

    processes: Operational[int | None] = None
    """Number of processes on a CPU that divide the prompts, the threads and the memory. Each holds the models, so this
    is for models that are small beside the memory; memory and batch are those of each process. None: this process
    alone."""
    devices: Operational[str | None] = None
    """GPUs that divide the prompts, a process for each: all, or numbers such as 0,1,2. Each holds the models; memory
    and batch are those of each. None: one GPU, in this process."""


@dataclass(frozen=True, kw_only=True)  # no slots: see above
class PoolOptions(EngineOptions, ProcessOptions):
    """The options of a command that can run its engine in several processes of this machine, or on a Ray cluster."""

    NEEDS: ClassVar[Needs] = {name: _HAS_CLUSTER for name in ("ray_actors", "ray_cpus")}

    ray: Operational[str | None] = None
    """Ray cluster whose nodes divide the prompts: HOST:PORT of its head, auto for the one that this machine is part of,
    or local (which --ray alone means) for one that is started here and ends with the command. Its actors hold the
    models; memory and batch are those of each. Data are read through Ray Data where they are a directory, or
    on an object storage (s3://, gs://). It needs pip install 'genssd[ray]'. None: no cluster."""
    ray_actors: Operational[str | None] = None
    """Number of Ray actors with an engine each, or MIN:MAX, between which it follows the room that the cluster has.
    None: one for each GPU of the cluster; without GPUs one for each node."""
    ray_cpus: Operational[int | None] = None
    """Number of CPUs that each Ray actor reserves, and of threads that it computes with. None: 1 beside a GPU, else
    those of a node, divided where ray_actors asks for more actors than there are nodes."""
