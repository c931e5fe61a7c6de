"""Rows that are problems: a question with its final answer, which is no response that a model could learn from.

GSM8K's `answer` is a worked solution, which people train on; that of MAWPS, AIME or MATH-500 is "113". A text counts as
a final answer when it is one line that is a number, a formula, the letter of an option, or at most three words.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from genssd.distill.answers.forms import has_words, is_choice, is_mathematics
from genssd.distill.answers.reading import read_box, read_closing_line
from genssd.distill.answers.text import normalise, strip_delimiters
from genssd.distill.answers.thoughts import KNOWN_TAGS
from genssd.distill.data.problems import ANSWER_FIELDS
from genssd.engine.common.errors import InputError
from genssd.engine.texts.chat import THOUGHT_FIELDS

MAX_WORDS = 3
"""Number of words above which a text is a sentence."""
MAX_CHARACTERS = 400
"""Number of characters above which a text is a derivation."""
_CALCULATION = re.compile(r"\d\s*(?:[-+*/^]|\\times|\\cdot|\\div)[^=a-zA-Z]*\d[^=a-zA-Z]*=\s*\S")
"""The beginning of a calculation, such as "48 + 24 = 72", which shows its way; "x = 3" shows none."""


def check_is_no_problem(fields: Mapping[str, Any], completion_fields: Sequence[str], where: str) -> None:
    """Raise InputError naming `where` on a row whose response would be the final answer of its question.

    completion_fields: names of the fields that may hold the response, the most likely ones first.
    """
    if "messages" in fields or any(fields.get(name) for name in THOUGHT_FIELDS):
        return
    name = next((name for name in completion_fields if isinstance(fields.get(name), str)), None)
    if name in ANSWER_FIELDS and is_final_answer(fields[name]):
        raise InputError(
            f"{where}: {name} {fields[name].strip()!r} is a final answer, not a response to learn from. `genssd "
            "select` or `genssd generate` writes responses to problems; a field `response` is taken as it is"
        )


def is_final_answer(text: str) -> bool:
    """Return whether a text is a final answer alone, without a way to it."""
    text = text.strip()
    if not text or "\n" in text or len(text) > MAX_CHARACTERS or any(tags.closing in text for tags in KNOWN_TAGS):
        return False
    closing = read_closing_line(text)
    if closing is not None:
        return text == f"#### {closing}"
    if read_box(text) is not None and not strip_delimiters(text).startswith("\\boxed"):
        return False
    num_words = len(text.split())
    if num_words > MAX_WORDS and has_words(text):
        return False
    answer = normalise(text)
    if is_mathematics(answer) or is_choice(answer):
        return not _CALCULATION.search(answer)
    return num_words <= MAX_WORDS
