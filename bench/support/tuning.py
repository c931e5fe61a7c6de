"""Measurement of many configurations in little time: a report with a time limit, times of kernels, and memory."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch


class Report:
    """Measurements, printed and written one JSON object per line, until a time limit."""

    def __init__(self, path: Path | None, seconds: float) -> None:
        self._file = path.open("w") if path else None
        self._started = time.monotonic()
        self._deadline = self._started + seconds

    def add(self, **values: Any) -> None:
        """Print a measurement and write it to the file."""
        rounded = {key: round(value, 4) if isinstance(value, float) else value for key, value in values.items()}
        line = json.dumps({**rounded, "at_s": round(time.monotonic() - self._started, 1)})
        print(line, flush=True)
        if self._file:
            self._file.write(line + "\n")
            self._file.flush()

    def attempt(self, run: Callable[[], object], **names: Any) -> None:
        """Call run() unless the time is over; a failure becomes a line of its own."""
        if time.monotonic() > self._deadline:
            return
        try:
            run()
        except Exception as error:
            self.add(**names, failed=f"{type(error).__name__}: {str(error)[:300]}")
            torch.cuda.empty_cache()


def kernel_times(run: Callable[[], object], most: int = 14) -> dict[str, str]:
    """Return the total microseconds and the number of calls of the longest kernels of one run, by their names.

    Kernels whose names agree in the first 70 characters are added up.
    """
    run()
    torch.cuda.synchronize()
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            run()
            torch.cuda.synchronize()
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {str(error)[:200]}"}
    totals: dict[str, tuple[float, int]] = {}
    for event in profile.key_averages():
        microseconds, count = totals.get(event.key[:70], (0.0, 0))
        totals[event.key[:70]] = microseconds + event.self_device_time_total, count + event.count
    longest = sorted(totals.items(), key=lambda item: -item[1][0])[:most]
    return {name: f"{microseconds:.1f} us x{count}" for name, (microseconds, count) in longest}


def warm(runs: Iterable[Callable[[], object]]) -> None:
    """Compile the kernels of several runs side by side; what does not compile fails again where it is timed."""

    def attempt(run: Callable[[], object]) -> None:
        try:
            run()
        except Exception as error:
            print(f"warming: {type(error).__name__}: {str(error)[:200]}", file=sys.stderr)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(attempt, runs))
    torch.cuda.synchronize()


def gibibytes_of(run: Callable[[], object]) -> float:
    """Return the peak of memory that run() allocates beyond what is allocated before it."""
    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**30
