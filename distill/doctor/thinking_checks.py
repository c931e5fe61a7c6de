"""Check of thinking: what the chat templates of the models do about thoughts, and whether both read the same one."""

from __future__ import annotations

from genssd.distill.doctor.findings import Finding
from genssd.distill.doctor.inputs import Inputs
from genssd.engine.errors import GenssdError
from genssd.engine.thinking import find_thinking
from genssd.engine.thinking_pair import ThinkingPair, compare_thinking, describe_mode


def check_thinking(inputs: Inputs) -> list[Finding]:
    """Find the switches of thoughts of the chat templates, and whether the models can read the same thought."""
    name, models = "thinking", [model for model in inputs.models.values() if model.tokenizer.chat.exists]
    if not models:
        return []
    try:
        if inputs.pairs is not None:
            return _judge(compare_thinking(inputs.pairs))
        mode = find_thinking(models[0].tokenizer.chat)
    except GenssdError as error:
        return [Finding(name=name, level="error", line=str(error))]
    return [Finding(name=name, level="ok", line=f"the {models[0].role}'s chat template {describe_mode(mode)}")]


def _judge(pair: ThinkingPair) -> list[Finding]:
    name, line = "thinking", pair.describe() or "neither chat template knows thoughts"
    if pair.conflict is not None:
        return [Finding(name=name, level="error", line=pair.conflict)]
    return [Finding(name=name, level="warning" if pair.has_other_switch else "ok", line=line.removeprefix(f"{name}: "))]
