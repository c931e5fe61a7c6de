"""How many workers a command has, and what each is given of the machine: a device, or threads and memory of the CPU."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from genssd.engine.common.amounts import format_count
from genssd.engine.common.errors import InputError
from genssd.engine.host.machine import available_memory
from genssd.engine.setup.memory import choose_device

MAX_PROCESSES = 256
ALL = "all"
VISIBLE, VISIBLE_HIP = "CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"
"""Variables of the environment that name the devices that a process sees. ROCm reads the first one as well, but only
where the second one is not set, as SLURM sets it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """What one worker is given."""

    device: str
    """Device as the worker names it."""
    threads: int
    """Number of CPU threads that compute."""
    visible_device: str | None = None
    """The only device that the worker sees, as `name_visible_variable` names it; None on a CPU."""
    memory: int | None = None
    """Bytes of memory that it may take; None on a GPU."""

    @property
    def is_instance(self) -> bool:
        """Whether the device is a MIG instance, a part of a GPU. A process sees one, and NCCL joins none."""
        return self.visible_device is not None and self.visible_device.upper().startswith("MIG")


def name_visible_variable() -> str:
    """Return the variable by which a process is given its devices, whatever else its environment has."""
    return VISIBLE_HIP if torch.version.hip else VISIBLE


def check_numbers(processes: int | None, devices: str | None) -> None:
    """Raise InputError on options that no machine could follow."""
    if processes is not None and devices is not None:
        raise InputError("give processes, which divide a CPU, or devices, which are GPUs, not both")
    if processes is not None and not 1 <= processes <= MAX_PROCESSES:
        raise InputError(f"processes must be in 1..{MAX_PROCESSES}, not {processes}")
    if devices is not None and devices != ALL:
        numbers = devices.split(",")
        if not all(re.fullmatch(r"\s*\d{1,4}\s*", number) for number in numbers):
            raise InputError(f"devices must be all, or numbers such as 0,1,2, not {devices!r}")
        if len(set(map(int, numbers))) < len(numbers):
            raise InputError(f"devices names a device twice: {devices}")


def divide_cpu(processes: int, device: str | None, threads: int, items: int | None) -> list[Place]:
    """Return the places of workers on the CPU. No places where one process does everything.

    threads: those of all workers together. items: number of things to do, which is the largest number of workers that
    have something to do; None where it is not known. Raises InputError where the models run on a GPU.
    """
    target = choose_device(device)
    if target.type != "cpu":
        raise InputError(
            f"processes divides the cores of a CPU, and the models run on {target}: name GPUs with devices, or give "
            "device cpu"
        )
    count = processes if items is None else min(processes, max(1, items))
    if count == 1:
        return []
    memory = available_memory() // count
    return [
        Place(device="cpu", threads=max(1, threads // count + (i < threads % count)), memory=memory)
        for i in range(count)
    ]


def choose_gpus(
    devices: str, device: str | None, threads: int, items: int | None, environment: Mapping[str, str] = os.environ
) -> list[Place]:
    """Return the places of workers on GPUs, one for each device. The arguments are those of `divide_cpu`.

    MIG instances are those that CUDA_VISIBLE_DEVICES names, of which torch finds the first one alone. Raises InputError
    on devices that torch does not find.
    """
    if device not in (None, "cuda"):
        raise InputError(f"give devices or device, not both: device is {device}")
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not found:
        raise InputError("devices names GPUs, and torch finds none here; processes divides the cores of a CPU")
    variable = name_visible_variable()
    if variable not in environment:
        variable = VISIBLE
    visible = [name.strip() for name in environment.get(variable, "").split(",") if name.strip()]
    if any(name.upper().startswith("MIG") for name in visible):
        found = len(visible)
    elif visible and found > len(visible):
        raise InputError(
            f"{variable} names {format_count(len(visible), 'device')}, and torch found {found} before it did: set it "
            "before the program starts"
        )
    numbers = list(range(found)) if devices == ALL else list(map(int, devices.split(",")))
    missing = [number for number in numbers if number >= found]
    if missing:
        highest = f"0 to {found - 1}" if found > 1 else "0"
        raise InputError(f"there is no device {missing[0]}: torch finds {format_count(found, 'device')}, {highest}")
    if items is not None:
        numbers = numbers[: max(1, items)]
    return [
        Place(
            device="cuda",
            threads=max(1, threads // len(numbers)),
            visible_device=visible[number] if visible else str(number),
        )
        for number in numbers
    ]
