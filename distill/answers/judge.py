"""The one judge of answers: whether a response gives the reference answer.

This module decides what is compared; numbers are compared exactly, words as strings, and formulas by math-verify.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial

from genssd.distill.answers.forms import (
    WRONG,
    Verdict,
    compare_answers,
    has_words,
    is_choice,
    undecidable,
)
from genssd.distill.answers.numbers import parse_quantity
from genssd.distill.answers.reading import Kind, drop_dollars, read_answer, read_reference
from genssd.distill.answers.text import fold_words, normalise
from genssd.distill.answers.thoughts import KNOWN_TAGS, Tags, ThoughtReader, drop_thoughts
from genssd.engine.texts.text import Tokenizer

MAX_REFERENCE = 20_000
"""Number of characters above which a reference answer is not read."""


def judge(response: str, answer: str | None, *, tags: Tags = KNOWN_TAGS, thought_is_open: bool = False) -> Verdict:
    """Judge whether a response gives the reference answer, by what follows its last closed thought.

    tags: pairs of the tags around thoughts. thought_is_open: whether the prompt opened a thought. A response without an
    answer is wrong; undecidable is what cannot be compared, with the reason.
    """
    if answer is None or not answer.strip():
        return undecidable("there is no reference answer")
    if len(answer) > MAX_REFERENCE:
        return undecidable(f"the reference answer is longer than {MAX_REFERENCE} characters")
    reference, kind = classify_reference(answer)
    if not reference:
        return undecidable("the reference answer is empty")
    text = drop_thoughts(response, tags, thought_is_open=thought_is_open)
    if text is None or not text.strip():
        return WRONG
    given = read_answer(text, kind)
    if given is not None:
        return compare_answers(reference, given)
    return compare_answers(reference, text) if kind != "mathematics" and len(text) <= 2 * len(answer) else WRONG


@lru_cache(maxsize=4096)
def classify_reference(answer: str) -> tuple[str, Kind]:
    """Return a reference answer, normalised, and its kind."""
    reference = normalise(drop_dollars(read_reference(answer)))
    if is_choice(reference):
        return reference, "choice"
    words = parse_quantity(reference) is None and has_words(reference)
    return reference, "words" if words or not fold_words(reference) else "mathematics"


class AnswerJudge:
    """The judge of the responses of one tokenizer's model: it knows the tags of thoughts in the chat template."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._reader = ThoughtReader(tokenizer)

    def for_prompt(self, prompt_ids: Sequence[int]) -> Callable[[str, str | None], Verdict]:
        """Return the function that judges texts of responses to a prompt against a reference answer."""
        return partial(judge, tags=self._reader.tags, thought_is_open=self._reader.opens_thought(prompt_ids))

    def judge(self, prompt_ids: Sequence[int], response_ids: Sequence[int], answer: str | None) -> Verdict:
        """Judge a response by its token ids; a thought that the prompt opened must be closed in the response."""
        return self.for_prompt(prompt_ids)(self._reader.read(response_ids), answer)
