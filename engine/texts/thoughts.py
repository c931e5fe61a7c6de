"""Thoughts of reasoning models: the tags around them in the text of a response."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ThoughtTags:
    """The tags around a thought."""

    opening: str
    """Text that opens a thought."""
    closing: str
    """Text that closes it."""


THINK = ThoughtTags("<think>", "</think>")
KNOWN_TAGS = (
    THINK,
    ThoughtTags("<thinking>", "</thinking>"),
    ThoughtTags("<thought>", "</thought>"),
    ThoughtTags("<reasoning>", "</reasoning>"),
    ThoughtTags("<seed:think>", "</seed:think>"),
    ThoughtTags("[THINK]", "[/THINK]"),
    ThoughtTags("\u25c1think\u25b7", "\u25c1/think\u25b7"),
)


def find_tags(template: str) -> ThoughtTags:
    """Return the tags that a chat template names; `<think>` and `</think>` where it names none."""
    return next((tags for tags in KNOWN_TAGS if tags.closing in template or tags.opening in template), THINK)


def is_open_thought(text: str, known_tags: Sequence[ThoughtTags] = KNOWN_TAGS) -> bool:
    """Return whether a response begins with a thought and never closes it."""
    start = text.lstrip()
    return any(start.startswith(tags.opening) and tags.closing not in start for tags in known_tags)


def remove_opening(text: str, tags: ThoughtTags) -> str:
    """Return a response without the tag and the line break that open its thought."""
    start = text.lstrip()
    return start.removeprefix(tags.opening).lstrip("\n") if start.startswith(tags.opening) else text


def lacks_opening(text: str, tags: ThoughtTags) -> bool:
    """Return whether a response closes one thought that it has not opened, as after a prompt that opened it."""
    return text.count(tags.closing) == 1 and tags.opening not in text


def add_opening(text: str, tags: ThoughtTags) -> str:
    """Return a response with the tag that opens its thought, on a line of its own, before it."""
    start = text.lstrip("\n")
    return f"{tags.opening}\n{start}"


def compose(thought: str, content: str, tags: ThoughtTags) -> str:
    """Return a response whose thought stands before its content, in tags on lines of their own."""
    stripped = thought.strip("\n")
    return f"{tags.opening}\n{stripped}\n{tags.closing}\n\n{content.lstrip(chr(10))}"


def split_thought(text: str) -> tuple[str, str] | None:
    """Return the thought at the beginning of a response, and what follows it; None unless it has this one thought."""
    start = text.lstrip()
    for tags in KNOWN_TAGS:
        if start.startswith(tags.opening) and start.count(tags.closing) == 1:
            thought, _, content = start.removeprefix(tags.opening).partition(tags.closing)
            return thought.strip("\n"), content.lstrip("\n")
    return None


def split_texts(text: str, tags: ThoughtTags) -> list[str]:
    """Return the texts between the tags of a response, stripped, empty ones left out."""
    parts = re.split(f"{re.escape(tags.opening)}|{re.escape(tags.closing)}", text)
    return [part.strip() for part in parts if part.strip()]
