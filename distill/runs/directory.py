"""The directory of one run: claimed by one process at a time, by one kind of run for good, with one set of settings."""

from __future__ import annotations

import fcntl
import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from genssd.distill.runs.journal import read_json, write_json
from genssd.engine.errors import InputError
from genssd.engine.runner import Role


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


def record_run(
    output_dir: Path,
    command: str,
    config: Mapping[str, Any],
    settings: Sequence[str],
    fingerprints: Mapping[Role, str],
    *,
    resumed: bool,
) -> None:
    """Write run.json: config, fingerprints of the models, versions; or check that a resumed run goes on as it began.

    settings: the names in config that must not change. Raises InputError naming the first that did.
    """
    run = {
        "command": command,
        "config": json.loads(json.dumps(config)),  # as it reads back: tuples are lists
        "fingerprints": dict(fingerprints),
        "versions": {name: version(name) for name in ("genssd", "torch", "transformers")},
        "python": platform.python_version(),
    }
    path = output_dir / "run.json"
    if not resumed:
        write_json(path, run)
        return
    before = read_json(path)
    for name in settings:
        old, new = before["config"].get(name), run["config"][name]
        if isinstance(old, dict) and isinstance(new, dict) and old != new:
            inner = next(key for key in {**old, **new} if old.get(key) != new.get(key))
            name, old, new = f"{name}.{inner}", old.get(inner), new.get(inner)
        if old != new:
            raise InputError(
                f"{output_dir} was begun with {name}={old!r}, not {new!r}; resume with the same settings, or choose "
                "another output_dir"
            )
    if before["fingerprints"] != run["fingerprints"]:
        raise InputError(f"{output_dir} was begun with other models or other weights; choose another output_dir")
