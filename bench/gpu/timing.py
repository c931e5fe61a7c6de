"""Times of calls on a GPU: from a captured graph, from the kernels that a profiler saw, or between two events.

A wall clock around a synchronised call adds 10 to 60 microseconds, more than a short kernel takes. A graph holds
several calls on different buffers, so that none of them finds its inputs in the L2 cache.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

Call = Callable[[], object]
Method = Literal["graph", "kernels", "events"]

ROUNDS_MICROSECONDS = 60_000.0
"""Time that the measured rounds of an implementation take together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Implementation:
    """One way to compute an operation."""

    calls: Sequence[Call]
    """The computation on each of several sets of inputs of the same shapes."""
    method: Method
    """graph: the calls can be captured. kernels: a call makes the host wait, so the times of its kernels are added up.
    events: a call takes milliseconds, beside which a launch does not count."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Result of a measurement."""

    microseconds: float
    """Median time of a call."""
    method: Method
    peak_mib: float
    """Memory that one call allocates at most, its results included."""


def measure(implementation: Implementation) -> Timing:
    """Time an implementation after one call on each of its inputs, which compiles what it needs."""
    calls = implementation.calls
    for call in calls:
        call()
    peak = _peak_mib(calls[0])
    time_calls = {"graph": _time_graph, "kernels": _time_kernels, "events": _time_events}[implementation.method]
    return Timing(microseconds=time_calls(calls), method=implementation.method, peak_mib=peak)


def choose_rounds(microseconds: float) -> int:
    """Return how many rounds of this length are measured: at least 5, at most 200."""
    return int(min(200.0, max(5.0, ROUNDS_MICROSECONDS / max(microseconds, 1.0))))


def _peak_mib(call: Call) -> float:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def _time_once(run: Call) -> float:
    """Return the microseconds between an event before the call and one after it."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    run()
    end.record()
    end.synchronize()
    return 1e3 * float(start.elapsed_time(end))


def _median_time(run: Call) -> float:
    first = _time_once(run)
    return statistics.median(_time_once(run) for _ in range(choose_rounds(first)))


def _time_graph(calls: Sequence[Call]) -> float:
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = [call() for call in calls]
    graph.replay()
    torch.cuda.synchronize()
    microseconds = _median_time(graph.replay) / len(calls)
    del results
    return microseconds


def _time_kernels(calls: Sequence[Call]) -> float:
    rounds = choose_rounds(_time_once(calls[0]))
    activity = torch.profiler.ProfilerActivity.CUDA
    with torch.profiler.profile(activities=[activity]) as profile:
        for i in range(rounds):
            calls[i % len(calls)]()
        torch.cuda.synchronize()
    total = sum(event.self_device_time_total for event in profile.key_averages())
    if not total:  # the profiler has no access to the device here
        return _time_events(calls)
    return float(total) / rounds


def _time_events(calls: Sequence[Call]) -> float:
    return _median_time(calls[0])
