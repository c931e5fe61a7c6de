"""Words of real questions: which tokens belong together, in a table by hand and with a real tokenizer."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from genssd.distill.demo.parts import PAIR
from genssd.distill.score.words import group_words
from genssd.engine.texts.text import Tokenizer


@pytest.mark.parametrize(
    ("pieces", "words"),
    [
        (["did", " Nat", "alia", " sell"], [1, 2, 2, 3]),
        (["Nat", "alia", ",", " who", "?", "!"], [1, 1, 2, 3, 4, 5]),
        (["don", "'", "t", " we", "ll", "-", "known"], [1, 1, 1, 2, 2, 2, 2]),
        (["teachers", "'", " room"], [1, 2, 3]),
        ([" $", "5", ".", "5", "0", "."], [1, 1, 1, 1, 1, 2]),
        (["5", "0", "%", " of", " 1", "/", "2"], [1, 1, 1, 2, 3, 3, 3]),
        ([" -", "3", " -", " ", "4", "5"], [1, 1, 2, None, 3, 3]),
        (["3", ",", " ", "4", "\n", "\n"], [1, 2, None, 3, None, None]),
        (["April", ", ", "for", " ", "each", ".\n"], [1, 1, 2, None, 3, 3]),
        (["one", "\u2014", "two", " (", "three", ")"], [1, 2, 3, 4, 5, 6]),
        (["a", "b c", "d"], [1, 1, 1]),
        (["", "\u00e9", "t", "", "\u00e9"], [1, 1, 1, 1, 1]),
        (["\u4f60", "\u597d", "\u5417", "?"], [1, 2, 3, 4]),
        (["\u0939\u093f", "\u0928\u094d", "\u0926\u0940"], [1, 1, 1]),
        ([], []),
    ],
)
def test_tokens_of_one_word(pieces: list[str], words: list[int | None]) -> None:
    assert group_words(pieces) == words


@given(st.lists(st.text(alphabet="ab1 .,$-'\n\u00e9\u4f60", max_size=3), max_size=12))
def test_words_end_at_white_space_however_they_are_cut(pieces: list[str]) -> None:
    words = group_words(pieces)
    for left, right, one, other in zip(pieces, pieces[1:], words, words[1:], strict=False):
        if left and right and (left[-1].isspace() or right[0].isspace()):
            assert one is None or one != other
        elif left and right and left[-1].isalpha() and right[0].isalpha() and left[-1] < "\u4f60" > right[0]:
            assert one == other
    assert [word is None for word in words] == [piece.isspace() for piece in pieces]


def test_a_question_is_cut_at_its_words() -> None:
    """The small pair's tokenizer cuts every word into characters."""
    tokenizer = Tokenizer(PAIR / "student")
    question = "Natalia sold 48 clips to Ann's friends in April, for $2.50 each."
    pieces = tokenizer.pieces(tokenizer.encode_plain(question))
    assert max(map(len, pieces)) < 7, "no word is one token"
    words: dict[int, str] = {}
    for piece, number in zip(pieces, group_words(pieces), strict=True):
        if number is not None:
            words[number] = words.get(number, "") + piece
    # the comma is one token with the space after it
    expected = ["Natalia", "sold", "48", "clips", "to", "Ann's", "friends", "in", "April,", "for", "$2.50", "each", "."]
    assert [word.strip() for word in words.values()] == expected
