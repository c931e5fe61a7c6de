"""Chunks: the rule by which a candidate ends, and its application token by token."""

from __future__ import annotations

import numbers
from dataclasses import dataclass, replace

from genssd.engine.common.errors import InputError
from genssd.engine.common.options_check import check_types

DEFAULT_TOKENS = 64
"""Value of `Chunk.tokens` where None is given: a few lines of a solution, so that the student chooses often."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """The rule by which a candidate ends: a chunk is the piece of a response that the student judges at once.

    A chunk ends with the first token that completes the delimiter `until` at or after `tokens` tokens, at `limit` at
    the latest; a delimiter before does not end it. until=None ends it at exactly `tokens`.
    """

    tokens: int | None = None
    """Number of tokens after which a chunk ends with the next delimiter. None: 64 in Python; `genssd select` chooses
    it once from plain responses of the teacher, so that the student chooses about 8 times in each."""
    until: str | None = "\n"
    """Delimiter that ends a chunk; None ends it after exactly `tokens` tokens."""
    limit: int | None = None
    """Maximum number of tokens in a chunk; None allows twice `tokens`."""
    shortest: int = 8
    """Number of tokens below which a response's last chunk is judged together with the end of its history."""

    def __post_init__(self) -> None:
        check_types(self)
        if self.tokens is not None and self.tokens < 1:
            raise InputError(f"chunk tokens must be at least 1, not {self.tokens}")
        if self.until == "":
            raise InputError("chunk until must be None or a non-empty string")
        if self.shortest < 0:
            raise InputError(f"chunk shortest must be at least 0, not {self.shortest}")
        if self.limit is not None and self.limit < 1:
            raise InputError(f"chunk limit must be at least 1, not {self.limit}")
        if self.limit is not None and self.tokens is not None and self.limit < self.tokens:
            raise InputError(f"chunk limit {self.limit} is smaller than chunk tokens {self.tokens}")

    @staticmethod
    def of(chunk: Chunk | int) -> Chunk:
        """Return a rule as it is, and Chunk(tokens=number) for a number. Raises InputError on anything else."""
        if isinstance(chunk, Chunk):
            return chunk
        if isinstance(chunk, numbers.Integral) and not isinstance(chunk, bool):
            return Chunk(tokens=int(chunk))
        raise InputError(f"chunk must be a Chunk or a number of tokens, not {chunk!r}")

    def halved(self, min_tokens: int) -> Chunk | None:
        """Return the rule with half of the tokens and half of the limit, but at least `min_tokens`; None if it is there
        already."""
        if self.least <= min_tokens:
            return None
        tokens = max(self.least // 2, min_tokens)
        return replace(self, tokens=tokens, limit=None if self.limit is None else max(self.limit // 2, tokens))

    @property
    def least(self) -> int:
        """Number of tokens from which on a delimiter ends a chunk: `tokens`, or where it is None at most 64."""
        return min(DEFAULT_TOKENS, self.limit or DEFAULT_TOKENS) if self.tokens is None else self.tokens

    @property
    def longest(self) -> int:
        """Maximum number of tokens in a chunk."""
        if self.until is None:
            return self.least
        return 2 * self.least if self.limit is None else self.limit


class ChunkEnd:
    """The end of one candidate's chunk, searched token by token."""

    __slots__ = ("_chunk", "_count", "_tail")

    def __init__(self, chunk: Chunk) -> None:
        self._chunk = chunk
        self._count = 0
        self._tail = ""

    def reached(self, token_text: str) -> bool:
        """Add the text of the next token; return whether the chunk ends with it."""
        chunk = self._chunk
        self._count += 1
        if self._count >= chunk.longest:
            return True
        if chunk.until is None:
            return False
        recent = self._tail + token_text
        # a delimiter may span tokens, but one that was complete before must not count twice
        self._tail = recent[-(len(chunk.until) - 1) :] if len(chunk.until) > 1 else ""
        return self._count >= chunk.least and chunk.until in recent
