"""The lock on an output directory: one process at a time works in it, and it belongs to one command for good."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from genssd.distill.runs.journal import read_json
from genssd.engine.errors import InputError


@contextmanager
def claim_directory(output_dir: Path, command: str) -> Iterator[None]:
    """Make the directory and hold its lock while the block runs; a crash releases the lock.

    Raises InputError when it cannot be made, belongs to a run of another command, or another process is at work in it.
    """
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        lock = (output_dir / ".lock").open("w")
    except OSError as error:
        raise InputError(f"output_dir {output_dir} cannot be written: {error.strerror}") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(
                f"another run is at work in {output_dir}; wait for it, or choose another output_dir"
            ) from None
        run = output_dir / "run.json"
        owner = read_json(run).get("command") if run.exists() else command
        if owner != command:
            raise InputError(f"{output_dir} belongs to a run of `genssd {owner}`; choose another output_dir")
        yield
