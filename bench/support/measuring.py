"""How a row of the kernels' benchmarks is measured, and on what."""

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
    """Time run() on a cold cache and set the share of what the device can do beside it."""

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


def close(ours: Tensor, exact: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(ours.double(), exact.double(), atol=tolerance, rtol=tolerance)
