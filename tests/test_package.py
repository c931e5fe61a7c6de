"""The package as it is installed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import genssd


def test_importing_genssd_loads_neither_torch_nor_the_core() -> None:
    code = "import sys, genssd; genssd.__version__; print([m for m in ('torch', 'genssd._core') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_public_names_resolve() -> None:
    for name in genssd.__all__:
        assert getattr(genssd, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Enginee'"):
        _ = genssd.Enginee


@pytest.mark.source
def test_the_stub_of_the_core_is_up_to_date(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[1]
    made = tmp_path / "_core.pyi"
    command = [sys.executable, "-m", "nanobind.stubgen", "-q", "-m", "genssd._core", "-o", str(made)]
    subprocess.run(command, check=True, capture_output=True)
    assert made.read_text() == (root / "src/genssd/_core.pyi").read_text()
