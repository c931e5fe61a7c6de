"""Stop strings: texts at which a response ends, searched in the text of its tokens as they are written.

A response ends with the token that completes a string. The string itself and what follows it in that token are cut off,
unless it is included. Where the string begins inside a token, the text of that token before it is kept as other tokens,
so that the text of the kept tokens is exactly the text before the string.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from genssd.engine.common.errors import InputError
from genssd.engine.texts.text_stream import REPLACEMENT

if TYPE_CHECKING:
    from genssd.engine.texts.text import Tokenizer
    from genssd.engine.texts.text_stream import PieceStream

HEAD_TOKENS = 16
"""Maximum number of tokens that keep the beginning of a token; a longer one is not kept."""
CONTEXT = 8
"""Number of tokens before the kept piece of a token with which its text is compared."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StopStrings:
    """Texts of which each ends a response."""

    texts: tuple[str, ...] = ()
    is_included: bool = False
    """Whether the response keeps the text, with the whole token that completes it."""

    def __post_init__(self) -> None:
        if "" in self.texts:
            raise InputError("stop: an empty text is in every response; leave it out")

    @property
    def slack(self) -> int:
        """Number of tokens that a chunk may have beyond its limit, so that it does not end inside a stop string: all
        but the last byte of the longest one, as every token of text has at least a byte."""
        return max((len(text.encode()) for text in self.texts), default=1) - 1

    @property
    def most_head_tokens(self) -> int:
        """Maximum number of tokens that keep the beginning of a token in which a string begins."""
        return HEAD_TOKENS if self.texts and not self.is_included else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class StopMatch:
    """A stop string that a chunk has completed."""

    text: str
    """The string."""
    num_kept: int
    """Number of the chunk's tokens whose text lies before it."""
    head: str
    """Text between these tokens and the string: the beginning of the token in which the string begins."""


class StopSearch:
    """The search for stop strings in one chunk, token by token.

    stream: at the beginning of the text. before: last tokens of the response before the chunk. No chunk ends inside the
    beginning of a string (`is_open`), but one that repeats it may have to: what is committed then stays.
    """

    __slots__ = ("_ends", "_has_wide", "_longest", "_pieces", "_stops", "_stream", "_tail")

    def __init__(self, stops: StopStrings, stream: PieceStream, before: Sequence[int]) -> None:
        self._stops = stops
        self._stream = stream
        self._longest = max(map(len, stops.texts))
        self._has_wide = any(not text.isascii() for text in stops.texts)
        self._tail = self._keep_tail("".join(map(stream.push, before[-stops.slack :] if stops.slack else ())))
        self._pieces: list[str] = []
        self._ends: list[int] = []

    def find(self, token_id: int) -> StopMatch | None:
        """Add the next token; return the string that is complete with it, None where none is. Of several, the one that
        begins first."""
        unfinished, piece = self._stream.peek(), self._stream.push(token_id)
        before = self._ends[-1] if self._ends else 0
        length = before + len(piece)
        self._pieces.append("")
        self._ends.append(length)
        # the text is that of the last token that does not wait
        writer = max(0, len(self._ends) - 1 - self._stream.num_waiting)
        if unfinished and writer == len(self._ends) - 1 > 0 and piece.startswith(unfinished):
            # the token has not completed the character of those before it
            self._ends[-2] = before + len(unfinished)
            self._pieces[-2], self._pieces[-1] = unfinished, piece[len(unfinished) :]
        else:
            self._pieces[writer] += piece
            self._ends[writer:] = [length] * (len(self._ends) - writer)
        # a token may complete a character and begin another one, with which its text comes
        waiting = self._stream.peek().rstrip(REPLACEMENT)
        if not piece and not waiting:
            return None
        recent = self._tail + piece + waiting
        places = [(place, text) for text in self._stops.texts if (place := recent.find(text)) >= 0]
        self._tail = self._keep_tail(self._tail + piece)
        if not places:
            return None
        place, text = min(places, key=lambda found: found[0])
        return self._match(max(0, length + len(waiting) - len(recent) + place), text, waiting)

    @property
    def is_open(self) -> bool:
        """Whether the text so far ends with the beginning of a string, so that the next token may complete it."""
        if self._has_wide and self._stream.num_waiting:
            return True
        return any(
            self._tail.endswith(text[:length]) for text in self._stops.texts for length in range(1, len(text))
        )  # fmt: skip

    def _match(self, start: int, text: str, waiting: str) -> StopMatch:
        """Return the match of a string. start: its place in the text of the chunk. waiting: text of waiting tokens."""
        whole = max((end for end in (0, *self._ends) if end <= start), default=0)
        # tokens of the first bytes of the string's first character have no text of their own: they go with it
        num_kept = 0 if whole == 0 else self._ends.index(whole) + 1
        head = "".join((*self._pieces[num_kept:], waiting))[: start - whole]
        return StopMatch(text=text, num_kept=num_kept, head=head)

    def _keep_tail(self, text: str) -> str:
        return text[-(self._longest - 1) :] if self._longest > 1 else ""


def encode_head(head: str, before: Sequence[int], tokenizer: Tokenizer) -> list[int]:
    """Return tokens that spell a text after other tokens; none where the tokenizer has none that do. before: these."""
    if not head or REPLACEMENT in head:
        return []
    context = list(before[-CONTEXT:])
    text = str(tokenizer.hf.decode(context))
    anchor = tokenizer.encode_plain("a")
    # tokenizers that put a space before a text put none inside of one
    for ids in (tokenizer.encode_plain(head), tokenizer.encode_plain("a" + head)[len(anchor) :]):
        if ids and str(tokenizer.hf.decode([*context, *ids])) == text + head:
            return ids
    return []
