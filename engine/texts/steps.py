"""Reasoning steps: the sentences and lines of a response, as spans of its tokens."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import accumulate, pairwise

# after a full stop before white space and more text (not inside of 3.5), and after line breaks
_BOUNDARY = re.compile(r"(?<=[.!?])(?=\s+\S)|(?<=\n)(?=[^\n])")
_SHORTEST = 4  # characters that are not white space; shorter fragments like "1." join the step after them


def step_spans(pieces: Sequence[str]) -> list[tuple[int, int]]:
    """Return the steps of a response as [start, end) spans of its tokens, in order; they cover every token.

    pieces: the text of each token (see `Tokenizer.pieces`). A token belongs to the step that holds its first
    character. A full stop ends a step wherever white space follows, "Mr. Smith" included. Fragments of fewer than four
    characters join the step after them, at the end of the text the one before.
    """
    if not pieces:
        return []
    text = "".join(pieces)
    offsets = [0, *accumulate(map(len, pieces))][: len(pieces)]
    edges = [0, *(match.start() for match in _BOUNDARY.finditer(text) if match.start() > 0), len(text)]
    starts: list[int] = []
    begin = 0
    for _, end in pairwise(edges):
        if len("".join(text[begin:end].split())) >= _SHORTEST:
            starts.append(begin)
            begin = end
    if not starts:
        return [(0, len(pieces))]
    starts[0] = 0
    # each step begins with the first token whose first character lies in it; a step inside one long token has none
    firsts: list[int] = []
    token = 0
    for start in starts:
        while token < len(offsets) and offsets[token] < start:
            token += 1
        if token < len(offsets) and (not firsts or token > firsts[-1]):
            firsts.append(token)
    return list(pairwise([*firsts, len(pieces)]))
