"""What `genssd doctor` examines: a command with its flags, a config file, a run, or models and data by themselves."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from genssd.distill.doctor.config import DoctorConfig
from genssd.distill.doctor.recorded import read_recorded
from genssd.distill.doctor.rows import has_responses
from genssd.distill.doctor.settings import EXAMINED, Settings, make_settings, read_settings
from genssd.distill.runs.field_kinds import expand_home
from genssd.engine.common.errors import InputError
from genssd.engine.common.model_choices import Role
from genssd.flags import read_config
from genssd.yaml_files import load_yaml


def read_examined(config: DoctorConfig, words: Sequence[str]) -> Settings:
    """Return the settings of what is examined. words: a command and its flags, or none.

    Raises InputError on flags or files that cannot be read, and where nothing or several things are named.
    """
    models: dict[Role, str] = {}
    if config.teacher is not None:
        models["teacher"] = config.teacher
    if config.student is not None:
        models["student"] = config.student
    named = {
        "a command": bool(words),
        "--config": config.config is not None,
        "--run": config.run is not None,
        "models": bool(models or config.data),
    }
    given = [name for name, is_given in named.items() if is_given]
    if len(given) != 1:
        ways = "a command with its flags, --config, --run, or models with --teacher, --student and --data"
        raise InputError(f"doctor examines one of {ways}, not {' and '.join(given) or 'nothing'}")
    if words:
        return _read_command(words[0], words[1:])
    if config.config is not None:
        command = config.command or _find_command(Path(config.config))
        return _read_command(command, ["--config", config.config])
    if config.run is not None:
        command, recorded = read_recorded(config.run)
        is_resumed = hasattr(recorded, "resume")  # what is examined is going on with the run
        return read_settings(command, dataclasses.replace(recorded, resume=True) if is_resumed else recorded)
    if not models:
        raise InputError("doctor needs the models that the data are for: give --teacher, --student or both")
    return make_settings(models, config.data, has_responses=bool(config.data) and has_responses(config.data[0]))


def _read_command(command: str, flags: Sequence[str]) -> Settings:
    if command not in EXAMINED:
        raise InputError(f"doctor does not examine `genssd {command}`; it examines {', '.join(EXAMINED)}")
    return read_settings(command, expand_home(read_config(command, flags, EXAMINED[command])))


def _find_command(path: Path) -> str:
    """Return the first command that has all keys of a config file; where none has, the one with most of them."""
    fields = load_yaml(path)
    keys = fields.keys() if isinstance(fields, Mapping) else set()
    for command, config_class in EXAMINED.items():
        if keys <= config_class.__dataclass_fields__.keys():  # type: ignore[attr-defined]
            return command
    return max(EXAMINED, key=lambda name: len(keys & EXAMINED[name].__dataclass_fields__.keys()))  # type: ignore[attr-defined]
