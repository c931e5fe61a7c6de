"""The splitter against a reading of the text character by character."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.toys import save_tokenizer
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models
from transformers import PreTrainedTokenizerFast

from genssd.engine.texts.steps import step_spans
from genssd.engine.texts.text import Tokenizer

Spans = list[tuple[int, int]]


def slow_steps(text: str) -> list[int]:
    """Where every step of a text begins."""
    cuts = []
    for place in range(1, len(text)):
        after_stop = text[place - 1] in ".!?" and text[place].isspace() and bool(text[place:].strip())
        after_line = text[place - 1] == "\n" and text[place] != "\n"
        if after_stop or after_line:
            cuts.append(place)
    steps: list[str] = []
    waiting = ""
    for begin, end in pairwise([0, *cuts, len(text)]):
        waiting += text[begin:end]
        if sum(not c.isspace() for c in waiting) >= 4:
            steps.append(waiting)
            waiting = ""
    if waiting and steps:
        steps[-1] += waiting
    starts = [0]
    for step in steps:
        starts.append(starts[-1] + len(step))
    return starts[: max(1, len(steps))]


def slow_spans(pieces: list[str]) -> Spans:
    """Every token with the step that holds its first character; a token without any counts as where it stands."""
    starts = slow_steps("".join(pieces))
    offset, owners = 0, []
    for piece in pieces:
        owners.append(max(i for i, start in enumerate(starts) if start <= offset))
        offset += len(piece)
    return [(owners.index(i), len(owners) - owners[::-1].index(i)) for i in sorted(set(owners))]


PIECES = st.lists(
    st.one_of(
        st.sampled_from(
            [
                "",
                "a",
                "word",
                " ",
                ". ",
                ".",
                "?",
                "! ",
                "\n",
                "\n\n",
                " \n",
                "3.5",
                "1.",
                "é",
                "€ ",
                "\u3000",
                "\ufffd",
            ]
        ),
        st.sampled_from(["One. Two three. Four five!", "first\nsecond\n\nthird", "abcd. e", "a. b. c. d. efgh. "]),
        st.text(st.sampled_from(list("ab.!? \n\t日")), max_size=6),
        st.text(max_size=3),
    ),
    max_size=14,
)


@given(pieces=PIECES)
def test_the_step_of_a_token_holds_its_first_character(pieces: list[str]) -> None:
    assert step_spans(pieces) == (slow_spans(pieces) if pieces else [])


@given(pieces=PIECES)
def test_the_steps_tile_the_tokens(pieces: list[str]) -> None:
    spans = step_spans(pieces)
    assert [t for start, end in spans for t in range(start, end)] == list(range(len(pieces)))
    assert all(start < end for start, end in spans)


def texts(text: str) -> list[str]:
    """The steps of a text whose tokens are its characters."""
    return [text[start:end] for start, end in step_spans(list(text))]


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("We buy 3.5 apples. Then eat.", ["We buy 3.5 apples.", " Then eat."]),
        ("It is 3. 5 follow", ["It is 3.", " 5 follow"]),
        ("Really?! Yes, really... So it is.", ["Really?!", " Yes, really...", " So it is."]),
        ("line one\nline two\n\nline three", ["line one\n", "line two\n\n", "line three"]),
        ("First part.\n\nNext part.", ["First part.", "\n\nNext part."]),
        ("windows\r\nlines\r\n", ["windows\r\n", "lines\r\n"]),
        ("1. Add them. 2. Done here.", ["1. Add them.", " 2. Done here."]),
        ("Mr. Smith came. He left.", ["Mr. Smith came.", " He left."]),
        ("Here Mr. Smith came.", ["Here Mr.", " Smith came."]),  # too long to be taken for a fragment
        ("So. It. Is. Over now. Ok.", ["So. It.", " Is. Over now. Ok."]),
        ("One step without an end", ["One step without an end"]),
        ("One step. ", ["One step. "]),
        ("One step.   ", ["One step.   "]),
        ("ok.", ["ok."]),
        ("a. b.", ["a. b."]),
        ("   ", ["   "]),
        ("\n\n", ["\n\n"]),
        ("A full one.\nok", ["A full one.\nok"]),
        ('He said so." She did.', ['He said so." She did.']),
    ],
)
def test_texts(text: str, steps: list[str]) -> None:
    assert texts(text) == steps
    assert step_spans([text]) == [(0, 1)]


def test_no_token_no_step() -> None:
    assert step_spans([]) == []
    assert step_spans(["", ""]) == [(0, 2)]


def test_a_token_that_spans_steps_belongs_to_the_one_it_begins_in() -> None:
    assert step_spans(["Good", " day. And", " more. This", " too"]) == [(0, 2), (2, 3), (3, 4)]
    assert step_spans(["abcd", "e. One step. Two", " steps. Three", " now"]) == [(0, 2), (2, 3), (3, 4)]


# the text of single tokens


@given(data=st.lists(st.integers(0, 255), max_size=12))
def test_pieces_of_any_bytes_join_to_the_text(byte_tokenizer: Tokenizer, data: list[int]) -> None:
    """`Tokenizer.pieces`: 'joined, they are the text of all'."""
    pieces = byte_tokenizer.pieces(data)
    assert len(pieces) == len(data)
    assert "".join(pieces) == byte_tokenizer.decode(data)


@given(text=st.text(max_size=12))
def test_pieces_of_any_text_join_to_it(byte_tokenizer: Tokenizer, text: str) -> None:
    ids = byte_tokenizer.encode(text, special=False)
    assert "".join(byte_tokenizer.pieces(ids)) == text
    cut = byte_tokenizer.pieces(ids[:-1])  # perhaps inside a character
    assert "".join(cut) == byte_tokenizer.decode(ids[:-1])


@pytest.fixture(scope="module")
def byte_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("bytes")
    save_tokenizer(directory)
    return Tokenizer(directory)


def test_pieces_of_a_tokenizer_that_strips_the_first_space(tmp_path: Path) -> None:
    """Llama 2's decoder and its like: the text of a token alone has lost the space in front of it."""
    words = ["<unk>", "▁Three", "▁and", "▁four", ".", "▁Then", "▁more", "!"]
    raw = RawTokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    PreTrainedTokenizerFast(tokenizer_object=raw).save_pretrained(tmp_path)
    tokenizer = Tokenizer(tmp_path)
    ids = [1, 2, 3, 4, 5, 6, 7]
    assert tokenizer.decode(ids) == "Three and four. Then more!"
    pieces = tokenizer.pieces(ids)
    assert "".join(pieces) == tokenizer.decode(ids)
    assert step_spans(pieces) == [(0, 4), (4, 7)]
