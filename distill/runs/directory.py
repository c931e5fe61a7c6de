"""The lock on an output directory: one process at a time works in it, and it belongs to one command for good."""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from genssd.distill.runs.journal import read_json
from genssd.distill.runs.writing import TEMPORARY, make_directory
from genssd.engine.common.errors import InputError

LOCK = ".lock"
RECORD = "run.json"
ANEW = "pass --resume to go on, --overwrite to begin anew, or choose another output_dir"
"""What can be done about an output directory that holds finished work of the same command."""
NEVER_WRITTEN = (".log", ".out", ".err", ".yaml", ".yml")
"""Endings of names that no command writes: such files of the user may be in an output directory before the run."""


@contextmanager
def claim_directory(output_dir: Path, command: str) -> Iterator[None]:
    """Make the directory and hold its lock while the block runs; a crash releases the lock.

    Afterwards a directory that was made here is removed, if nothing has been written to it. Raises InputError when it
    cannot be made, belongs to a run of another command, holds files that are of no run, or another process is at work
    in it.
    """
    made: Sequence[Path] = ()
    try:
        made = make_directory(output_dir)
        lock = _open_lock(output_dir / LOCK)
    except (OSError, ValueError) as error:
        _remove_empty(made)
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise InputError(f"output_dir {output_dir} cannot be written: {reason}") from None
    try:
        if lock is None:
            raise _make_busy_error(output_dir)
        _check_owner(output_dir, command)
        yield
    finally:
        if lock is not None:
            if not (output_dir / RECORD).exists():  # nothing was recorded: leave the directory as it was
                with suppress(OSError):
                    os.unlink(output_dir / LOCK)
                _remove_empty(made)
            os.close(lock)


def check_claimable(output_dir: Path, command: str) -> None:
    """Raise InputError as `claim_directory` would of a directory that is there, and change nothing."""
    with suppress(FileNotFoundError), (output_dir / LOCK).open("rb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _make_busy_error(output_dir) from None
    _check_owner(output_dir, command)


def require_resume(config: object, held: Path) -> None:
    """Raise InputError where a config does not ask to go on with the finished work that a file or directory holds."""
    resume = getattr(config, "resume", None)  # None: the command cannot resume
    if not resume:
        remedy = "choose another output_dir" if resume is None else ANEW
        raise InputError(f"{held} holds finished work already; {remedy}")


def _make_busy_error(output_dir: Path) -> InputError:
    return InputError(f"another run is at work in {output_dir}; wait for it, or choose another output_dir")


def _open_lock(path: Path) -> int | None:
    """Return a descriptor of the locked file, or None where another process holds the lock."""
    while True:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_file(path, descriptor):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            return None
        except OSError:
            os.close(descriptor)
            raise
        os.close(descriptor)  # a process that failed has removed the file in the meantime


def _is_file(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _remove_empty(made: Sequence[Path]) -> None:
    """Remove directories, the deepest first, as far as they are empty."""
    with suppress(OSError):
        for folder in made:
            os.rmdir(folder)


def _check_owner(output_dir: Path, command: str) -> None:
    """Raise InputError where the directory belongs to a run of another command, or to nobody that we know."""
    record = output_dir / RECORD
    if os.path.lexists(record):
        owner = read_json(record).get("command")
        if not isinstance(owner, str):
            raise InputError(f"{record} is not of a run of genssd: it names no command; choose another output_dir")
        if owner != command:
            raise InputError(f"{output_dir} belongs to a run of `genssd {owner}`; choose another output_dir")
        return
    if command == "train" and any(output_dir.glob("checkpoint-*/trainer_state.json")):
        return  # copied checkpoints, which training resumes or refuses by itself
    foreign = sorted(entry.name for entry in os.scandir(output_dir) if _is_foreign(entry))
    if foreign:
        more = f" and {len(foreign) - 3} more" if len(foreign) > 3 else ""
        raise InputError(
            f"{output_dir} holds {', '.join(foreign[:3])}{more}, but no {RECORD} of a run; restore {RECORD}, or choose "
            "another output_dir"
        )


def _is_foreign(entry: os.DirEntry[str]) -> bool:
    """Return whether a file or directory is neither one that we leave before a run is recorded, nor harmless."""
    if entry.name.startswith(".") or entry.name.endswith(NEVER_WRITTEN) or entry.name == RECORD + TEMPORARY:
        return False
    try:
        status = entry.stat()
    except OSError:
        return True
    return not any(_is_stream(status, descriptor) for descriptor in (1, 2))


def _is_stream(status: os.stat_result, descriptor: int) -> bool:
    """Return whether a file is what our standard output or error is redirected to."""
    try:
        stream = os.fstat(descriptor)
    except OSError:
        return False
    return stat.S_ISREG(status.st_mode) and os.path.samestat(status, stream)
