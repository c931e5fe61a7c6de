"""The files that a command has written, as they are printed at its end."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from genssd.distill.runs.output_files import OUTPUTS


def list_outputs(command: str, directory: Path) -> Iterator[tuple[str, str]]:
    """Yield the files of a command that are in its output directory and not empty, each with what it holds."""
    for pattern, text in OUTPUTS[command].items():
        found = list(directory.glob(pattern.rstrip("/")))
        if any(path.is_dir() if pattern.endswith("/") else path.stat().st_size > 0 for path in found):
            yield pattern, text


def print_outputs(command: str, directory: str | Path) -> None:
    """Print where a command has written what."""
    print(f"written to {directory}:")
    files = list(list_outputs(command, Path(directory)))
    width = max((len(name) for name, _ in files), default=0)
    for name, text in files:
        print(f"  {name:<{width}}  {text}")
