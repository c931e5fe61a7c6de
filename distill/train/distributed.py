"""Several processes of one training, as torchrun starts them: each takes its share of every step's examples.

replicate   every process has the whole model, gradients are summed (data parallel)
shard       weights, gradients and optimizer states are split over the processes (FSDP2)
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from genssd.distill.runs.directory import claim
from genssd.engine.errors import InputError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class World:
    """The processes of a training; one process that torchrun did not start is a world of its own."""

    rank: int
    size: int
    mesh: DeviceMesh | None
    """None where weights are not split."""

    @staticmethod
    def join(device: torch.device, *, shard: bool) -> World:
        """Join the other processes, if there are any. Raises InputError when there is nothing to split over."""
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1:
            if shard:
                raise InputError("fsdp splits a model over processes, and this is the only one: start it with torchrun")
            return World(0, 1, None)
        if not {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
            raise InputError(f"WORLD_SIZE is {size}, but torchrun has not started this process: unset it")
        if device.type == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        if not dist.is_initialized():
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
            # the group's own threads must not be left for the end of the process, which would abort
            atexit.register(dist.destroy_process_group)
        return World(dist.get_rank(), size, init_device_mesh(device.type, (size,)) if shard else None)

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files and shows the progress."""
        return self.rank == 0

    def claim(self, output_dir: Path, command: str) -> AbstractContextManager[None]:
        """The main process holds the directory for all."""
        return claim(output_dir, command) if self.is_main else nullcontext()

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            dist.barrier()

    def share(self, parts: Sequence[T]) -> list[tuple[T, bool]]:
        """This process's parts of a step, and whether each counts: all processes have equally many, the last ones may
        have to do one again for nothing, because the others wait for them in every layer."""
        rounds = -(-len(parts) // self.size)
        places = [i * self.size + self.rank for i in range(rounds)]
        return [(parts[place % len(parts)], place < len(parts)) for place in places]

    def sum(self, values: Mapping[str, float], device: torch.device) -> dict[str, float]:
        """Of every number over the processes; all have the same names."""
        if self.size == 1:
            return dict(values)
        total = torch.tensor(list(values.values()), dtype=torch.float64, device=device)
        dist.all_reduce(total)
        return dict(zip(values, total.tolist(), strict=True))

    def gather(self, mine: Sequence[T]) -> list[T]:
        """The objects of all processes, dealt round: the first of each, then the second of each, and so on."""
        if self.size == 1:
            return list(mine)
        lists: list[list[T]] = [[] for _ in range(self.size)]
        dist.all_gather_object(lists, list(mine))
        longest = max(map(len, lists))
        return [found[i] for i in range(longest) for found in lists if i < len(found)]

    def sum_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Of whole models; what is split is summed while it is computed."""
        if self.size == 1 or self.mesh is not None:
            return
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)

    @property
    def loss_factor(self) -> float:
        """FSDP2 averages gradients over the processes; ours are sums."""
        return float(self.size) if self.mesh is not None else 1.0

    def split(self, model: Any, wrapper: torch.nn.Module) -> None:
        """Split the weights of a transformers model layer by layer, and the rest at the wrapper that calls it."""
        if self.mesh is not None:
            for layer in model.base_model.layers:
                fully_shard(layer, mesh=self.mesh)
            fully_shard(wrapper, mesh=self.mesh)


def whole(value: Tensor) -> Tensor:
    """A tensor with all its parts; all processes have to call this."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def like(value: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor as this process holds the parameter."""
    if isinstance(parameter, DTensor) and value.shape == parameter.shape:
        return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
    return value
