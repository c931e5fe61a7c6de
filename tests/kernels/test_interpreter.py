"""Starts the tests of tests/kernels/triton in a process that interprets Triton's kernels."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

INTERPRETED = Path(__file__).with_name("triton")


@pytest.mark.slow
@pytest.mark.parametrize("file", sorted(path.name for path in INTERPRETED.glob("test_*.py")))
def test_kernels_in_the_interpreter(file: str) -> None:
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(INTERPRETED / file)]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
