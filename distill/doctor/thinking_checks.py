"""Check of thinking: the switches of both chat templates, and whether their generation prompts open a thought."""

from __future__ import annotations

import re
from collections.abc import Mapping

from genssd.distill.answers.thoughts import find_open_tags
from genssd.distill.doctor.findings import Finding, Piece
from genssd.distill.doctor.inputs import Inputs, ModelFiles
from genssd.engine.chat_options import RENDERER_VARIABLES
from genssd.engine.errors import GenssdError
from genssd.engine.runner import Role
from genssd.engine.thoughts import ThoughtTags

SWITCH = re.compile("think|reason", re.IGNORECASE)
"""Names of the variables of chat templates that turn thoughts on and off."""
QUESTION = [{"role": "user", "content": "a"}]


def check_thinking(inputs: Inputs) -> list[Finding]:
    """Find the variables by which the chat templates switch thoughts, and which prompts end inside of a thought."""
    models = {role: model for role, model in inputs.models.items() if model.tokenizer.chat.exists}
    if not models:
        return []
    try:
        switches = {role: _find_switches(model) for role, model in models.items()}
        opened = {role: _find_opened(model) for role, model in models.items()}
    except GenssdError as error:
        return [Finding(name="thinking", level="error", line=str(error))]
    detail = (Piece("\n".join(_describe(role, models[role], switches[role]) for role in models)),)
    lines = [f"the {role}'s prompt {_describe_opened(tags)}" for role, tags in opened.items()]
    line = "; ".join(lines)
    if len({tags.opening if tags else None for tags in opened.values()}) > 1:
        return [
            Finding(
                name="thinking",
                level="warning",
                line=f"the prompts of the two models differ: {line}",
                detail=detail,
                fix=_write_fix(switches),
            )
        ]
    return [Finding(name="thinking", level="ok", line=line, detail=detail)]


def _find_switches(model: ModelFiles) -> list[str]:
    """Return the variables of a chat template that a user may set and whose names speak of thoughts."""
    settable = model.tokenizer.chat.variables - RENDERER_VARIABLES
    return sorted(name for name in settable if SWITCH.search(name))


def _find_opened(model: ModelFiles) -> ThoughtTags | None:
    """Return the tags of the thought that the generation prompt of a chat template opens; None where it opens none."""
    return find_open_tags(model.tokenizer.chat.render(QUESTION))


def _describe(role: Role, model: ModelFiles, switches: list[str]) -> str:
    kwargs = model.tokenizer.chat.options.template_kwargs
    values = [f"{name} ({kwargs[name]!r})" if name in kwargs else f"{name} (not set)" for name in switches]
    return f"{role}: {'no variable switches thoughts' if not values else 'switched by ' + ', '.join(values)}"


def _describe_opened(tags: ThoughtTags | None) -> str:
    return "opens no thought" if tags is None else f"ends inside of a thought ({tags.opening})"


def _write_fix(switches: Mapping[Role, list[str]]) -> str:
    names = sorted({name for names in switches.values() for name in names})
    if not names:
        return "take models whose chat templates open thoughts alike, or give one of them the other's template"
    return f"set the switch alike where both have it: --chat-template-kwargs {names[0]}=false (or true)"
