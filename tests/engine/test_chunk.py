"""Where a chunk ends, against the definition on whole texts."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genssd.engine.common.errors import InputError
from genssd.engine.decoding.chunk import Chunk, ChunkEnd


def length_of(chunk: Chunk, token_texts: list[str]) -> int | None:
    """Tokens until ChunkEnd says so; None when it never does."""
    end = ChunkEnd(chunk)
    for count, text in enumerate(token_texts, 1):
        if end.reached(text):
            return count
    return None


def defined_length(chunk: Chunk, token_texts: list[str]) -> int | None:
    """The first token, at or after `tokens`, in which an occurrence of the delimiter ends; `limit` at the latest."""
    for count in range(1, len(token_texts) + 1):
        if count == chunk.longest:
            return count
        if chunk.until is None or count < chunk.tokens:
            continue
        before, text = "".join(token_texts[: count - 1]), "".join(token_texts[:count])
        starts = range(len(text) - len(chunk.until) + 1)
        ends = [i + len(chunk.until) for i in starts if text.startswith(chunk.until, i)]
        if any(end > len(before) for end in ends):
            return count
    return None


@settings(max_examples=400, deadline=None)
@given(
    tokens=st.integers(1, 6),
    extra=st.none() | st.integers(0, 6),
    until=st.none() | st.text("ab", min_size=1, max_size=4),
    texts=st.lists(st.text("abc", max_size=4), max_size=14),
)
def test_equals_the_definition(tokens: int, extra: int | None, until: str | None, texts: list[str]) -> None:
    chunk = Chunk(tokens=tokens, until=until, limit=None if extra is None else tokens + extra)
    assert length_of(chunk, texts) == defined_length(chunk, texts)


@pytest.mark.parametrize(
    ("chunk", "texts", "expected"),
    [
        (Chunk(tokens=3, until=None), ["x"] * 9, 3),
        (Chunk(tokens=3, until="\n"), ["\n", "x", "x", "x", "a\nb", "x"], 5),
        (Chunk(tokens=3, until="\n"), ["x", "x", "\n", "x"], 3),
        (Chunk(tokens=3, until="\n"), ["x"] * 9, 6),
        (Chunk(tokens=3, until="\n", limit=4), ["x"] * 9, 4),
        (Chunk(tokens=3, until="\n\n"), ["x", "x", "\n", "\n", "x"], 4),
        (Chunk(tokens=3, until="\n\n"), ["x", "\n", "\n", "x", "\n", "y"], 3),
        (Chunk(tokens=4, until="\n\n", limit=20), ["x", "\n", "\n", "\n", "x"], 4),
        (Chunk(tokens=4, until="\n\n", limit=20), ["x", "\n", "\n", "x", "\n", "x", "\n", "\n"], 8),
        (Chunk(tokens=1, until="."), ["."], 1),
    ],
)
def test_examples(chunk: Chunk, texts: list[str], expected: int) -> None:
    assert length_of(chunk, texts) == expected


def test_the_limit_is_twice_the_tokens_unless_given() -> None:
    assert Chunk(tokens=5).longest == 10
    assert Chunk(tokens=5, limit=7).longest == 7
    assert Chunk(tokens=5, until=None).longest == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": 0}, "tokens must be at least 1, not 0"),
        ({"until": ""}, "until must be None or a non-empty string"),
        ({"tokens": 8, "limit": 7}, "limit 7 is smaller than chunk tokens 8"),
    ],
)
def test_a_bad_option_is_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Chunk(**options)  # type: ignore[arg-type]
