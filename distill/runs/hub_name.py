"""Names of repositories of models on the Hugging Face hub, checked without the hub's library."""

from __future__ import annotations

import re

from genssd.engine.common.errors import InputError

MAX_NAME = 96
"""Maximum number of characters of a repository's name, as the hub has it."""
_PATTERN = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?/[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?")


def check_repository(name: str, option: str) -> None:
    """Raise InputError where a text is no name of a repository, OWNER/NAME. option: the option that holds it."""
    is_name = _PATTERN.fullmatch(name) and len(name) <= MAX_NAME and not any(two in name for two in ("--", ".."))
    if not is_name or name.endswith(".git"):
        raise InputError(
            f"{option} must be the name of a repository of the hub, OWNER/NAME of letters, digits, '-', '_' and '.', "
            f"with at most {MAX_NAME} characters, not {name!r}"
        )
