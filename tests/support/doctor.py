"""Inputs of the doctor's checks, and the findings that they give."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from support.toys import save_checkpoint

from genssd.distill.doctor.findings import Finding, join_pieces
from genssd.distill.doctor.inputs import Inputs, open_inputs
from genssd.distill.doctor.settings import EXAMINED, Settings, read_settings

Check = Callable[[Inputs], list[Finding]]
PROBLEMS = [{"question": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(1, 6)]
EXAMPLES = [{"question": f"What is {i} + {i}?", "response": f"It is\n{2 * i}"} for i in range(1, 6)]


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def settings_of(command: str, **fields: Any) -> Settings:
    return read_settings(command, EXAMINED[command](**fields))


def open_for(command: str, rows: int = 100, **fields: Any) -> Inputs:
    """Open the inputs of a command, none of which may be refused."""
    inputs = open_inputs(settings_of(command, **fields), rows)
    assert inputs.faults == ()
    return inputs


def one(findings: Sequence[Finding], name: str | None = None) -> Finding:
    """Return the only finding, or the only one of that name."""
    (finding,) = [finding for finding in findings if name is None or finding.name == name]
    return finding


def detail_of(finding: Finding) -> str:
    return join_pieces(finding.detail)


def copy_of(directory: Path, place: Path) -> Path:
    """Return a copy of a checkpoint that may be changed."""
    shutil.copytree(directory, place)
    return place


def make_pair(place: Path) -> tuple[str, str]:
    """Write a random teacher and student of one tokenizer, and return their directories."""
    save_checkpoint(place / "teacher", "qwen3", seed=1)
    save_checkpoint(place / "student", "llama", seed=2)
    return str(place / "teacher"), str(place / "student")
