"""Starts the tests of tests/kernels/triton in a process that interprets Triton's kernels."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

INTERPRETED = sorted(Path(__file__).with_name("triton").glob("test_*.py"))
PROCESSES = 4
"""Number of processes among which the files are divided: each one begins with seconds of imports."""


@pytest.mark.slow
@pytest.mark.parametrize("first", range(PROCESSES))
def test_kernels_in_the_interpreter(first: int) -> None:
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, INTERPRETED[first::PROCESSES])]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
