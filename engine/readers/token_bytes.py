"""The bytes of text that every token of a tokenizer stands for.

    byte-level BPE      "Ġthe" is b" the": every character of a token is one byte, by GPT-2's alphabet
    SentencePiece       "▁the" is b" the", "<0xE2>" the byte E2
    added tokens        their own characters; special ones (ends, roles) stand for no text

The decoders of `tokenizers` give text, in which bytes that form no character are lost; so the bytes are taken from the
vocabulary.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tokenizers import Tokenizer as RawTokenizer
from tokenizers import models

from genssd.engine.common.errors import InputError
from genssd.engine.common.quoting import quote
from genssd.engine.texts.text import Tokenizer

SPACE = "\u2581"
"""Character that stands for a space in the tokens of SentencePiece."""
PIECE_DECODERS = frozenset(("Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"))
"""Parts of the decoder of a tokenizer in the style of SentencePiece."""
_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")

Alphabet = Literal["byte_level", "pieces"]
"""How tokens spell bytes."""


class NoByteTable(InputError):
    """A tokenizer whose tokens do not spell bytes of text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ByteTable:
    """The bytes of the tokens of one tokenizer."""

    alphabet: Alphabet
    bytes_of: Mapping[int, bytes]
    """Bytes of every token that stands for text, by its id."""
    special: Mapping[int, str]
    """Names of the special tokens, which stand for none."""
    drops_first_space: bool
    """Whether decoding leaves the space out that the first token of a text begins with."""

    @staticmethod
    def of(tokenizer: Tokenizer, name: str) -> ByteTable:
        """Return the table of a tokenizer. Raises NoByteTable, with the model's name, where it has none."""
        backend = read_backend(tokenizer, name)
        alphabet = _find_alphabet(backend, name)
        spell = _spell_byte_level if alphabet == "byte_level" else _spell_piece
        added = backend.get_added_tokens_decoder()
        special = {i: str(token.content) for i, token in added.items() if token.special}
        bytes_of: dict[int, bytes] = {}
        for text, i in tokenizer.hf.get_vocab().items():
            spelled = _spell_added(text, alphabet) if i in added else spell(text)
            if i not in special and spelled:
                bytes_of[int(i)] = spelled
        return ByteTable(
            alphabet=alphabet,
            bytes_of=bytes_of,
            special=special,
            drops_first_space=_drops_first_space(tokenizer, bytes_of),
        )

    def list_single_bytes(self) -> dict[int, int]:
        """Return the id of the token of each single byte, as far as there are any: the byte tokens of SentencePiece."""
        single: dict[int, int] = {}
        for i, spelled in self.bytes_of.items():
            if len(spelled) == 1:
                # "<0x41>" comes before "A" in vocabularies of SentencePiece, and is the token of a lone byte
                single[spelled[0]] = min(i, single.get(spelled[0], i))
        return single

    def join(self, token_ids: Sequence[int]) -> bytes:
        """Return the bytes of some tokens; special ones have none."""
        return b"".join(self.bytes_of.get(i, b"") for i in token_ids)


def read_backend(tokenizer: Tokenizer, name: str) -> RawTokenizer:
    """Return the object of `tokenizers` in a tokenizer. Raises NoByteTable where it is written in Python."""
    backend = getattr(tokenizer.hf, "backend_tokenizer", None)
    if not isinstance(backend, RawTokenizer):
        raise NoByteTable(f"the tokenizer of the {name} ({type(tokenizer.hf).__name__}) is written in Python")
    return backend


def list_steps(part: Any) -> list[dict[str, Any]]:
    """Return the steps of a part of a tokenizer (normalizer, decoder) with their options, as in tokenizer.json."""
    return [] if part is None else _flatten(json.loads(part.__getstate__()))


def _flatten(fields: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the steps of a sequence, sequences of sequences resolved."""
    if fields["type"] != "Sequence":
        return [dict(fields)]
    (steps,) = (value for key, value in fields.items() if key != "type")
    return [one for step in steps for one in _flatten(step)]


def _find_alphabet(backend: RawTokenizer, name: str) -> Alphabet:
    """Return how a tokenizer spells bytes. Raises NoByteTable where it does not."""
    model = backend.model
    if not isinstance(model, models.BPE | models.Unigram):
        kind = type(model).__name__
        raise NoByteTable(f"the tokenizer of the {name} is a {kind}, whose tokens do not spell the bytes of a text")
    if isinstance(model, models.BPE) and (suffix := model.end_of_word_suffix or model.continuing_subword_prefix):
        raise NoByteTable(f"the tokens of the {name} mark words by {quote(suffix)} and not by their spaces")
    steps = list_steps(backend.decoder)
    kinds = [step["type"] for step in steps]
    if "ByteLevel" in kinds and set(kinds) <= {"ByteLevel", "Fuse"}:
        return "byte_level"
    if kinds and set(kinds) <= PIECE_DECODERS and _replaces_spaces(steps):
        return "pieces"
    listed = " and ".join(kinds) or "none"
    raise NoByteTable(f"the decoder of the {name}'s tokenizer ({listed}) does not spell the bytes of a text")


def _replaces_spaces(steps: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether a decoder writes spaces for the character of SentencePiece, and replaces nothing else."""
    replaced = [step for step in steps if step["type"] == "Replace"]
    if any(step["pattern"].get("String") != SPACE or step["content"] != " " for step in replaced):
        return False
    return bool(replaced) or any(step["type"] == "Metaspace" and step["replacement"] == SPACE for step in steps)


def _make_alphabet() -> dict[str, int]:
    """Return GPT-2's alphabet: the byte of each character of a byte-level token."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


_ALPHABET = _make_alphabet()


def _spell_byte_level(text: str) -> bytes | None:
    """Return the bytes of a byte-level token; None where it has a character outside of the alphabet."""
    try:
        return bytes(_ALPHABET[character] for character in text)
    except KeyError:
        return None


def _spell_piece(text: str) -> bytes:
    """Return the bytes of a token in the style of SentencePiece."""
    match = _BYTE_PIECE.fullmatch(text)
    return bytes([int(match[1], 16)]) if match else text.replace(SPACE, " ").encode()


def _spell_added(text: str, alphabet: Alphabet) -> bytes:
    """Return the bytes of an added token that is text."""
    return text.encode() if alphabet == "byte_level" else text.replace(SPACE, " ").encode()


def _drops_first_space(tokenizer: Tokenizer, bytes_of: Mapping[int, bytes]) -> bool:
    """Return whether the text of a token by itself lacks the space that the token begins with."""
    spaced = next((i for i, text in bytes_of.items() if text[:1] == b" " and text.strip().isalpha()), None)
    return spaced is not None and not str(tokenizer.hf.decode([spaced])).startswith(" ")
