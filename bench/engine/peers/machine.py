"""Description of the machine for a results file, without the name of the host."""

from __future__ import annotations

import platform
from importlib.metadata import version
from pathlib import Path

from genssd.engine.host.machine import available_cores


def describe_machine(threads: int) -> dict[str, object]:
    """Return the processor, its bf16 instructions, cores and threads used, and the versions of the software (Linux)."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    flags = next(line for line in lines if line.startswith("flags")).split()
    return {
        "cpu": next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")),
        "bf16": [flag for flag in ("avx512_bf16", "amx_bf16") if flag in flags],
        "cores": available_cores(),
        "threads": threads,
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "genssd": version("genssd"),
    }
