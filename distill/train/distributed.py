"""Several processes of one training, as torchrun starts them; each trains on a shard of every step's examples.

data parallel   every process has the full model, and gradients are summed over the processes
FSDP2           weights, gradients and optimizer states are sharded over the processes, and the weights of the teacher
"""

from __future__ import annotations

import atexit
import gc
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from genssd.distill.runs.run import Run, RunConfig
from genssd.engine.common.errors import InputError
from genssd.engine.models.transformers_loading import layers_of

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """All processes of a training, seen from one of them; without torchrun there is one process."""

    rank: int
    """Index of this process."""
    size: int
    """Number of processes."""
    device: torch.device
    """Device of this process."""
    mesh: DeviceMesh | None
    """Devices over which the weights are sharded; None: every process has the full weights."""

    @staticmethod
    def join(device: torch.device, *, fsdp: bool) -> World:
        """Join the other processes, if torchrun started several.

        Raises InputError when fsdp is set in a single process, and when WORLD_SIZE is set without torchrun.
        """
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1:
            if fsdp:
                raise InputError("fsdp splits a model over processes, and this is the only one: start it with torchrun")
            return World(rank=0, size=1, device=device, mesh=None)
        if not {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
            raise InputError(f"WORLD_SIZE is {size}, but torchrun has not started this process: unset it")
        if device.type == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        if not dist.is_initialized():
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
            # without this the process aborts at its end, because the group's threads still run
            atexit.register(_leave_group)
        mesh = init_device_mesh(device.type, (size,)) if fsdp else None
        return World(rank=dist.get_rank(), size=size, device=device, mesh=mesh)

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes files and reports progress."""
        return self.rank == 0

    def claim_run(self, config: RunConfig, command: str) -> AbstractContextManager[Run | None]:
        """Claim the output directory in the main process, on behalf of all; the others get None."""
        return Run.claim(config, command) if self.is_main else nullcontext()

    def wait(self) -> None:
        """Wait until all processes have called this."""
        if self.size > 1:
            dist.barrier()

    def shard(self, parts: Sequence[T]) -> list[tuple[T, bool]]:
        """Return the parts of a step that this process computes, each with whether it is counted.

        All processes get the same number of parts, because FSDP2 makes them wait for each other in every layer; where
        the parts do not suffice, a process gets one that another process has, and does not count it.
        """
        rounds = -(-len(parts) // self.size)
        indices = [i * self.size + self.rank for i in range(rounds)]
        return [(parts[index % len(parts)], index < len(parts)) for index in indices]

    def sum(self, values: Mapping[str, float]) -> dict[str, float]:
        """Sum every number over the processes, all of which have to pass the same names."""
        if self.size == 1:
            return dict(values)
        total = torch.tensor(list(values.values()), dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return dict(zip(values, total.tolist(), strict=True))

    def gather(self, objects: Sequence[T]) -> list[T]:
        """Return the objects of all processes: the first of every process, then the second of every process, etc."""
        if self.size == 1:
            return list(objects)
        lists: list[list[T]] = [[] for _ in range(self.size)]
        dist.all_gather_object(lists, list(objects))
        longest = max(map(len, lists))
        return [objects_of_rank[i] for i in range(longest) for objects_of_rank in lists if i < len(objects_of_rank)]

    def collect(self, work: Callable[[], T]) -> list[T]:
        """Return what the work returns in every process. Raises InputError in all of them if it does in one."""
        result: list[T] = []
        fault = None
        try:
            result = [work()]
        except InputError as error:
            fault = str(error)
        outcomes = self.gather([(result, fault)])
        for _, fault in outcomes:
            if fault is not None:
                raise InputError(fault)
        return [result for results, _ in outcomes for result in results]

    def sum_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Sum the gradients over the processes; with FSDP2 the backward pass has done so already."""
        if self.size == 1 or self.mesh is not None:
            return
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)

    @property
    def loss_factor(self) -> float:
        """Factor of the loss that makes gradients sums over the processes: FSDP2 averages them."""
        return float(self.size) if self.mesh is not None else 1.0

    @property
    def loading_device(self) -> torch.device:
        """Device on which models are loaded: where their weights are to be sharded, the memory of the host.

        So a device never holds more than its shards and one layer.
        """
        return self.device if self.mesh is None else torch.device("cpu")

    def shard_weights(self, model: Any, wrapper: torch.nn.Module) -> None:
        """Shard the weights of a transformers model layer by layer, and its other weights with the wrapper module.

        The wrapper's forward pass gathers the weights that are in no layer; they stay until the end of the backward
        pass or, where there is none, until `reshard`.
        """
        if self.mesh is not None:
            for layer in layers_of(model):
                fully_shard(layer, mesh=self.mesh)
            fully_shard(wrapper, mesh=self.mesh, reshard_after_forward=False)


def reshard(wrapper: torch.nn.Module) -> None:
    """Free the gathered weights of a sharded module that no backward pass frees; other modules are left alone.

    Until then the parameters of the module are the gathered ones, which the optimizer does not know.
    """
    if isinstance(wrapper, FSDPModule):
        wrapper.reshard()


def _leave_group() -> None:
    """Leave the process group, once what is left of a sharded model no longer holds it."""
    gc.collect()
    dist.destroy_process_group()


def gather_shards(value: Tensor) -> Tensor:
    """Return the full tensor of one that may be sharded; every process has to call this."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def shard_like(value: Tensor, parameter: Tensor) -> Tensor:
    """Shard a full tensor in the way the parameter is sharded; one that is sharded already is returned as it is."""
    if isinstance(parameter, DTensor) and not isinstance(value, DTensor):
        return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
    return value
