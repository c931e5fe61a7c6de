"""The config of an earlier run, from its run.json."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from genssd.distill.doctor.settings import EXAMINED
from genssd.distill.runs.directory import RECORD
from genssd.distill.runs.record import read_record
from genssd.engine.common.errors import InputError


def read_recorded(output_dir: str) -> tuple[str, Any]:
    """Return the command and the config of the run in an output directory.

    Raises InputError where there is no record, where it is damaged, and where its command is not examined.
    """
    path = Path(output_dir) / RECORD
    if not path.is_file():
        raise InputError(f"{output_dir} holds no run: it has no {RECORD}")
    record = read_record(path)
    command = record["command"]
    if command not in EXAMINED:
        raise InputError(
            f"{path}: runs of `genssd {command}` are not examined; examined are those of {', '.join(EXAMINED)}"
        )
    config = _rebuild(EXAMINED[command], record["config"], path)
    return command, dataclasses.replace(config, output_dir=output_dir)  # the directory may have been moved


def _rebuild(config_class: Any, fields: Mapping[str, Any], path: Path) -> Any:
    """Return a config from its fields as JSON has them: lists for tuples, objects for nested configs."""
    hints = typing.get_type_hints(config_class)
    values: dict[str, Any] = {}
    for name, value in fields.items():
        if name not in hints:
            raise InputError(f"{path}: {name} is no option of this version of genssd")
        parts = [hints[name], *typing.get_args(hints[name])]
        nested = next((part for part in parts if isinstance(part, type) and dataclasses.is_dataclass(part)), None)
        if nested is not None and isinstance(value, Mapping):
            values[name] = _rebuild(nested, value, path)
        else:
            values[name] = tuple(value) if isinstance(value, list) else value
    try:
        return config_class(**values)
    except TypeError as error:
        raise InputError(f"{path}: {error}") from None
