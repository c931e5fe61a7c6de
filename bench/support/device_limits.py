"""What the device can do at most, measured in the same run as what is compared with it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

CACHE_BYTES = {"cuda": 256 << 20, "cpu": 64 << 20}


@dataclass(frozen=True, slots=True)
class DeviceLimits:
    """flops: of a bare matrix product, per second. bytes: of a copy, read and written, per second."""

    flops: float
    bytes: float


def measure_device_limits(device: str, dtype: torch.dtype) -> DeviceLimits:
    size = 8192 if device == "cuda" else 1024
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    source = torch.empty(1 << 30 if device == "cuda" else 1 << 27, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return DeviceLimits(
        flops=2 * size**3 / best_seconds(lambda: a @ b, device),
        bytes=2 * source.nbytes / best_seconds(lambda: target.copy_(source), device),
    )


def best_seconds(run: Callable[[], object], device: str, rounds: int = 10) -> float:
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
    """Fill the last-level cache with something else."""
    torch.zeros(CACHE_BYTES[device], dtype=torch.uint8, device=device)
    synchronize(device)


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
