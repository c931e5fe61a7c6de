"""Checks of several teachers that compete: whether everybody reads what the others write."""

from __future__ import annotations

from genssd.distill.doctor.findings import Finding
from genssd.distill.doctor.inputs import Inputs
from genssd.distill.doctor.model_files import ModelFiles
from genssd.engine.common.errors import GenssdError
from genssd.engine.readers.byte_reader import find_reader


def check_teachers(inputs: Inputs) -> list[Finding]:
    """Find how the student and the other teachers read each teacher after the first one."""
    if inputs.student is None:
        return []
    later = [model for title, model in inputs.models.items() if model.role == "teacher" and title != "teacher"]
    return [_check_teacher(inputs, model) for model in later]


def _check_teacher(inputs: Inputs, model: ModelFiles) -> Finding:
    name = f"tokenizers of {model.title}"
    others = {
        "teacher 1" if title == "teacher" else title: one for title, one in inputs.models.items() if one is not model
    }
    try:
        readers = {
            name: find_reader(model.tokenizer, one.tokenizer, f"{model.title} {model.name}", f"{name} {one.name}")
            for name, one in others.items()
        }
    except GenssdError as error:
        return Finding(name=name, level="error", line=str(error))
    by_bytes = [name for name, reader in readers.items() if reader.reads_bytes]
    differing = [name for name, reader in readers.items() if not reader.is_identity]
    how = f"other added tokens than {' and '.join(differing)}" if differing else "the tokens of the other models"
    if by_bytes:
        how = f"read by bytes by {' and '.join(by_bytes)}"
    return Finding(name=name, level="ok", line=f"{model.name}: {how}")
