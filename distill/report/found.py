"""Which runs the directories hold that `genssd report` is given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from genssd.distill.runs.journal import read_json
from genssd.distill.runs.record import check_directory, read_record
from genssd.distill.select.reselect import read_selection_config
from genssd.engine.common.errors import InputError

SHOWN = ("select", "generate", "train", "evaluate")
"""Commands whose runs the page shows."""
CONTAINERS = ("distill", "demo")
"""Commands whose output directories hold runs of these."""
OWN_PAGES = {"score": "report.html", "diagnose": "diagnosis.html"}
"""Commands that write a page themselves."""
MAX_DEPTH = 3
"""Maximum number of folders between a directory and the runs that are found in it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundRun:
    """A run that the page shows."""

    path: Path
    name: str
    """Directory as the user named it, or as it lies in the one that was named."""
    command: str
    config: Mapping[str, Any]
    """Config of the command, as run.json records it."""
    is_finished: bool
    """Whether the run has written its summary; otherwise it is at work, or was interrupted."""


def find_runs(names: Sequence[str]) -> list[FoundRun]:
    """Return the runs of the named directories, in order, each once.

    Raises InputError on a directory that is not there or holds no run that the page shows.
    """
    found: dict[Path, FoundRun] = {}
    for name in names:
        path = Path(name)
        check_directory(path)
        here = _read_run(path, is_named=True)
        runs = [here] if here is not None else list(_find_below(path, MAX_DEPTH))
        if not runs:
            raise InputError(
                f"{path} holds no run: it has no run.json, and neither has a folder in it; name the output directory "
                f"of genssd {', '.join((*SHOWN, *CONTAINERS))}"
            )
        for run in runs:
            found.setdefault(run.path.resolve(), run)
    return list(found.values())


def _find_below(path: Path, depth: int) -> list[FoundRun]:
    """Return the runs in the folders of a directory; those of a training lie beside its data."""
    runs: list[FoundRun] = []
    for folder in sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.is_symlink()):
        run = _read_run(folder, is_named=False)
        runs += [] if run is None else [run]
        if depth > 1 and not folder.name.startswith("checkpoint-"):
            runs += _find_below(folder, depth - 1)
    return runs


def _read_run(path: Path, *, is_named: bool) -> FoundRun | None:
    """Return the run of a directory; None where it has none, or one that holds others.

    is_named: whether the user named this directory, so that a run which the page does not show is an error.
    """
    record = path / "run.json"
    if not record.is_file():
        return None
    command = read_json(record).get("command")
    if command in CONTAINERS:
        return None
    if command not in SHOWN:
        if not is_named:
            return None
        if command in OWN_PAGES:
            raise InputError(f"{path} is a run of genssd {command}, whose page is {path / OWN_PAGES[command]}: open it")
        if command == "reselect":
            raise InputError(
                f"{path} is a run of genssd reselect: name the run of select that it judged, and its criterion under "
                "--criteria"
            )
        raise InputError(f"{path} is a run of genssd {command}; the page shows runs of {', '.join(SHOWN)}")
    config: Mapping[str, Any] = read_selection_config(path) if command == "select" else read_record(record)["config"]
    return FoundRun(
        path=path,
        name=str(path),
        command=command,
        config=config,
        is_finished=(path / "summary.json").is_file(),
    )
