"""Checks of a command's settings, and of the run in its output directory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from genssd.distill.doctor.findings import Finding
from genssd.distill.doctor.inputs import Inputs
from genssd.distill.doctor.settings import Settings
from genssd.distill.runs.directory import RECORD
from genssd.distill.runs.effects import check_effects
from genssd.distill.runs.journal import has_lines
from genssd.distill.runs.record import read_record
from genssd.distill.runs.settings import check_same_settings, settings_of
from genssd.distill.select.beginning import check_search
from genssd.distill.select.chunk_choice import SETTING
from genssd.engine.checkpoints.address import is_url
from genssd.engine.common.errors import GenssdError, InputError


def check_settings(inputs: Inputs) -> list[Finding]:
    """Find settings that have no effect, and those that the search refuses."""
    settings = inputs.settings
    if settings.config is None:
        return []
    name = "settings"
    try:
        check_effects(settings.config)
        if settings.search is not None:
            teachers = [settings.models["teacher"], *settings.further_teachers]
            check_search(settings.search, teachers, settings.models["student"])
    except InputError as error:
        return [Finding(name=name, level="error", line=str(error))]
    return [Finding(name=name, level="ok", line=f"of `genssd {settings.command}`")]


def check_run(inputs: Inputs) -> list[Finding]:
    """Find whether the output directory holds a run, and whether it can be resumed with these settings."""
    settings = inputs.settings
    if settings.output_dir is None or settings.config is None:
        return []
    record = Path(settings.output_dir) / RECORD
    if not record.is_file():
        return []
    name = "run"
    try:
        begun = read_record(record)
        if begun["command"] != settings.command:
            raise InputError(
                f"{settings.output_dir} belongs to a run of `genssd {begun['command']}`; choose another output_dir"
            )
        if _is_comparable(settings) and not getattr(settings.config, "overwrite", False):
            _check_same(begun["settings"], settings_of(settings.config), settings.output_dir)
    except GenssdError as error:
        return [Finding(name=name, level="error", line=str(error))]
    is_train = settings.command == "train"
    resume = _says_what_to_do(settings.config)
    with_these = " with these settings" if _is_comparable(settings) else ", whose settings are compared on resuming"
    line = f"{settings.output_dir} holds a run of `genssd {settings.command}`{with_these}"
    flag = "--resume-from-checkpoint last" if is_train else "--resume"
    fix = None if resume else f"pass {flag} to go on with it, or choose another output_dir"
    has_work = any(map(has_lines, Path(settings.output_dir).glob("*.jsonl")))
    return [Finding(name=name, level="error" if has_work and not resume and not is_train else "ok", line=line, fix=fix)]


def _says_what_to_do(config: Any) -> bool:
    """Return whether a config asks for going on with the run in its output directory, or for replacing it."""
    return any(getattr(config, name, None) for name in ("resume", "overwrite", "resume_from_checkpoint"))


def _is_comparable(settings: Settings) -> bool:
    """Return whether the settings of a run are known without loading or asking anything.

    Those of a training are in a checkpoint, with a hash of the examples; a served model's fingerprint is the server's;
    a sampling by the model's own file is read with the model.
    """
    is_served = any(map(is_url, settings.models.values()))
    return settings.command != "train" and not is_served and not getattr(settings.config, "generation_config", False)


def _check_same(begun: Mapping[str, Any], now: Mapping[str, Any], output_dir: str) -> None:
    """Raise InputError naming a setting that is not the recorded one; those of the trainings of distill may change.

    A length of chunks that is left to the run is the recorded one.
    """
    if now.get(SETTING, 0) is None:
        now = {**now, SETTING: begun.get(SETTING)}

    def fixed(values: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in values.items() if not name.startswith("train.")}

    check_same_settings(fixed(begun), fixed(now), f"{output_dir} was begun")
