"""Check of thinking: what the chat templates of the models do about thoughts, and whether both read the same one."""

from __future__ import annotations

from genssd.distill.doctor.findings import Finding
from genssd.distill.doctor.inputs import Inputs
from genssd.distill.doctor.model_files import Pair
from genssd.engine.common.errors import GenssdError
from genssd.engine.readers.thinking_pair import ThinkingPair, compare_thinking, describe_mode
from genssd.engine.texts.thinking import find_thinking


def check_thinking(inputs: Inputs) -> list[Finding]:
    """Find the switches of thoughts of the chat templates, and whether the models can read the same thought.

    Of several teachers, a finding for each with the student.
    """
    models = [model for model in inputs.models.values() if model.tokenizer.chat.exists]
    if not models:
        return []
    if inputs.pairs:
        return [_compare(pair, is_first=pair is inputs.pairs[0]) for pair in inputs.pairs]
    try:
        mode = find_thinking(models[0].tokenizer.chat)
    except GenssdError as error:
        return [Finding(name="thinking", level="error", line=str(error))]
    return [Finding(name="thinking", level="ok", line=f"{models[0].phrase}'s chat template {describe_mode(mode)}")]


def _compare(pair: Pair, *, is_first: bool) -> Finding:
    """Return the finding about a teacher and the student. is_first: whether it is the first of several teachers."""
    name = "thinking" if is_first else f"thinking, {pair.teacher.title}"
    try:
        return _judge(name, compare_thinking(pair.encoder))
    except GenssdError as error:
        return Finding(name=name, level="error", line=str(error))


def _judge(name: str, pair: ThinkingPair) -> Finding:
    line = pair.describe() or "neither chat template knows thoughts"
    if pair.conflict is not None:
        return Finding(name=name, level="error", line=pair.conflict)
    return Finding(name=name, level="warning" if pair.has_other_switch else "ok", line=line.removeprefix("thinking: "))
