"""Comparison of one answer with the reference answer, by the form that the reference has.

Numbers are compared exactly, words and letters as strings, lists and sets part by part, everything else as mathematics
by math-verify.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from genssd.distill.answers.formulas import TIME_LIMIT, compare_formulas
from genssd.distill.answers.numbers import Quantity, are_equal, parse_quantity
from genssd.distill.answers.text import fold_words, normalise, split_top_level, squeeze

Outcome = Literal["correct", "wrong", "undecidable"]

MAX_LENGTH = 1000
"""Number of characters above which a formula is not given to math-verify."""
MAX_PARTS = 32
"""Number of parts above which lists are not compared in any order."""
MAX_WORDS = 8
"""Number of words above which a reference is prose, of which other wordings can be right as well."""

_WORD = re.compile(r"(?<![\\a-zA-Z])(?:[^\W\d_]{3,}|(?i:it|is|he|we|so|of|to|at|by|an|my|if|be|do|no|us|on|up|as)\b)")
_ENVIRONMENT = re.compile(r"\\(?:begin|end)\s*\{\w+\*?\}(?:\{[clr|]+\})?")
_FUNCTION = re.compile(
    r"a?(?:sin|cos|tan|cot|sec|csc)h?|arc(?:sin|cos|tan)|log|exp|sqrt|frac|pmod|mod|lim|max|min|gcd|lcm|det|and"
)
"""Names that a formula can contain without a backslash."""
_CHOICE = re.compile(r"\(?([A-Z])\)?[.):]?")
_OPTION = re.compile(
    r"(?:(?i:option|choice)\s+)?(?:\(([A-Z])\)[.:]?|([A-Z])[).:])\s*(?P<content>[^\s(^_*/+=].*)", re.DOTALL
)
_ASSIGNMENT = re.compile(
    r"\\?[a-zA-Z]+(?:_\{?\w+\}?)?(?:\([a-z, ]*\))?\s*(?<![<>!\\])=(?!=)\s*(?P<right>[^=]+)", re.DOTALL
)
_BASE = re.compile(r"([0-9A-Z]+)(?:_\{?(\d+)\}?)?")
_RATIO = re.compile(r"\d+(?::\d+)+")
_RELATION = re.compile(r"[<>=]|\\(?:le|ge|neq?|cup|cap|infty|mathbb|setminus|in)(?![a-z])")
_MEMBERSHIP = re.compile(
    r"^(?:\\?[a-zA-Z]+\s*\\in(?![a-z])|(?:\([a-z](?:\s*,\s*[a-z])+\)|[a-zA-Z])\s*=(?=\s*[(\[{\\]))\s*"
)
_FACTOR = re.compile(r"(\\frac\s*\{[^{}]*\}\s*\{[^{}]*\})\s*(?=\d)")
"""A fraction before a number, which math-verify would ignore."""
_BRACKETS = {"(": ")]", "[": ")]", r"\lbrace": (r"\rbrace",), "{": "}", r"\langle": (r"\rangle",)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Judgement of one response."""

    outcome: Outcome
    reason: str | None = None
    """Why it is undecidable; None where it is not."""

    @property
    def is_correct(self) -> bool:
        """Whether the response gives the reference answer. An undecidable response does not count as correct."""
        return self.outcome == "correct"

    @property
    def undecided(self) -> str | None:
        """Why the response could not be judged; None where it was."""
        return self.reason if self.outcome == "undecidable" else None


CORRECT = Verdict(outcome="correct")
WRONG = Verdict(outcome="wrong")


def undecidable(reason: str) -> Verdict:
    """Return the verdict on what cannot be judged."""
    return Verdict(outcome="undecidable", reason=reason)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Collection:
    kind: Literal["bare", "set", "ordered"]
    brackets: str
    parts: tuple[str, ...]


def is_choice(text: str) -> bool:
    """Return whether a normalised answer is the letter of an option."""
    return _CHOICE.fullmatch(text) is not None


def has_words(text: str) -> bool:
    """Return whether a normalised answer has words that are neither LaTeX commands nor names of functions."""
    text = _ENVIRONMENT.sub(" ", text)
    return any(not _FUNCTION.fullmatch(word.lower()) for word in _WORD.findall(text))


def is_mathematics(text: str) -> bool:
    """Return whether a normalised answer is a number, with a unit perhaps, or a formula."""
    return parse_quantity(text) is not None or not (has_words(text) or is_choice(text))


def compare_answers(reference: str, response: str) -> Verdict:
    """Compare the answer of a response with the reference answer; both are texts without anything around them."""
    expected, given = normalise(reference), normalise(response)
    if max(len(expected), len(given)) > 2 * MAX_LENGTH and expected != given:
        return undecidable(f"an answer is longer than {2 * MAX_LENGTH} characters")
    try:
        return _compare(expected, given)
    except RecursionError:
        return undecidable("an answer is nested too deeply")


