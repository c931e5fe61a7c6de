"""The student's tokens of a text that grows: which of them are certain, whatever text follows.

A text is encoded from a place on where its tokens are certain. Its last tokens are not: the next letter may belong to
the last word, the next space to the last run of spaces. What is certain follows from how a tokenizer works:

    it divides text into words by a pattern     all words but the last two are certain. Published patterns look one
                                                character ahead, and the contractions of some ("Hello" and "'s") make
                                                one word of two. Runs of digits and of white space are never cut.
    it does not (SentencePiece, Gemma)          a border is certain where no token of the vocabulary has the two
                                                characters around it side by side, so that none can span it

In both, no added token spans the border, and no composed character (NFC). Patterns that look further are possible; so
the tokens of every whole response are compared with those that were read in pieces (`Session.finish_reading`). A
Unigram model decides between divisions of the same score by the rounding of its sums from the beginning of the text on,
so that a run of three spaces may be one and two in a piece, and two and one in the whole.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

from tokenizers import Encoding
from tokenizers import Tokenizer as RawTokenizer

from genssd.engine.common.errors import InputError
from genssd.engine.common.quoting import quote
from genssd.engine.readers.token_bytes import SPACE, ByteTable, NoByteTable, list_steps, read_backend
from genssd.engine.texts.text import Tokenizer
from genssd.engine.texts.text_stream import LONGEST_CHARACTER, REPLACEMENT

PROBE = "one two  three\n\n4 5,6; (seven)' = \t8"
"""Text that a tokenizer with a pattern divides into words."""
HELD_WORDS = 2
"""Number of words at the end of a text that are not certain."""
LONGEST_COMPOSITION = 8
"""Number of characters before a border that may compose with the one after it."""
_LONE_BYTE = re.compile("[\udc80-\udcff]")
_REMOVING = frozenset(("Whitespace", "WhitespaceSplit", "BertPreTokenizer", "CharDelimiterSplit", "FixedLength"))
"""Pre-tokenizers that remove characters, or cut at places that depend on what comes before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedText:
    """The tokens of a text."""

    ids: list[int]
    lengths: list[int]
    """Number of bytes of the text in each."""
    num_certain: int
    """How many of the first of them no later text changes."""


