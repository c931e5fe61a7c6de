"""Measurement of one row of the kernel benchmarks, and the device and dtype of all of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from bench.support.device_limits import DeviceLimits, flush_cache, synchronize
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPE = torch.bfloat16 if GPU else torch.float32


def measure(
    benchmark: BenchmarkFixture,
    limits: DeviceLimits,
    run: Callable[[], object],
    *,
    group: str,
    flops: float,
    num_bytes: float,
) -> None:
    """Time run() on a cold cache and store which fraction of the device's limits it reaches.

    flops, num_bytes: operations that run() computes and bytes that it has to move.
    """

    def timed() -> None:
        run()
        synchronize(DEVICE)

    timed()
    benchmark.group = group
    benchmark.pedantic(timed, setup=lambda: flush_cache(DEVICE), rounds=20 if GPU else 5, warmup_rounds=1)
    seconds = benchmark.stats.stats.median
    benchmark.extra_info |= {
        "tflops": flops / seconds / 1e12,
        "gbps": num_bytes / seconds / 1e9,
        "share_of_matmul": flops / seconds / limits.flops,
        "share_of_copy": num_bytes / seconds / limits.bytes,
    }


def assert_close(actual: Tensor, exact: Tensor, tolerance: float) -> None:
    """Raise AssertionError unless two tensors agree up to an absolute and relative tolerance."""
    torch.testing.assert_close(actual.double(), exact.double(), atol=tolerance, rtol=tolerance)
