"""Limits of the device: the rates of a matrix product and of a copy, measured in the run that is compared with them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

CACHE_BYTES = {"cuda": 256 << 20, "cpu": 64 << 20}
"""Bytes whose writing evicts everything else from the last-level cache, by device type."""


@dataclass(frozen=True, slots=True)
class DeviceLimits:
    """Rates that a device reaches at most."""

    flops: float
    """Operations per second of a matrix product."""
    bytes: float
    """Bytes read and written per second by a copy."""


def measure_device_limits(device: str, dtype: torch.dtype) -> DeviceLimits:
    """Time a square matrix product and a copy on a device ("cpu" or "cuda") and return their rates."""
    size = 8192 if device == "cuda" else 1024
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    source = torch.empty(1 << 30 if device == "cuda" else 1 << 27, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return DeviceLimits(
        flops=2 * size**3 / best_seconds(lambda: a @ b, device),
        bytes=2 * source.nbytes / best_seconds(lambda: target.copy_(source), device),
    )


def best_seconds(run: Callable[[], object], device: str, rounds: int = 10) -> float:
    """Return the shortest time of run() in seconds over some rounds, after one call that is not timed."""
    run()
    best = float("inf")
    for _ in range(rounds):
        synchronize(device)
        started = time.perf_counter()
        run()
        synchronize(device)
        best = min(best, time.perf_counter() - started)
    return best


def flush_cache(device: str) -> None:
    """Evict everything from the last-level cache of the device by writing other memory."""
    torch.zeros(CACHE_BYTES[device], dtype=torch.uint8, device=device)
    synchronize(device)


def synchronize(device: str) -> None:
    """Wait for a CUDA device to finish; return at once on a CPU."""
    if device == "cuda":
        torch.cuda.synchronize()
