"""Where a candidate chunk ends."""

from __future__ import annotations

from dataclasses import dataclass

from genssd.engine.errors import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """A chunk ends with the first token that completes the delimiter `until` at or after `tokens` tokens, at `limit` at
    the latest. until=None ends it at exactly `tokens`."""

    tokens: int = 256
    until: str | None = "\n"
    limit: int | None = None
    """None: twice `tokens`."""
    shortest: int = 8
    """A response's last chunk with fewer tokens is judged together with the end of its history. Ours."""

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise InputError(f"chunk tokens must be at least 1, not {self.tokens}")
        if self.until == "":
            raise InputError("chunk until must be None or a non-empty string")
        if self.shortest < 0:
            raise InputError(f"chunk shortest must be at least 0, not {self.shortest}")
        if self.limit is not None and self.limit < self.tokens:
            raise InputError(f"chunk limit {self.limit} is smaller than chunk tokens {self.tokens}")

    @property
    def longest(self) -> int:
        """Tokens of the longest chunk possible."""
        if self.until is None:
            return self.tokens
        return 2 * self.tokens if self.limit is None else self.limit


class ChunkEnd:
    """Follows one candidate token by token and says when its chunk is complete."""

    __slots__ = ("_chunk", "_count", "_tail")

    def __init__(self, chunk: Chunk) -> None:
        self._chunk = chunk
        self._count = 0
        self._tail = ""

    def reached(self, token_text: str) -> bool:
        """Take the text of the next token; True when the chunk ends with it."""
        chunk = self._chunk
        self._count += 1
        if self._count >= chunk.longest:
            return True
        if chunk.until is None:
            return False
        seen = self._tail + token_text
        # a delimiter may span tokens, but one that was complete before does not count again
        self._tail = seen[-(len(chunk.until) - 1) :] if len(chunk.until) > 1 else ""
        return self._count >= chunk.tokens and chunk.until in seen