class TextEncoder:
    """The tokenizer of a student for text of which only the beginning is known.

    Names of special tokens are characters, no token is put around a text, and no space before it.
    """

    def __init__(self, tokenizer: Tokenizer, table: ByteTable, name: str) -> None:
        """Raises NoByteTable, with the model's name, on a tokenizer that changes the text or depends on its end."""
        self._name = name
        self._table = table
        backend = read_backend(tokenizer, name)
        normalizers, splits = list_steps(backend.normalizer), list_steps(backend.pre_tokenizer)
        _check_normalizers(normalizers, name)
        _check_pre_tokenizers(splits, name)
        if getattr(backend.model, "dropout", None):
            raise NoByteTable(f"the tokenizer of the {name} drops merges at random")
        self._composes = any(step["type"] == "NFC" for step in normalizers)
        self._backend = _make_backend(backend) if _puts_space(normalizers, splits) else backend
        self._lone_bytes = table.list_single_bytes()
        self._divides = _divides_into_words(self._backend)
        self._added_pairs = _list_pairs(
            token.content for i, token in backend.get_added_tokens_decoder().items() if i not in table.special
        )
        self._byte_pairs: frozenset[str] = frozenset()
        self._pairs: frozenset[str] = frozenset()
        if not self._divides and table.alphabet == "byte_level":
            self._byte_pairs = _list_pairs(spelled.decode("latin-1") for spelled in table.bytes_of.values())
        elif not self._divides:
            self._pairs = _list_pairs(piece for piece, i in tokenizer.hf.get_vocab().items() if i in table.bytes_of)

    def encode(self, text: str, *, is_whole: bool) -> EncodedText:
        """Return the tokens of a text in which bytes that form no character are escaped (`surrogateescape`).

        Such a byte is its own token, and a border; where the student has no token for it, the character that decoders
        write in its place is read. is_whole: whether the text ends here, so that all tokens are certain. Raises
        InputError on a character that no token of the student spells.
        """
        ids: list[int] = []
        lengths: list[int] = []
        num_certain, start = 0, 0
        for match in _LONE_BYTE.finditer(text):
            part = self._encode_characters(text[start : match.start()], is_whole=True)
            lone = self._encode_lone_byte(ord(match[0]) - 0xDC00)
            ids += [*part.ids, *lone]
            lengths += [*part.lengths, 1, *[0] * (len(lone) - 1)]
            num_certain, start = len(ids), match.end()
        part = self._encode_characters(text[start:], is_whole=is_whole)
        return EncodedText(
            ids=ids + part.ids, lengths=lengths + part.lengths, num_certain=num_certain + part.num_certain
        )

    def _encode_lone_byte(self, byte: int) -> list[int]:
        """Return the tokens of a byte that forms no character."""
        own = self._lone_bytes.get(byte)
        return self._encode_characters(REPLACEMENT, is_whole=True).ids if own is None else [own]

    def _encode_characters(self, text: str, *, is_whole: bool) -> EncodedText:
        """Return the tokens of a text of characters."""
        if not text:
            return EncodedText(ids=[], lengths=[], num_certain=0)
        encoding = _encode(self._backend, text)
        data = text.encode()
        lengths = [len(self._table.bytes_of.get(i, b"")) for i in encoding.ids]
        if self._table.join(encoding.ids) != data:
            lengths = self._measure(text)
        return EncodedText(
            ids=encoding.ids,
            lengths=lengths,
            num_certain=len(lengths) if is_whole else self._count_certain(data, lengths, encoding.word_ids),
        )

    @cached_property
    def _exact_backend(self) -> RawTokenizer:
        """The tokenizer without what shifts the places of tokens in the text."""
        return _make_backend(self._backend)

    def _measure(self, text: str) -> list[int]:
        """Return the number of bytes of the text in each token, where the tokens spell another form of it.

        That is the composed form of the characters (NFC), or spaces in place of the character of SentencePiece. Raises
        InputError where they do not spell the text.
        """
        encoding = _encode(self._exact_backend, text)
        written = text if self._backend.normalizer is None else self._backend.normalizer.normalize_str(text)
        if self._table.join(encoding.ids).decode(errors="replace") != written.replace(SPACE, " "):
            raise InputError(f"the tokens of the {self._name} do not spell the text {quote(text)}")
        starts = [start for start, _ in encoding.offsets[1:]]
        ends = [min(end, start) for (_, end), start in zip(encoding.offsets[:-1], starts, strict=True)]
        edges = list(accumulate([0, *ends, len(text)], max))
        return [len(text[start:end].encode()) for start, end in pairwise(edges)]

    def _count_certain(self, data: bytes, lengths: Sequence[int], words: Sequence[int | None]) -> int:
        """Return how many of the first tokens of a text no text after it changes."""
        last_word, border = words[-1] or 0, len(data)
        for k in range(len(lengths) - 1, 0, -1):
            border -= lengths[k]
            if not lengths[k - 1] or not 0 < border < len(data) or data[border] & 0xC0 == 0x80:
                continue  # inside a character, whose bytes are the last token's where they were composed
            before, after = _last_character(data, border), _first_character(data, border)
            if self._divides:
                word = words[k] or 0
                if word == words[k - 1] or last_word - word + 1 < HELD_WORDS or _is_run(before, after):
                    continue
            if not self._may_be_joined(before, after, data[:border]):
                return k
        return 0

    def _may_be_joined(self, before: str, after: str, head: bytes) -> bool:
        """Return whether a token may span a border between two characters. head: the text before it."""
        pair = f"{before}{after}".replace(" ", SPACE)
        if pair in self._added_pairs or pair in self._pairs:
            return True
        if (before.encode()[-1:] + after.encode()[:1]).decode("latin-1").replace(" ", SPACE) in self._byte_pairs:
            return True
        if not self._composes or pair.isascii():
            return False
        tail = head[-LONGEST_COMPOSITION * LONGEST_CHARACTER :].decode(errors="ignore")
        joined, first, second = (unicodedata.normalize("NFC", text) for text in (tail + after, tail, after))
        return bool(unicodedata.combining(after)) or joined != first + second


