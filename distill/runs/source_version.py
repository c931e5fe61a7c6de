"""The version of genssd that runs: that of the package and, where it runs from its sources, their commit."""

from __future__ import annotations

import subprocess
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
"""Root of the sources, where genssd runs from them."""


def describe_version(root: Path = ROOT) -> str:
    """Return the version, such as "0.1.0", or "0.1.0 (commit 1a2b3c4d5e6f, changed)" in a work tree with changes."""
    commit = find_commit(root)
    return version("genssd") if commit is None else f"{version('genssd')} (commit {commit})"


def find_commit(root: Path = ROOT) -> str | None:
    """Return the first twelve digits of the commit of genssd's own sources, and whether they were changed.

    None for an installed package, also where it lies in the repository of another project, and without git.
    """
    if not ((root / ".git").exists() and (root / "csrc/CMakeLists.txt").exists()):
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty=, changed", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
