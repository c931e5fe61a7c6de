"""The bounds of pyproject.toml hold the versions that are tested: those of constraints.txt, which are installed."""

from __future__ import annotations

import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
BOUND_TO_MINOR = ("transformers", "tokenizers")
"""Packages whose minor versions change what is read from a checkpoint."""


def read_pins() -> dict[str, Version]:
    lines = (line.partition("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines())
    pairs = (line.split("==") for line in lines if line)
    return {canonicalize_name(name): Version(pinned) for name, pinned in pairs}


def read_requirements() -> dict[str, Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [text for texts in project["optional-dependencies"].values() for text in texts]
    requirements = [Requirement(text) for text in [*extras, *project["dependencies"]]]
    return {canonicalize_name(r.name): r for r in requirements if r.name != "genssd"}


@pytest.mark.source
def test_the_pins_lie_within_the_bounds() -> None:
    pins, requirements = read_pins(), read_requirements()
    assert not [str(r) for name, r in requirements.items() if not r.specifier.contains(pins[name])]


@pytest.mark.source
@pytest.mark.parametrize("name", BOUND_TO_MINOR)
def test_the_next_minor_version_is_out_of_bounds(name: str) -> None:
    pin, specifier = read_pins()[name], read_requirements()[name].specifier
    assert specifier.contains(f"{pin.major}.{pin.minor}.{pin.micro + 1}")
    assert not specifier.contains(f"{pin.major}.{pin.minor + 1}.0")
    assert not specifier.contains(f"{pin.major + 1}.0.0")
    assert not specifier.contains(f"{pin.major}.{pin.minor - 1}.0")


@pytest.mark.source
@pytest.mark.parametrize("name", [*BOUND_TO_MINOR, "torch", "safetensors", "numpy", "huggingface-hub"])
def test_what_is_installed_lies_within_the_bounds(name: str) -> None:
    installed = version(name)
    assert read_requirements()[name].specifier.contains(Version(installed).base_version)
