"""When a device waits for the host: the idle time between kernels, by the kernels around it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

NAME_LENGTH = 60
"""Number of characters by which kernels are told apart."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """A kernel or a copy on the device. Times in nanoseconds."""

    name: str
    start: int
    duration: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Gap:
    """The idle times between kernels of two names."""

    before: str
    after: str
    count: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceTime:
    """The time of a device from its first kernel to its last."""

    seconds: float
    busy_seconds: float
    gaps: Sequence[Gap]
    """Longest in all first."""
    kernels: dict[str, float]
    """Seconds by name, longest first."""


def kernels_of(profile: Any) -> list[Kernel]:
    """Return what ran on the device, from a finished torch.profiler.profile."""
    return [
        Kernel(name=event.name(), start=event.start_ns(), duration=event.duration_ns())
        for event in profile.profiler.kineto_results.events()
        if "CUDA" in str(event.device_type())
    ]


def measure_device_time(kernels: Iterable[Kernel]) -> DeviceTime:
    """Divide the time of a device into work and gaps. Kernels of several streams may run at once."""
    ordered = sorted(kernels, key=lambda kernel: kernel.start)
    first = end = ordered[0].start if ordered else 0
    before, busy = "", 0
    idle: dict[tuple[str, str], list[int]] = {}
    times: dict[str, int] = {}
    for kernel in ordered:
        name = kernel.name[:NAME_LENGTH]
        times[name] = times.get(name, 0) + kernel.duration
        if kernel.start > end:
            idle.setdefault((before, name), []).append(kernel.start - end)
        stop = kernel.start + kernel.duration
        busy += max(0, stop - max(kernel.start, end))
        if stop > end:
            end, before = stop, name
    gaps = [Gap(before=b, after=a, count=len(spans), seconds=sum(spans) / 1e9) for (b, a), spans in idle.items()]
    return DeviceTime(
        seconds=(end - first) / 1e9,
        busy_seconds=busy / 1e9,
        gaps=sorted(gaps, key=lambda gap: -gap.seconds),
        kernels={name: time / 1e9 for name, time in sorted(times.items(), key=lambda item: -item[1])},
    )
