"""The device's limits, and what a results file says about where its rows were measured."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

import pytest
import torch
from bench.support.device_limits import DeviceLimits, measure_device_limits

PEERS = ("triton", "liger-kernel", "cut-cross-entropy", "trl", "transformers")


@pytest.fixture(scope="session")
def limits() -> DeviceLimits:
    gpu = torch.cuda.is_available()
    return measure_device_limits("cuda" if gpu else "cpu", torch.bfloat16 if gpu else torch.float32)


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def pytest_benchmark_update_machine_info(config: object, machine_info: dict[str, Any]) -> None:
    """Keep the processor and the versions; drop the host's name and what does not bear on a time."""
    cpu = machine_info.get("cpu", {})
    kept = {
        "cpu": cpu.get("brand_raw"),
        "cores": cpu.get("count"),
        "threads": torch.get_num_threads(),
        "system": machine_info.get("system"),
        "python": machine_info.get("python_version"),
        "torch": torch.__version__,
        "genssd": version("genssd"),
        "peers": {name: found for name in PEERS if (found := installed(name))},
    }
    if torch.cuda.is_available():
        kept["gpu"] = torch.cuda.get_device_name()
    machine_info.clear()
    machine_info.update(kept)


def pytest_benchmark_update_json(config: object, benchmarks: object, output_json: dict[str, Any]) -> None:
    """Keep the statistics of the rounds, not every round."""
    for row in output_json["benchmarks"]:
        row["stats"].pop("data", None)
