"""Control tokens, and the encoding of texts in which some of their names are ordinary text.

A chat template renders one string, in which the name of a control token in a user's message looks like the template's
own. So the names in messages are replaced by placeholders before the template sees them. A placeholder is a number of
16 digits, which templates do not strip, split or escape; it stands for the same name wherever it is rendered.

A rendered text with placeholders is encoded as a whole, so that tokens merge across the borders of contents as in any
other text: by a copy of the tokenizer in which the control tokens have aliases. The template's names are written as
aliases, and the placeholders as the names that they stand for, which this copy does not know as tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from typing import Any

from tokenizers import Tokenizer as RawTokenizer

from genssd.engine.common.errors import InputError

OPTION = "--special-tokens-in-text"
PLACEHOLDER = re.compile("1[02-9]{15}")
"""Form of a placeholder. It begins with the only 1 in it, so that two placeholders never overlap."""
GUARD = "1" + "0" * 15
"""Number in the form of a placeholder that stands for nothing; it keeps a content apart from the text around it."""
ALIAS_START, ALIAS_END = "\U000f0000", "\U000f0001"
"""Private characters around the alias of a control token."""
MARKUP = re.compile(r"<.+>|\[.+\]|\u25c1.+\u25b7", re.DOTALL)
"""Form of the names of added tokens that are markup, such as <think>; others are words or runs of spaces."""


class ControlTokens:
    """The control tokens of a tokenizer of transformers.

    These are its special tokens, unless text has the same token without them (as "!" that is used for padding), and
    its other added tokens that are written in brackets, such as <think>. Added words and runs of spaces are text.
    """

    def __init__(self, hf: Any) -> None:
        self._hf = hf

    @cached_property
    def names(self) -> dict[str, int]:
        """Names and ids of the control tokens."""
        tokens = {str(token.content): (int(i), token) for i, token in self._hf.added_tokens_decoder.items()}
        names = {name: i for name, (i, token) in tokens.items() if name and (token.special or MARKUP.fullmatch(name))}
        plain_names = [name for name in names if not MARKUP.fullmatch(name)]
        raw = getattr(self._hf, "backend_tokenizer", None)
        if plain_names and raw is not None:
            copy = _AliasedCopy.make(raw, names)
            words = {name for name in plain_names if names[name] in copy.encode(name)}
            return {name: i for name, i in names.items() if name not in words}
        return names

    def find_names(self, text: str) -> list[str]:
        """Return the names of control tokens in a text, in order."""
        return [match[0] for match in self._names_pattern.finditer(text)]

    def replace_names(self, value: Any) -> Any:
        """Return a JSON value with placeholders in place of the names of control tokens in its texts.

        Raises InputError on a text that the tokenizer takes for a control token although it spells no name exactly.
        """
        if isinstance(value, str):
            return self._replace_names(value)
        if isinstance(value, Mapping):
            return {self.replace_names(name): self.replace_names(element) for name, element in value.items()}
        return [self.replace_names(element) for element in value] if isinstance(value, list | tuple) else value

    def check_no_placeholder(self, value: Any) -> None:
        """Raise InputError on a JSON value with a text that holds a placeholder."""
        for text in iter_texts(value):
            for number in PLACEHOLDER.findall(text):
                if number in self._names_by_placeholder:
                    raise InputError(f"the text holds the number {number}, which genssd keeps for itself; change it")

    def restore_names(self, text: str) -> str:
        """Return a text with the names that its placeholders stand for."""
        return PLACEHOLDER.sub(lambda match: self._names_by_placeholder.get(match[0], match[0]), text)

    def may_cross(self, text: str) -> bool:
        """Return whether a text, with other text directly before or after it, could be part of a name."""
        text = text.strip()  # templates strip
        prefixes, suffixes = self._parts_of_names
        lengths = range(1, min(len(text), max(map(len, self.names), default=0)) + 1)
        is_within = 0 < len(text) == len(lengths) and any(text in name for name in self.names)
        return is_within or any(text[-k:] in prefixes or text[:k] in suffixes for k in lengths)

    def has_placeholder(self, text: str) -> bool:
        """Return whether a text holds a placeholder."""
        return any(number in self._names_by_placeholder for number in PLACEHOLDER.findall(text))

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a rendered text.

        The names that its placeholders stand for are text, all other names of control tokens are tokens. Raises
        InputError where the tokenizer cannot do this.
        """
        copy = self._copy
        if copy is None or ALIAS_START in text:
            raise InputError(f"the tokenizer {self._refusal(text)}")
        expected = [self.names[name] for name in self.find_names(text)]
        aliased = self._names_pattern.sub(lambda match: copy.aliases[match[0]], text)
        ids = copy.encode(self.restore_names(aliased))
        # an alias that is no token here, or a name that the copy reads as its token in another way
        if [i for i in ids if i in copy.control_ids] != [i for i in expected if i in copy.control_ids]:
            raise InputError(f"the tokenizer {self._refusal(text)}")
        return ids

    def _refusal(self, text: str) -> str:
        names = dict.fromkeys(
            self._names_by_placeholder[m] for m in PLACEHOLDER.findall(text) if m in self._names_by_placeholder
        )
        return (
            f"cannot encode the name of the control token {', '.join(map(repr, names)) or '(an alias)'} in a message "
            f"as text; remove it, or pass {OPTION} to have it as the token"
        )

    def _replace_names(self, text: str) -> str:
        replaced = self._names_pattern.sub(lambda match: self._placeholders[match[0]], text)
        if self._is_normalised and not self.names.keys().isdisjoint(self._hf.tokenize(replaced)):
            raise InputError(
                f"a message holds a control token in another spelling; remove it, or pass {OPTION} to have it as the "
                "token"
            )
        return replaced

    @cached_property
    def _placeholders(self) -> dict[str, str]:
        """Placeholders by the name that they stand for; they are the same in every tokenizer."""
        digits = {name: int.from_bytes(blake2b(name.encode(), digest_size=16).digest(), "big") for name in self.names}
        placeholders = {name: "1" + _write_without_one(number, 15) for name, number in digits.items()}
        assert len(set(placeholders.values())) == len(placeholders), "two control tokens have the same placeholder"
        return placeholders

    @cached_property
    def _names_by_placeholder(self) -> dict[str, str]:
        return {placeholder: name for name, placeholder in self._placeholders.items()}

    @cached_property
    def _parts_of_names(self) -> tuple[frozenset[str], frozenset[str]]:
        """The beginnings of names, and the ends of names."""
        cuts = [(name[:k], name[k:]) for name in self.names for k in range(1, len(name))]
        return frozenset(start for start, _ in cuts), frozenset(end for _, end in cuts)

    @cached_property
    def _names_pattern(self) -> re.Pattern[str]:
        """Pattern of all names, longer ones first, as the tokenizer finds them."""
        longest_first = sorted(self.names, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    @cached_property
    def _is_normalised(self) -> bool:
        """Whether the tokenizer looks for some control token in the normalised text, where other spellings match."""
        raw = getattr(self._hf, "backend_tokenizer", None)
        has_normalizer = raw is None or raw.normalizer is not None
        tokens = self._hf.added_tokens_decoder.values()
        return has_normalizer and any(token.normalized and str(token.content) in self.names for token in tokens)

    @cached_property
    def _copy(self) -> _AliasedCopy | None:
        raw = getattr(self._hf, "backend_tokenizer", None)
        return None if raw is None else _AliasedCopy.make(raw, self.names)


@dataclass(frozen=True, slots=True, kw_only=True)
class _AliasedCopy:
    """A copy of a tokenizer whose control tokens have other names."""

    raw: RawTokenizer
    aliases: Mapping[str, str]
    """Alias of every control token, by its name."""
    original_ids: Mapping[int, int]
    """Ids in the original tokenizer of the copy's added tokens."""
    control_ids: frozenset[int]
    """Original ids of the control tokens that text alone cannot produce, or must not because they are special."""

    @staticmethod
    def make(raw: RawTokenizer, names: Mapping[str, int]) -> _AliasedCopy:
        """Return the copy. names: names and ids of the control tokens."""
        aliases = {name: f"{ALIAS_START}{i}{ALIAS_END}" for name, i in names.items()}
        fields = json.loads(raw.to_str())
        originals = {}
        for token in fields["added_tokens"]:
            content = aliases.get(token["content"], token["content"])
            originals[content] = token["id"]
            token["content"] = content
        # a post-processor refers to special tokens by name, and only adds what stands around a sequence
        copy = RawTokenizer.from_str(
            json.dumps(fields | {"truncation": None, "padding": None, "post_processor": None}, ensure_ascii=False)
        )
        original_ids = {i: originals[str(token.content)] for i, token in copy.get_added_tokens_decoder().items()}
        special = {str(token["content"]) for token in fields["added_tokens"] if token["special"]}
        control_ids = {
            i
            for name, i in names.items()
            if aliases[name] in special or i not in copy.encode(name, add_special_tokens=False).ids
        }
        return _AliasedCopy(raw=copy, aliases=aliases, original_ids=original_ids, control_ids=frozenset(control_ids))

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text in the original tokenizer."""
        ids: Sequence[int] = self.raw.encode(text, add_special_tokens=False).ids
        return [self.original_ids.get(i, i) for i in ids]


def iter_texts(value: Any) -> Iterator[str]:
    """Yield all texts in a JSON value, names of fields included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for name, element in value.items():
            yield from iter_texts(name)
            yield from iter_texts(element)
    elif isinstance(value, list | tuple):
        for element in value:
            yield from iter_texts(element)


def _write_without_one(number: int, length: int) -> str:
    """Return the last `length` digits of a number in base 9, written with the digits other than 1."""
    digits = []
    for _ in range(length):
        number, digit = divmod(number, 9)
        digits.append("023456789"[digit])
    return "".join(digits)
