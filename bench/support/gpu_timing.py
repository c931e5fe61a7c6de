"""Timing on a CUDA device: captured graphs, whose launches cost nothing, and compilation in parallel processes."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch


def captured_seconds(runs: Sequence[Callable[[], object]], *, repeats: int = 7, per_graph: int = 10) -> float:
    """Return the median time in seconds of one run inside a captured graph.

    runs: calls that are made in turn; several of them over different memory keep the L2 cache cold. per_graph: number
    of calls in the graph. A wall clock around a short kernel would measure its launch.
    """
    for run in runs:
        run()
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for run in runs:
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    calls = [runs[i % len(runs)] for i in range(max(per_graph, len(runs)))]
    with torch.cuda.graph(graph):
        for run in calls:
            run()
    seconds: list[float] = []
    for _ in range(repeats + 1):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3)
    return statistics.median(seconds[1:]) / len(calls)


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


def compile_in_parallel(work: Callable[[int], None], count: int, *, processes: int = 14) -> None:
    """Call work(0) to work(count - 1) in processes of their own, so that Triton compiles on all cores at once.

    What they compile is then in Triton's cache on disk. A call that raises counts as done.
    """
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        for future in [pool.submit(work, index) for index in range(count)]:
            future.exception()
