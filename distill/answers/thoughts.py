"""Thoughts in responses that are judged: the tags that enclose them, and the text after the last closed one."""

from __future__ import annotations

import re
from collections.abc import Sequence

from genssd.engine.texts.text import Tokenizer
from genssd.engine.texts.thoughts import KNOWN_TAGS as COMPOSED_TAGS
from genssd.engine.texts.thoughts import ThoughtTags

Tags = Sequence[ThoughtTags]

KNOWN_TAGS: Tags = (
    *COMPOSED_TAGS,
    ThoughtTags("<|begin_of_thought|>", "<|end_of_thought|>"),
    ThoughtTags("<|START_THINKING|>", "<|END_THINKING|>"),
    ThoughtTags("<|channel|>analysis<|message|>", "<|channel|>final<|message|>"),
)
"""Tags of published models, among them DeepSeek-R1, Qwen3, Seed-OSS, Magistral, Kimi, Sky-T1, Command A, gpt-oss."""

_CLOSING_TAG = re.compile(r"([<\[])/([\w:|.-]*(?:think|thought|reason)[\w:|.-]*)([>\]])", re.IGNORECASE)


def find_all_tags(template: str) -> Tags:
    """Return the known pairs of tags, and the pairs in a chat template whose names speak of thinking or reasoning."""
    written = [ThoughtTags(f"{a}{name}{b}", f"{a}/{name}{b}") for a, name, b in _CLOSING_TAG.findall(template)]
    return tuple(dict.fromkeys([*KNOWN_TAGS, *written]))


def find_open_tags(prompt: str, tags: Tags = KNOWN_TAGS) -> ThoughtTags | None:
    """Return the tags of the thought that the end of a prompt opens, so that the response begins inside of it."""
    end = prompt.rstrip()
    return next((pair for pair in tags if end.endswith(pair.opening)), None)


def drop_thoughts(response: str, tags: Tags = KNOWN_TAGS, *, thought_is_open: bool = False) -> str | None:
    """Return what follows the last closed thought; None where a thought is not closed.

    thought_is_open: whether the response begins inside a thought, which the prompt opened.
    """
    end = max((response.rfind(p.closing) + len(p.closing) for p in tags if p.closing in response), default=0)
    rest = response[end:]
    if (thought_is_open and end == 0) or any(pair.opening in rest for pair in tags):
        return None
    return rest


class ThoughtReader:
    """The texts of prompts and responses of one tokenizer, in which the tags of thoughts remain."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        template = tokenizer.hf.chat_template
        templates = template.values() if isinstance(template, dict) else (template or "",)
        self.tags = find_all_tags("\n".join(map(str, templates)))
        parts = [tag for pair in self.tags for tag in (pair.opening, pair.closing)]
        removed = [name for name in map(str, tokenizer.hf.all_special_tokens) if not any(name in tag for tag in parts)]
        self._removed = re.compile("|".join(map(re.escape, removed)) or r"(?!)")

    def read(self, token_ids: Sequence[int]) -> str:
        """Return the text of some tokens; special tokens are left out unless they belong to the tag of a thought."""
        return self._removed.sub("", str(self._tokenizer.hf.decode(list(token_ids), skip_special_tokens=False)))

    def opens_thought(self, prompt_ids: Sequence[int]) -> bool:
        """Return whether a prompt ends in a tag that opens a thought."""
        return self.find_open_tags(prompt_ids) is not None

    def read_opening(self, prompt_ids: Sequence[int]) -> str:
        """Return the text at the end of a prompt that opens a thought, from the tag on; empty where none is opened."""
        text = self.read(prompt_ids[-32:])
        tags = find_open_tags(text, self.tags)
        return "" if tags is None else text[text.rindex(tags.opening) :]

    def find_open_tags(self, prompt_ids: Sequence[int]) -> ThoughtTags | None:
        """Return the tags of the thought that the end of a prompt opens; None where it opens none."""
        return find_open_tags(self.read(prompt_ids[-32:]), self.tags)
