"""Configs of all commands, and changes of their fields that no check of a config stands in the way of."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

from genssd.configs import CONFIGS
from genssd.distill import small_pair

PAIR = Path(next(iter(small_pair.__path__)))
MODELS = [str(PAIR / "teacher"), str(PAIR / "student")]


def config_of(command: str, data: list[str]) -> Any:
    """A config with all required fields, models and files that exist."""
    config_class = CONFIGS[command]
    given: dict[str, Any] = {
        "teacher": (MODELS[0],) if command == "diagnose" else MODELS[0],
        "student": MODELS[1],
        "model": MODELS[1],
        "model_name_or_path": MODELS[1],
        "data": (data[0],) if command in ("score", "prefix", "leaf", "train", "doctor") else data[0],
        "run": ("runs/select",) if command == "report" else "runs/select",
        "criteria": ("divergence",),
        "task": "words",
    }
    names = {field.name for field in dataclasses.fields(config_class)}
    return config_class(**{name: value for name, value in given.items() if name in names})


def changed(config: Any, name: str, value: Any) -> Any:
    """A copy with another value, whatever the config's own checks say."""
    head, _, rest = name.partition(".")
    other = copy.copy(config)
    object.__setattr__(other, head, changed(getattr(config, head), rest, value) if rest else value)
    return other


def another(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if dataclasses.is_dataclass(value):
        return None
    return (*value, "x") if isinstance(value, tuple) else f"{value}x"
