"""The directory of one run: claimed by one process at a time, and by one kind of run for good."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from genssd.distill.journal import read_json
from genssd.engine.errors import InputError


@contextmanager
def claim(output_dir: Path, command: str) -> Iterator[None]:
    """Make the directory and hold it while the block runs; a crash lets go of it.

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
