"""What a chat template does about thoughts, found by rendering it: its switch, what its prompts end in, its history.

Templates differ. The prompt of DeepSeek-R1 opens the thought that the response closes. Qwen3 lets the model open it,
unless enable_thinking=False writes an empty thought into the prompt. SmolLM3 does the same, and reads /no_think in the
system message, too. Others know no thoughts at all.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from genssd.engine.texts.chat import PROBE, ChatTemplate, Messages, add_system_prompt
from genssd.engine.texts.thoughts import KNOWN_TAGS, ThoughtTags

PromptEnd = Literal["none", "open", "closed"]
"""What stands at the end of a prompt: no thought | a thought that the response closes | an empty thought."""
SWITCH_WORDS = ("think", "reason")
"""Parts of the names of variables that switch thinking by the text of the system message alone."""
SYSTEM_WORDS = ("/no_think", "/think")
"""Texts of a system message by which templates switch thinking."""
QUESTION: Messages = [{"role": "user", "content": "a"}]


@dataclass(frozen=True, slots=True)
class ThoughtEnd:
    """The thought at the end of a rendered prompt."""

    state: PromptEnd
    text: str = ""
    """The prompt from the thought's tag on; empty where no thought stands there."""
    tags: ThoughtTags | None = None
    """Tags of the thought; None where no thought stands there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ThinkingMode:
    """What the chat template of one model does about thoughts, under the present options."""

    has_template: bool
    """Whether the model has a chat template."""
    tags: ThoughtTags
    """Tags around thoughts, as the template names them."""
    knows_thoughts: bool
    """Whether the template names tags of thoughts, writes them, or has a switch."""
    switch: str | None = None
    """Variable that turns thinking on and off; None where the template reads none."""
    default: bool | None = None
    """Whether the template thinks when the switch is not set; None where that is neither of both."""
    is_on: bool | None = None
    """Whether the switch is on under the present options; None without a switch, or where that is neither."""
    prompt_end: PromptEnd = "none"
    """What a prompt ends in under the present options."""
    prompt_end_on: PromptEnd | None = None
    """What a prompt ends in when the switch is on; None without a switch."""
    prompt_end_off: PromptEnd | None = None
    """What a prompt ends in when the switch is off; None without a switch."""
    system_words: tuple[str, ...] = ()
    """Texts in a system message, such as /no_think, that change what the prompt ends in."""
    empty_thought: str = ""
    """What the template writes between the prompt and an answer without a thought; empty where it writes no thought."""
    strips_history: bool = False
    """Whether the thoughts of earlier turns are left out of the prompt."""

    @property
    def thinks(self) -> bool:
        """Whether a response to a prompt that ends in no thought is expected to begin with one."""
        return self.is_on if self.is_on is not None else self.knows_thoughts


def read_end(prompt: str, messages: Messages, tags: ThoughtTags) -> ThoughtEnd:
    """Return the thought at the end of a rendered prompt.

    tags: those of the template, which are looked for before the known ones. A template that writes nothing after the
    last message ends the prompt in that message's own text, which is no thought.
    """
    end = prompt.rstrip()
    content = messages[-1].get("content") if messages else None
    if isinstance(content, str) and content.strip() and end.endswith(content.rstrip()):
        return ThoughtEnd("none")
    for pair in dict.fromkeys((tags, *KNOWN_TAGS)):
        if end.endswith(pair.opening):
            return ThoughtEnd("open", prompt[len(end) - len(pair.opening) :], pair)
        if end.endswith(pair.closing):
            start = len(end) - len(pair.closing)
            before = prompt[:start].rstrip()
            if before.endswith(pair.opening):
                start = len(before) - len(pair.opening)
            return ThoughtEnd("closed", prompt[start:], pair)
    return ThoughtEnd("none")


def find_thinking(chat: ChatTemplate) -> ThinkingMode:
    """Return what a chat template does about thoughts, under its options. Nothing is raised on a template that fails:
    what it refuses to render is not found.

    Raises InputError on a template that cannot be parsed, TimeLimitError on one that computes for too long.
    """
    if not chat.exists:
        return ThinkingMode(has_template=False, tags=chat.tags, knows_thoughts=False)
    names = str(chat.hf.chat_template)
    mode = ThinkingMode(
        has_template=True,
        tags=chat.tags,
        knows_thoughts=any(tag in names for pair in KNOWN_TAGS for tag in (pair.opening, pair.closing)),
        prompt_end=_find_end(chat),
        system_words=tuple(word for word in SYSTEM_WORDS if _changes_end(chat, word)),
        empty_thought=_find_empty_thought(chat),
        strips_history=_strips_history(chat),
    )
    switch = _find_switch(chat)
    if switch is None:
        return mode
    unset, on, off = (_render(_set(chat, switch, value)) for value in (None, True, False))
    default = _tell(unset, on, off)
    return replace(
        mode,
        knows_thoughts=True,
        switch=switch,
        default=default,
        is_on=_tell(_render(chat), on, off) if switch in chat.options.template_kwargs else default,
        prompt_end_on=_find_end(_set(chat, switch, True)),
        prompt_end_off=_find_end(_set(chat, switch, False)),
    )


def _tell(text: str | None, on: str | None, off: str | None) -> bool | None:
    """Return whether a text is the one with the switch on (True) or off (False); None where it is neither."""
    return None if text not in (on, off) or on == off else text == on


def _set(chat: ChatTemplate, name: str, value: Any) -> ChatTemplate:
    """Return the template with a variable set to a value; None leaves it unset."""
    others = {key: other for key, other in chat.options.template_kwargs.items() if key != name}
    variables = others if value is None else {**others, name: value}
    return ChatTemplate(chat.hf, chat.directory, replace(chat.options, template_kwargs=variables))


def _render(chat: ChatTemplate, messages: Messages = QUESTION, *, generate: bool = True) -> str | None:
    return chat.try_render(add_system_prompt(messages, chat.options.system_prompt), generate=generate)


def _find_end(chat: ChatTemplate, messages: Messages = QUESTION) -> PromptEnd:
    text = _render(chat, messages)
    return "none" if text is None else read_end(text, messages, chat.tags).state


def _find_switch(chat: ChatTemplate) -> str | None:
    """Return the variable of which True and False render other thoughts; else one whose name speaks of thinking."""
    by_name: list[str] = []
    for name in sorted(chat.settable_variables):
        written = _render(_set(chat, name, PROBE))
        on, off = _set(chat, name, True), _set(chat, name, False)
        texts = _render(on), _render(off)
        if None in texts or texts[0] == texts[1] or (written is not None and PROBE in written):
            continue  # it has no effect here, or is a text that the template writes, such as a date
        if _find_end(on) != _find_end(off):
            return name
        if any(word in name.lower() for word in SWITCH_WORDS):
            by_name.append(name)
    return by_name[0] if by_name else None


def _changes_end(chat: ChatTemplate, word: str) -> bool:
    """Return whether a word in the system message changes what the prompt ends in."""
    texts = [
        chat.try_render([{"role": "system", "content": system}, *QUESTION], generate=True) for system in (PROBE, word)
    ]
    if None in texts:
        return False
    before, after = (read_end(str(text), QUESTION, chat.tags).state for text in texts)
    return before != after


def _find_empty_thought(chat: ChatTemplate) -> str:
    """Return what stands between a prompt without a thought and an answer without one, if that is a thought."""
    prompt = _render(chat)
    answered = _render(chat, [*QUESTION, {"role": "assistant", "content": PROBE}], generate=False)
    if prompt is None or answered is None or not answered.startswith(prompt) or PROBE not in answered:
        return ""
    between = answered[len(prompt) : answered.rindex(PROBE)]
    return between if read_end(between, (), chat.tags).state == "closed" else ""


def _strips_history(chat: ChatTemplate) -> bool:
    """Return whether the thought of an earlier turn is missing from the prompt while its answer is there."""
    tags, answer = chat.tags, f"{PROBE}2"
    reply = {"role": "assistant", "content": f"{tags.opening}\n{PROBE}1\n{tags.closing}\n\n{answer}"}
    text = _render(chat, [*QUESTION, reply, *QUESTION])
    return text is not None and answer in text and f"{PROBE}1" not in text
