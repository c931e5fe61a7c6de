"""Timing on a CUDA device between events and by the profiler; captured graphs are in genssd.kernels.gpu_timing."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch


def event_seconds(run: Callable[[], object], *, repeats: int = 5) -> float:
    """Return the median time in seconds of run() between two events, for calls that take a millisecond or more."""
    run()
    seconds: list[float] = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3)
    return statistics.median(seconds)


def kernel_microseconds(run: Callable[[], object]) -> dict[str, float]:
    """Return the time in microseconds that each kernel of one run() takes, by the name of the kernel."""
    run()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(3):
            run()
        torch.cuda.synchronize()
    return {
        event.key: event.self_device_time_total / 3 for event in profile.key_averages() if event.self_device_time_total
    }
