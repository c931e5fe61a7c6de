"""The record of a run, OUTPUT_DIR/run.json: what it must hold for the run to be resumed."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from genssd.distill.runs.journal import read_json
from genssd.engine.common.errors import InputError

PACKAGES = ("genssd", "torch", "transformers")
"""Packages whose versions are recorded."""
LAUNCHES = ("source", "deterministic", "digest")
"""Keys of the kernel configurations of one engine (see engine/models/launches.py)."""


def check_directory(path: Path) -> None:
    """Raise InputError where the output directory of a run is not there."""
    if not path.is_dir():
        raise InputError(f"{path} is no directory; name the output directory of a run")


def read_record(path: Path) -> dict[str, Any]:
    """Return the record of an earlier part of a run.

    Raises InputError naming file and key where one is missing or of another type, and where a later version of genssd
    wrote it.
    """
    record = read_json(path)
    if "settings" not in record:
        raise InputError(f"{path} was written by another version of genssd: it has no settings")
    for name, (is_valid, kind) in _SCHEMA.items():
        if not is_valid(record.get(name)):
            raise InputError(
                f"{path} is damaged: {name} must be {kind}; restore the file, or choose another output_dir"
            )
    written, ours = record["versions"]["genssd"], version("genssd")
    if _numbers(written) is None or _numbers(written) > _numbers(ours):  # type: ignore[operator]
        raise InputError(
            f"{path} was written by genssd {written}, which this version ({ours}) does not know; resume with that "
            "version, or choose another output_dir"
        )
    return record


def _numbers(text: str) -> tuple[int, ...] | None:
    """Return the numbers that a version begins with, or None where it begins with none."""
    match = re.match(r"\d{1,9}(\.\d{1,9}){0,3}", text)
    return tuple(map(int, match[0].split("."))) if match else None


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_object(value: object) -> bool:
    return isinstance(value, dict)


def _are_versions(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(name), str) for name in PACKAGES)


def _are_launches(value: object) -> bool:
    if value is None:
        return True
    return isinstance(value, Mapping) and all(
        isinstance(launch, Mapping) and all(name in launch for name in LAUNCHES) for launch in value.values()
    )


def _is_text_or_missing(value: object) -> bool:
    return value is None or isinstance(value, str)


_SCHEMA: dict[str, tuple[Callable[[object], bool], str]] = {
    "command": (_is_text, "the name of a command"),
    "config": (_is_object, "an object"),
    "settings": (_is_object, "an object"),
    "versions": (_are_versions, f"an object with the versions of {', '.join(PACKAGES)}"),
    "python": (_is_text, "a version"),
    "template_date": (_is_text_or_missing, "a date"),
    "launches": (_are_launches, f"objects with {', '.join(LAUNCHES)}"),
}
