"""Prompts to ids, and the text of a growing token sequence."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.toys import save_tokenizer

from genssd.engine.common.errors import InputError
from genssd.engine.decoding.chunk import Chunk, ChunkEnd
from genssd.engine.texts.text import Tokenizer
from genssd.engine.texts.text_stream import TextStream


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory: Path = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(directory)
    return Tokenizer(directory)


@given(text=st.text(min_size=1, max_size=30))
def test_a_stream_gives_the_text_back(tokenizer: Tokenizer, text: str) -> None:
    """One token per byte: every character beyond ASCII is split."""
    if "\ufffd" in text:
        return
    stream = TextStream(tokenizer)
    assert "".join(stream.push(token) for token in tokenizer.encode(text, special=False)) == text


def test_a_delimiter_of_several_bytes_ends_a_chunk(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("\u7b54\u6848\u3002\u4e8c", special=False)
    end, stream = ChunkEnd(Chunk(tokens=1, until="\u3002", limit=50)), TextStream(tokenizer)
    ended = [i for i, token in enumerate(ids) if end.reached(stream.push(token))]
    assert ended == [8]


def test_bytes_that_are_no_character_do_not_hold_the_stream(tokenizer: Tokenizer) -> None:
    byte = tokenizer.encode("\u00e9", special=False)[0]
    stream = TextStream(tokenizer)
    texts = [stream.push(byte) for _ in range(4)]
    assert texts[:3] == ["", "", ""]
    assert texts[3] == "\ufffd"  # three may still be the beginning of a character
    assert stream.push(tokenizer.encode("a", special=False)[0]) == "\ufffd" * 3 + "a"
    assert stream.rest() == ""


def test_ids_of_any_integer_type_are_a_prompt(tokenizer: Tokenizer) -> None:
    for prompt in ([5, 6], (5, 6), np.array([5, 6]), [np.int64(5), np.int32(6)]):
        assert tokenizer.encode_prompt(prompt) == [5, 6]  # type: ignore[arg-type]
    for prompt in (np.array([0.5]), [None], {"role": "user"}):
        with pytest.raises(InputError, match="a prompt is a string"):
            tokenizer.encode_prompt(prompt)  # type: ignore[arg-type]
