"""What a results file says about where its rows were measured; no names of hosts."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path


def machine(threads: int) -> dict[str, object]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    flags = next(line for line in lines if line.startswith("flags")).split()
    return {
        "cpu": next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")),
        "bf16": [flag for flag in ("avx512_bf16", "amx_bf16") if flag in flags],
        "cores": os.cpu_count(),
        "threads": threads,
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "genssd": version("genssd"),
    }
