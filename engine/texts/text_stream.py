"""The text of a token sequence, token by token; joined, it is the text of all tokens."""

from __future__ import annotations

from typing import Any, Protocol

REPLACEMENT = "\ufffd"
"""Character that decoders write for bytes which do not form a character."""
LONGEST_CHARACTER = 4
"""Maximum number of bytes in a UTF-8 character."""
LONGEST_RUN = 64
"""Maximum number of tokens of which each ends inside a character that wait for the one that does not."""


class Decoding(Protocol):
    """What a stream needs of a tokenizer (`Tokenizer` in text.py)."""

    hf: Any
    """The tokenizer object of transformers."""

    @property
    def texts_join(self) -> bool:
        """Whether the texts of tokens join to the text of all."""
        ...

    def token_text(self, token_id: int) -> str:
        """Return the text of one token by itself."""
        ...


class PieceStream(Protocol):
    """A stream of the text that each token completes."""

    @property
    def num_waiting(self) -> int:
        """Number of the last tokens whose text is not returned yet, because it ends inside a character."""
        ...

    def push(self, token_id: int) -> str:
        """Add a token and return the text that it completes."""
        ...

    def peek(self) -> str:
        """Return the text of the tokens that wait, which ends inside a character; none where none waits."""
        ...

    def rest(self) -> str:
        """Return the text of the bytes that still wait, which form no character."""
        ...


def open_stream(tokenizer: Decoding) -> PieceStream:
    """Return a stream at the beginning of a text. Special tokens have their names."""
    return TextStream(tokenizer) if tokenizer.texts_join else WindowStream(tokenizer)


class TextStream:
    """The text of tokens whose texts join to that of all; bytes of an incomplete character wait for the others."""

    __slots__ = ("_tokenizer", "_waiting")

    def __init__(self, tokenizer: Decoding) -> None:
        self._tokenizer = tokenizer
        self._waiting: list[int] = []

    @property
    def num_waiting(self) -> int:
        """Number of the last tokens whose text is not returned yet, because it ends inside a character."""
        return len(self._waiting)

    def push(self, token_id: int) -> str:
        """Add a token and return the text that it completes."""
        text = self._tokenizer.token_text(token_id)
        if not self._waiting and not text.endswith(REPLACEMENT):
            return text
        self._waiting.append(token_id)
        text = str(self._tokenizer.hf.decode(self._waiting))
        if not text.endswith(REPLACEMENT):
            self._waiting = []
            return text
        if len(self._waiting) < LONGEST_CHARACTER:
            return ""
        # the first bytes cannot form a character: they are returned, and those that still may keep waiting
        for num_kept in range(LONGEST_CHARACTER - 1, 0, -1):
            invalid, waiting = self._waiting[:-num_kept], self._waiting[-num_kept:]
            head = str(self._tokenizer.hf.decode(invalid))
            if head + str(self._tokenizer.hf.decode(waiting)) == text:
                self._waiting = waiting
                return head
        if len(self._waiting) < LONGEST_RUN:  # every token ends inside a character that the next one completes
            return ""
        self._waiting = []
        return text

    def peek(self) -> str:
        """Return the text of the tokens that wait, which ends inside a character; none where none waits."""
        return str(self._tokenizer.hf.decode(self._waiting)) if self._waiting else ""

    def rest(self) -> str:
        """Return the text of the bytes that still wait, which form no character."""
        text = str(self._tokenizer.hf.decode(self._waiting)) if self._waiting else ""
        self._waiting = []
        return text


class WindowStream:
    """The text of tokens that depends on the tokens before them, as where SentencePiece drops the first space.

    Each token's text is the difference that it makes to the text of a few tokens.
    """

    __slots__ = ("_before", "_new", "_tokenizer")

    def __init__(self, tokenizer: Decoding) -> None:
        self._tokenizer = tokenizer
        self._before: list[int] = []
        self._new: list[int] = []

    @property
    def num_waiting(self) -> int:
        """Number of the last tokens whose text is not returned yet, because it ends inside a character."""
        return len(self._new)

    def push(self, token_id: int) -> str:
        """Add a token and return the text that it completes."""
        self._new.append(token_id)
        if self._text().endswith(REPLACEMENT) and len(self._new) < LONGEST_CHARACTER:
            return ""
        return self.rest()

    def peek(self) -> str:
        """Return the text of the tokens that wait, which ends inside a character; none where none waits."""
        return self._text()[len(self._decode(self._before)) :] if self._new else ""

    def rest(self) -> str:
        """Return the text of the bytes that still wait, which form no character."""
        piece = self._text()[len(self._decode(self._before)) :]
        if self._new:
            self._before, self._new = self._new, []
        return piece

    def _text(self) -> str:
        return self._decode([*self._before, *self._new])

    def _decode(self, token_ids: list[int]) -> str:
        return str(self._tokenizer.hf.decode(token_ids))
