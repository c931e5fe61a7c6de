"""Words of a text, and the tokens that each of them is made of.

A word is a run of letters, marks and digits. One punctuation mark between two of them belongs to the word (don't, 5.50,
1/2, well-known), and so do the sign of a number and its currency or percent sign. In scripts without spaces between
words every character is a word. All other punctuation stands alone.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from itertools import accumulate

UNSPACED = (
    "CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN",
)  # fmt: skip
"""First words of the Unicode names of characters of scripts without spaces between words."""

SEPARATORS = frozenset('\u2013\u2014\u2026()[]{}"\u201c\u201d')
"""Punctuation that divides words also where no space stands beside it: dashes, an ellipsis, brackets, quotes."""


def group_words(pieces: Sequence[str]) -> list[int | None]:
    """Return the number of the word that each token belongs to, in order; None for white space.

    pieces: the text that each token completes; empty for a token that is the beginning of a character. Tokens that
    share a word, and the words that share a token, have one number.
    """
    text = "".join(pieces)
    starts = list(accumulate(map(len, pieces), initial=0))
    groups: list[int | None] = []
    number = 0
    for i, piece in enumerate(pieces):
        if piece.isspace():
            groups.append(None)
            continue
        before = text[starts[i] - 1 : starts[i]] if i else ""
        # without ", " the words on both sides would be one: a mark that ends in white space goes with the word before
        is_glued = piece[-1:].isspace() and not (before.isspace() or piece[0].isspace())
        goes_on = groups[-1:] not in ([], [None]) and (not pieces[i - 1] or is_glued or _is_inside(text, starts[i]))
        number += not goes_on
        groups.append(number)
    return groups


def _is_inside(text: str, place: int) -> bool:
    """Return whether a place between two characters of a text lies inside a word."""
    if not 0 < place < len(text):
        return False
    left, right = text[place - 1], text[place]
    if _is_letter(left) and _is_letter(right):
        return not (_is_unspaced(left) or _is_unspaced(right)) or _is_mark(right)
    before_left, after_right = text[place - 2 : place - 1], text[place + 1 : place + 2]
    if _is_letter(right):
        return _joins(before_left, left, right)
    return _is_letter(left) and _joins(left, right, after_right)


def _joins(left: str, mark: str, right: str) -> bool:
    """Return whether a character that is no letter is part of the word beside it. left, right: may be empty."""
    if mark.isspace() or mark in SEPARATORS:
        return False
    if unicodedata.category(mark) == "Sc" or mark == "%":
        return left.isdigit() or right.isdigit()
    if mark in "+-\u2212" and right.isdigit() and not _is_letter(left):
        return True
    return _is_letter(left) and _is_letter(right)


def _is_letter(character: str) -> bool:
    """Return whether a character is a letter, a mark, a digit or an invisible joiner; an empty text is none."""
    return bool(character) and (unicodedata.category(character)[0] in "LMN" or character in "_\u200c\u200d")


def _is_mark(character: str) -> bool:
    return unicodedata.category(character)[0] == "M"


def _is_unspaced(character: str) -> bool:
    return unicodedata.name(character, "").startswith(UNSPACED)
