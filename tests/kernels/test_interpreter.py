"""Starts the tests of tests/kernels/triton in a process that interprets Triton's kernels."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

INTERPRETED = Path(__file__).with_name("triton")
PROCESSES = 2
"""Number of processes among which the tests are divided: each one begins with seconds of imports."""


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PROCESSES))
def test_kernels_in_the_interpreter(part: int) -> None:
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "GENSSD_INTERPRETER_PART": f"{part}/{PROCESSES}"}
    environment.pop("PYTEST_ADDOPTS", None)  # -q twice would hide the number of tests
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", str(INTERPRETED)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert re.search(r"\d{2,} passed", done.stdout), done.stdout[-500:]
