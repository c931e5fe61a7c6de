"""Fixture with the device's measured limits, and the description of the machine in the files of pytest-benchmark."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

import pytest
import torch
from bench.support.device_limits import DeviceLimits, measure_device_limits

PEERS = ("triton", "liger-kernel", "cut-cross-entropy", "trl", "transformers")


@pytest.fixture(scope="session")
def limits() -> DeviceLimits:
    """Return the limits of the device, measured once per session: bfloat16 on a GPU, float32 on a CPU."""
    gpu = torch.cuda.is_available()
    return measure_device_limits("cuda" if gpu else "cpu", torch.bfloat16 if gpu else torch.float32)


def installed_version(name: str) -> str | None:
    """Return the version of an installed package, or None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def pytest_benchmark_update_machine_info(config: object, machine_info: dict[str, Any]) -> None:
    """Keep the processor and the versions; drop the host's name and all that does not affect a time."""
    cpu = machine_info.get("cpu", {})
    kept = {
        "cpu": cpu.get("brand_raw"),
        "cores": cpu.get("count"),
        "threads": torch.get_num_threads(),
        "system": machine_info.get("system"),
        "python": machine_info.get("python_version"),
        "torch": torch.__version__,
        "genssd": version("genssd"),
        "peers": {name: peer_version for name in PEERS if (peer_version := installed_version(name))},
    }
    if torch.cuda.is_available():
        kept["gpu"] = torch.cuda.get_device_name()
    machine_info.clear()
    machine_info.update(kept)


def pytest_benchmark_update_json(config: object, benchmarks: object, output_json: dict[str, Any]) -> None:
    """Keep the statistics over the rounds; drop the time of every single round."""
    for row in output_json["benchmarks"]:
        row["stats"].pop("data", None)
