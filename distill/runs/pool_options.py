"""The options of every command that can run its models in several processes. pools.py starts them."""

from __future__ import annotations

from dataclasses import dataclass

from genssd.distill.runs.engine_options import EngineOptions
from genssd.distill.runs.field_kinds import Operational


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
    """The options of a command that can run its engine in several processes of this machine."""
