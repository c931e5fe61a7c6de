"""Timing on a CUDA device: captured graphs, whose launches cost nothing, and compilation in parallel processes."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures import wait as wait_for
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


def compile_in_parallel(
    work: Callable[[int], None], count: int, *, processes: int, timeout: float | None = None
) -> None:
    """Call work(0) to work(count - 1) in `processes` processes, so that Triton compiles on many cores at once.

    What they compile is then in Triton's cache on disk. A call that raises counts as done. timeout: seconds after which
    calls that have not begun are dropped.
    """
    with ProcessPoolExecutor(max(1, min(processes, count)), mp_context=get_context("spawn")) as pool:
        futures: list[Future[None]] = [pool.submit(work, index) for index in range(count)]
        wait_for(futures, timeout=timeout)
        for future in futures:
            future.cancel()
