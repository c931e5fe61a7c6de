"""Checks of several teachers that compete: whether everybody reads what the others write."""

from __future__ import annotations

from genssd.distill.doctor.findings import Finding
from genssd.distill.doctor.inputs import Inputs
from genssd.engine.byte_reader import find_reader
from genssd.engine.errors import GenssdError


def check_teachers(inputs: Inputs) -> list[Finding]:
    """Find how the student and the other teachers read each further teacher."""
    if inputs.teacher is None or inputs.student is None:
        return []
    teachers = {"teacher 1": inputs.teacher, **inputs.further}
    findings = []
    for label, model in inputs.further.items():
        others = {"student": inputs.student, **{name: one for name, one in teachers.items() if name != label}}
        try:
            readers = {
                name: find_reader(model.tokenizer, one.tokenizer, f"{label} {model.name}", f"{name} {one.name}")
                for name, one in others.items()
            }
        except GenssdError as error:
            findings.append(Finding(name=label, level="error", line=str(error)))
            continue
        by_bytes = [name for name, reader in readers.items() if reader.reads_bytes]
        differing = [name for name, reader in readers.items() if not reader.is_identity]
        how = f"other added tokens than {' and '.join(differing)}" if differing else "the tokens of the other models"
        if by_bytes:
            how = f"read by bytes by {' and '.join(by_bytes)}"
        findings.append(Finding(name=label, level="ok", line=f"{model.name}: {how}"))
    return findings