def _compare(reference: str, response: str) -> Verdict:
    """Compare two normalised answers."""
    if not response:
        return WRONG
    if squeeze(reference) == squeeze(response):
        return CORRECT
    expected, given = parse_quantity(reference), parse_quantity(response)
    if expected is not None and given is not None:
        return _compare_quantities(expected, given)
    verdict = _compare_choices(reference, response)
    in_words = expected is None and has_words(reference)
    if verdict is None and in_words and _parse_collection(reference) is None:
        verdict = _compare_words(reference, response)
    if verdict is None:
        verdict = _compare_collections(reference, response)
    if verdict is None and in_words:
        verdict = _compare_words(reference, response)
    if verdict is None:
        verdict = _compare_notations(reference, response)
    return _compare_formulas(reference, response) if verdict is None else verdict


def _compare_quantities(reference: Quantity, response: Quantity) -> Verdict:
    if not are_equal(reference, response):
        return WRONG
    if reference.nouns and response.nouns and not reference.nouns & response.nouns:
        return undecidable("the numbers are equal, the words after them are not")
    return CORRECT


def _compare_choices(reference: str, response: str) -> Verdict | None:
    """Compare letters of options; None where neither answer is one."""
    expected, given = _split_option(reference), _split_option(response)
    if expected[0] and given[0]:
        return CORRECT if expected[0] == given[0] else WRONG
    if expected[0]:
        if expected[1]:
            return _compare(expected[1], response)
        if len(response) == 1 and response.isalpha():
            return CORRECT if response.upper() == expected[0] else WRONG
        return undecidable("the reference is the letter of an option, the response gives something else")
    if given[0]:
        if given[1]:
            return _compare(reference, given[1])
        return undecidable("the response gives the letter of an option, the reference something else")
    return None


def _split_option(text: str) -> tuple[str, str]:
    """Return the letter of an option and what stands after it; both empty where the text is none."""
    text = re.sub(r"^(?:option|choice|answer)\s+(?=\(?[A-Za-z]\b)", "", text, flags=re.IGNORECASE)
    if match := _CHOICE.fullmatch(text):
        return match[1], ""
    if match := _OPTION.fullmatch(text):
        return match[1] or match[2], match["content"].strip()
    return "", ""


def _compare_words(reference: str, response: str) -> Verdict:
    expected, given = fold_words(reference), fold_words(response)
    if expected == given:
        return CORRECT
    if re.match(rf"{re.escape(expected)}\s*(?:[,;(:.]|\b(?:because|since|as|which|who)\b)", given):
        return CORRECT
    if len(expected.split()) > MAX_WORDS:
        return undecidable("the reference is prose, which the response puts into other words")
    if re.search(r"\d|\\[a-z]", expected) and re.search(r"\d|\\[a-z]", given):
        return undecidable("the reference has words and numbers, which the response writes in another way")
    return WRONG


def _parse_collection(text: str) -> _Collection | None:
    """Return the parts of a list, a set, a tuple or an interval; None where the answer is none."""
    text = _MEMBERSHIP.sub("", text).strip()
    for opening, closings in _BRACKETS.items():
        if text.startswith(opening) and (closing := next((c for c in closings if text.endswith(c)), None)):
            inner = text[len(opening) : -len(closing)]
            parts = _expand(split_top_level(inner))
            if not _is_balanced(inner) or len(parts) < 2:
                break
            kind: Literal["set", "ordered"] = "set" if opening in ("{", r"\lbrace") else "ordered"
            return _Collection(kind=kind, brackets=opening + closing, parts=parts)
    if r"\begin" in text or (len(text.split()) > MAX_WORDS and has_words(text)):
        return None
    joined = re.sub(r",?\s+\\?\b(?:and|or)\b\s+", ",", text)
    parts = _expand(split_top_level(joined))
    return _Collection(kind="bare", brackets="", parts=parts) if len(parts) > 1 and all(parts) else None


def _is_balanced(text: str) -> bool:
    depth = 0
    for sign in text:
        depth += (sign in "([") - (sign in ")]")
        if depth < 0:
            return False
    return depth == 0


def _expand(parts: list[str]) -> tuple[str, ...]:
    r"""Return the parts with a part of \pm as two."""
    expanded: list[str] = []
    for part in parts:
        expanded += [part.replace(r"\pm", sign) for sign in "+-"] if part.count(r"\pm") == 1 else [part]
    return tuple(part.strip() for part in expanded)


def _compare_collections(reference: str, response: str) -> Verdict | None:
    """Compare lists, sets, tuples and intervals part by part; None where neither answer is one."""
    if r"\cup" in reference or r"\cup" in response:
        return _compare_unions(reference, response)
    expected, given = _parse_collection(reference), _parse_collection(response)
    if expected is None and given is None:
        return None
    if expected is None or given is None:
        single = _merge_equal(expected or given)
        if single is not None:
            return _compare(single, response) if expected else _compare(reference, single)
        can_be_equal = _RELATION.search(reference) or _RELATION.search(response)
        return None if can_be_equal else WRONG
    if expected.brackets and given.brackets and expected.brackets != given.brackets:
        return WRONG
    if len(expected.parts) != len(given.parts):
        return WRONG
    if "ordered" in (expected.kind, given.kind):
        return _combine([_compare(a, b) for a, b in zip(expected.parts, given.parts, strict=True)])
    return _compare_in_any_order(expected.parts, given.parts)


