"""Finds tests that read files of the source tree that git ignores: in a fresh clone there are none."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from genssd import _core

ROOT = str(Path(__file__).resolve().parents[2]) + os.sep
TOOLS = (".git", ".venv", ".hypothesis", ".pytest_cache", ".benchmarks")
"""Folders at the root in which git, Python and pytest read and write by themselves."""


class IgnoredFiles:
    """Notes the files of the source tree that this process opens. To be made once: an audit hook cannot be removed."""

    def __init__(self) -> None:
        self._opened: set[str] = set()
        self._judged: set[str] = {_core.__file__}  # in the tree or not, as it was installed
        if Path(ROOT, ".git").exists() and shutil.which("git"):
            sys.addaudithook(self._note)

    def _note(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[0], str):
            path = arguments[0] if arguments[0].startswith("/") else os.path.abspath(arguments[0])
            if path.startswith(ROOT) and "__pycache__" not in path:
                self._opened.add(path)

    def pop(self) -> list[str]:
        """Return the ignored files that were opened since the last call, each one once in a session."""
        opened, self._opened = self._opened - self._judged, set()
        self._judged |= opened
        paths = sorted(path.removeprefix(ROOT) for path in opened)
        paths = [path for path in paths if path.split(os.sep)[0] not in TOOLS]
        if not paths:
            return []
        command = ["git", "check-ignore", "--stdin", "-z"]
        done = subprocess.run(command, cwd=ROOT, input="\0".join(paths), capture_output=True, text=True)
        return [path for path in done.stdout.split("\0") if path]
