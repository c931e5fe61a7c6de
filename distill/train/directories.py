"""Directories of a training that appear as a whole: checkpoints, the best model, the final model.

A directory is written under a temporary name, and gets its own when everything in it is on disk. A directory that is
replaced or removed is renamed first. So whatever kills the process, a directory with its own name is complete; what has
another name is a leftover, which the next run removes.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from genssd.distill.runs.writing import make_directory, name_failure, replace_directory, sync_directory, sync_files

TEMPORARY, OLD = ".tmp", ".old"
"""Endings of the names of directories that are being written, and of those that are being removed."""
_LEFTOVER = re.compile(r"(?:checkpoint-\d+|best|final)\.(?:tmp|old)")


def publish_directory(temporary: Path, final: Path) -> None:
    """Give a directory its final name, in place of an earlier one of that name. Raises InputError if that fails."""
    old = final.with_name(final.name + OLD)
    if final.exists():
        _discard(old)
        with name_failure(final):
            final.rename(old)
    replace_directory(temporary, final)
    _discard(old)


def move_into(temporary: Path, directory: Path, *, last: str) -> None:
    """Move everything in a directory into another one, an entry of the name `last` at the end, and remove it.

    Entries of the same names are replaced. Raises InputError if that fails.
    """
    for folder in (temporary, *(path for path in temporary.iterdir() if path.is_dir())):
        sync_files(folder)
    with name_failure(directory):
        make_directory(directory)
        for entry in sorted(temporary.iterdir(), key=lambda path: path.name == last):
            target = directory / entry.name
            if target.is_dir():
                _discard(target)
            if entry.name == last:
                sync_directory(directory)
            os.replace(entry, target)
        sync_directory(directory)
        temporary.rmdir()


def remove_directory(path: Path) -> None:
    """Remove a directory, or a link to one, so that no incomplete one of its name is ever there."""
    old = path.with_name(path.name + OLD)
    _discard(old)
    with name_failure(path):
        path.rename(old)
        sync_directory(path.parent)
    _discard(old)


def remove_leftovers(output_dir: Path) -> None:
    """Remove the directories that a killed process has left, and give a best model its name back.

    A best model that was being replaced is kept: the step that found a better one is taken again.
    """
    best = output_dir / "best"
    if (output_dir / f"best{OLD}").exists() and not best.exists():
        (output_dir / f"best{OLD}").rename(best)
        sync_directory(output_dir)
    if output_dir.is_dir():
        for path in output_dir.iterdir():
            if _LEFTOVER.fullmatch(path.name):
                _discard(path)


def _discard(path: Path) -> None:
    with name_failure(path):
        if path.is_symlink() or path.is_file():
            path.unlink()
        elif path.exists():
            shutil.rmtree(path)
