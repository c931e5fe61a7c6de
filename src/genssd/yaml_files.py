"""YAML files as a user writes them: config files."""

from __future__ import annotations

from pathlib import Path

import yaml

from genssd.distill.files.pipes import open_pipe
from genssd.engine.common.errors import InputError

MAX_CONFIG_BYTES = 1 << 18
"""Maximum size of a config file."""


def load_yaml(path: Path) -> object:
    """Return what a config file holds. Raises InputError where it cannot be read, is too long, or is no YAML."""
    try:
        with open_pipe(str(path)) if path.is_fifo() else path.open("rb") as stream:
            text = stream.read(MAX_CONFIG_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"config file {path} cannot be read: {reason}") from None
    if len(text) > MAX_CONFIG_BYTES:
        raise InputError(f"config file {path} is longer than {MAX_CONFIG_BYTES >> 10} KiB")
    try:
        return yaml.safe_load(text.decode("utf-8"))
    except Exception as error:  # PyYAML raises exceptions of many types on damaged scalars
        raise InputError(f"config file {path} is not valid YAML: {' '.join(str(error).split())}") from None