def _merge_equal(collection: _Collection | None) -> str | None:
    """Return the last part of a list without brackets whose parts are the same answer in several forms."""
    if collection is None or collection.kind != "bare" or len(collection.parts) > MAX_PARTS:
        return None
    *others, last = collection.parts
    return last if all(_compare(last, other).is_correct for other in others) else None


def _compare_unions(reference: str, response: str) -> Verdict | None:
    expected, given = reference.split(r"\cup"), response.split(r"\cup")
    if len(expected) != len(given):
        return None
    return _compare_in_any_order([part.strip() for part in expected], [part.strip() for part in given])


def _compare_in_any_order(reference: tuple[str, ...] | list[str], response: tuple[str, ...] | list[str]) -> Verdict:
    if len(reference) > MAX_PARTS:
        return undecidable(f"the reference has more than {MAX_PARTS} parts")
    remaining, verdicts = list(response), []
    for part in reference:
        judged = [_compare(part, other) for other in remaining]
        best = next((i for i, verdict in enumerate(judged) if verdict.is_correct), None)
        if best is None:
            verdicts += [next((verdict for verdict in judged if verdict.undecided), WRONG)]
        else:
            del remaining[best]
    return _combine(verdicts)


def _combine(verdicts: list[Verdict]) -> Verdict:
    """Return the verdict on all parts: wrong where one is wrong, else undecidable where one is."""
    if WRONG in verdicts:
        return WRONG
    return next((verdict for verdict in verdicts if not verdict.is_correct), CORRECT)


def _compare_notations(reference: str, response: str) -> Verdict | None:
    """Compare equations, numbers with a base, and ratios; None where the answers are other formulas."""
    expected, given = _ASSIGNMENT.fullmatch(reference), _ASSIGNMENT.fullmatch(response)
    if expected and given and squeeze(reference.split("=")[0]) == squeeze(response.split("=")[0]):
        return _compare(expected["right"].strip(), given["right"].strip())
    if expected and not _RELATION.search(response):
        return _compare(expected["right"].strip(), response)
    left, *others = re.split(r"(?<![<>!\\])=", response)
    if others and not re.search(r"[<>=]|\\[lg]e|\\neq?", reference):
        return _compare(reference, left.strip() if re.fullmatch(r"\s*[a-zA-Z]\s*", others[-1]) else others[-1].strip())
    digits, other_digits = _BASE.fullmatch(squeeze(reference)), _BASE.fullmatch(squeeze(response))
    if digits and other_digits and (digits[2] or other_digits[2]):
        has_both = digits[2] and other_digits[2]
        return WRONG if digits[1] != other_digits[1] or (has_both and digits[2] != other_digits[2]) else CORRECT
    if _RATIO.fullmatch(squeeze(reference)):
        a, *middle, b = (int(part) for part in squeeze(reference).split(":"))
        is_clock = middle or re.search(r":\d\d$", reference)
        ratio = _RATIO.fullmatch(squeeze(response)) and squeeze(response).replace(":", "/", 1)
        return WRONG if is_clock or b == 0 else _compare(f"{a}/{b}", ratio or response)
    return WRONG if _RATIO.fullmatch(squeeze(response)) else None


def _compare_formulas(reference: str, response: str) -> Verdict:
    """Compare two answers as mathematics by math-verify."""
    unit, other_unit = _split_unit(reference), _split_unit(response)
    if unit[1] and other_unit[1] and unit[1] != other_unit[1]:
        return WRONG
    reference, response = unit[0], other_unit[0]
    if has_words(response) or not re.search(r"\w", response):
        return WRONG
    if max(len(reference), len(response)) > MAX_LENGTH:
        return undecidable(f"a formula is longer than {MAX_LENGTH} characters")
    plain = [_FACTOR.sub(r"\1 \\cdot ", text) for text in (reference, response)]
    plain = [text.replace(r"\lbrace", r"\{").replace(r"\rbrace", r"\}") for text in plain]
    comparison = compare_formulas(*plain)
    if comparison == "unreadable":
        return undecidable("math-verify finds no mathematics in the reference")
    if comparison == "slow":
        return undecidable(f"math-verify takes longer than {TIME_LIMIT:g} s, or too much memory")
    return CORRECT if comparison == "equal" else WRONG


def _split_unit(text: str) -> tuple[str, str]:
    """Return a formula without the unit after it, and the unit; empty where it has none that is known."""
    match = re.fullmatch(r"(.*\S)(\s(?:square |sq\.? |cubic )?[a-zA-Z]{1,12}(?:\s*\^\s*\{?\d\}?)?)", text, re.DOTALL)
    unit = parse_quantity(f"1{match[2]}") if match else None
    return (match[1], unit.unit) if match and unit and unit.unit and len(match[2].strip()) > 1 else (text, "")