def _encode(backend: RawTokenizer, text: str) -> Encoding:
    """Return the encoding of a text in which names of special tokens are characters, without further tokens."""
    before, backend.encode_special_tokens = backend.encode_special_tokens, True
    try:
        return backend.encode(text, add_special_tokens=False)
    finally:
        backend.encode_special_tokens = before


def _first_character(data: bytes, start: int) -> str:
    """Return the character at a place of a text in UTF-8."""
    return data[start : start + LONGEST_CHARACTER].decode(errors="ignore")[:1]


def _last_character(data: bytes, end: int) -> str:
    """Return the character before a place of a text in UTF-8."""
    return data[max(0, end - LONGEST_CHARACTER) : end].decode(errors="ignore")[-1:]


def _is_run(before: str, after: str) -> bool:
    """Return whether two characters are both digits or both white space."""
    return (before.isnumeric() and after.isnumeric()) or f"{before}{after}".isspace()


def _list_pairs(texts: Any) -> frozenset[str]:
    """Return all pairs of characters that stand side by side in one of the texts; a space is that of SentencePiece."""
    spaced = (str(text).replace(" ", SPACE) for text in texts)
    return frozenset(text[i : i + 2] for text in spaced for i in range(len(text) - 1))


def _divides_into_words(backend: RawTokenizer) -> bool:
    """Return whether a tokenizer divides text before it looks for tokens."""
    if backend.pre_tokenizer is None:
        return False
    text = PROBE if backend.normalizer is None else backend.normalizer.normalize_str(PROBE)
    return len(backend.pre_tokenizer.pre_tokenize_str(text)) > 1


def _check_normalizers(steps: Sequence[Mapping[str, Any]], name: str) -> None:
    """Raise NoByteTable on a normalizer that makes another text; spaces that SentencePiece writes are the same text."""
    for step in steps:
        is_space = step["type"] == "Replace" and step["pattern"] == {"String": " "} and step["content"] == SPACE
        is_prefix = step["type"] == "Prepend" and step["prepend"] == SPACE
        if step["type"] != "NFC" and not is_space and not is_prefix:
            raise NoByteTable(f"the normalizer {step['type']} of the {name}'s tokenizer changes the text")


def _check_pre_tokenizers(steps: Sequence[Mapping[str, Any]], name: str) -> None:
    """Raise NoByteTable on a pre-tokenizer that removes characters."""
    for step in steps:
        if step["type"] in _REMOVING or step.get("behavior") == "Removed":
            raise NoByteTable(f"the pre-tokenizer {step['type']} of the {name}'s tokenizer removes characters")


def _puts_space(normalizers: Sequence[Mapping[str, Any]], splits: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether a tokenizer puts a space before a text."""
    return any(step["type"] == "Prepend" for step in normalizers) or any(
        (step["type"] == "ByteLevel" and step["add_prefix_space"])
        or (step["type"] == "Metaspace" and step["prepend_scheme"] != "never")
        for step in splits
    )


def _make_backend(backend: RawTokenizer) -> RawTokenizer:
    """Return a copy for text within a response: it puts no space before it, and tells the places of tokens."""
    state = json.loads(backend.to_str())
    splits = list_steps(backend.pre_tokenizer)
    for step in splits:
        if step["type"] == "ByteLevel":
            step["add_prefix_space"] = False
        if step["type"] == "Metaspace":
            step["prepend_scheme"] = "never"
    normalizers = [step for step in list_steps(backend.normalizer) if step["type"] != "Prepend"]
    state |= {
        "normalizer": {"type": "Sequence", "normalizers": normalizers} if normalizers else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": splits} if splits else None,
        "post_processor": None,
    }
    return RawTokenizer.from_str(json.dumps(state))
