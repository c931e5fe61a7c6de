r"""Reading of the final answer in a response without its thoughts.

In this order: the last \boxed{}; a closing line of the form "#### answer"; a stated final answer ("The answer is ...");
the last number or formula. An answer that is not finished, such as "9 * 2 =", is no answer.
"""

from __future__ import annotations

import re
from typing import Literal

from genssd.distill.answers.forms import has_words, is_choice, is_mathematics
from genssd.distill.answers.numbers import CURRENCY, parse_quantity
from genssd.distill.answers.text import normalise, strip_delimiters, unify_signs

Kind = Literal["mathematics", "choice", "words"]
"""Kind of the reference answer, which decides what of a sentence is read."""

MAX_STATEMENT = 2000
"""Number of characters after "The answer is" that are read."""

MAX_TAIL = 20_000
"""Number of characters at the end of a response among which the last number is searched."""

_BOX = re.compile(r"\\f?boxed\s*(?:\{|(?=[\w\\]))")
_BETWEEN_BOXES = re.compile(r"(?:[\s$]|\\text\s*\{\s*(?:and|or)?\s*,?\s*\}|\\q?quad|,|;|\band\b|\bor\b)*")
_CLOSING_LINE = re.compile(r"(?:^|(?<=\s))####(?!#)\s*(\S.*)$")
_HEADING = re.compile(
    r"\W*(?:step|part|case|section|solution|explanation|note|problem|question|summary|conclusion|verification|check|"
    r"approach|method|analysis|reasoning|example)\b|.*:\W*$",
    re.IGNORECASE,
)
_LEAD = re.compile(
    r"<answer>"
    r"|\b(?:answer|(?:correct|right|best)\s+(?:option|choice))s?(?:\s+(?:to|for|of)\s+[^.\n:=]{1,80}?)?[*_]*"
    r"(?:\s*[:=]|\s+(?:is|are|was|would be|must be|should be|equals|will be)\b:?)"
    r"|^[^\w\n]{0,12}(?:the\s+)?(?:final\s+)?answers?[ \t*_#]*$"
    r"|答案(?:是|为|\uff1a|:)",
    re.IGNORECASE | re.MULTILINE,
)
_FILLER = re.compile(
    r"(?:[\s:*_]|(?:therefore|thus|then|simply|indeed|also|hence|so|option|choice|equal to|given by)\b)+", re.IGNORECASE
)
_REFUSAL = re.compile(r"(?:not|never|wrong|correct|right|incorrect|clear|found|unknown|in|yet)\b", re.IGNORECASE)
_RANGE = re.compile(r"(?:between\b.*\band|from\b.*\bto)\s", re.IGNORECASE)
_AMOUNT = r"\$(?>-?\d+(?:,\d+)*(?:\.\d+)?)(?![\w$])(?!,?\s*[-+*/^=\\_])(?!\s*[,;][^$a-zA-Z\n]*\$)"
_SPAN = (
    r"\$\$(?P<display>[^$]+)\$\$|\$(?P<inline>(?:\\\$|[^$\n]){1,400})\$|\\\((?P<round>[^\n]{1,400}?)\\\)"
    r"|\\\[(?P<square>[^\]]{1,400}?)\\\]"
)
_NUMBER = (
    rf"(?<![\w.])(?:{CURRENCY}\s?)?(?:\d+\s+\d+/\d+(?![\d/])|\d{{1,3}}(?:,\d{{3}})+(?!\d)(?:\.\d+)?|\d+(?::\d+)+"
    r"|\d+\s?/\s?\d+(?![\d/])|(?:\d+(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+\b|(?:\s?(?:\\times|\\cdot|[x*])\s?10)?\s?\^\s?\{?-?\d+\}?)?"
    r"|-?\\frac\s*\{[^{}\n]*\}\s*\{[^{}\n]*\})(?:\s?\\?%|\s?percent\b)?"
)
_ITEM = re.compile(rf"{_AMOUNT}|{_SPAN}|{_NUMBER}", re.DOTALL)
_PLAIN_NUMBER = re.compile(_NUMBER)
_UNFINISHED = re.compile(
    r"(?:[=+*/\u00d7÷·^]|\\times|\\cdot|\\div|\s-|[=+\-*/\u00d7÷·]\s*(?:\.{2,}|…|_+|\?+))[\s$*)\\\]]*$"
)
_OPERATOR_BEFORE = re.compile(
    r"[\d)%}]\s*(?:[-+*/\u00d7÷·^]|\\times|\\cdot|\\div|\bx|\btimes|\bplus|\bminus)\s*\$?\s*\(?$"
)
_OPERATOR_AFTER = re.compile(r"\s*(?:[+*\u00d7÷=^](?!\*)|\\times|\\cdot|\\div|/\s*\(?\d|-\s?\(?\d)")
_ARITHMETIC = re.compile(r"[\d.,\s()+\-*/\u00d7÷·$%]|\\times|\\cdot|\\div|\\?[$%]")
_SENTENCE_END = re.compile(r"[.!?。](?=\s|$|\*|\")|\n|</answer>")


def read_reference(answer: str) -> str:
    """Return what a reference answer gives: its box, closing line or statement, where it is a worked solution."""
    text = answer.strip()
    for found in (read_box(text), read_closing_line(text)):
        if found:
            return found
    if len(text.split()) > 3 and (statements := list(_iter_statements(text))):
        return statements[0]
    return text


def read_answer(text: str, kind: Kind) -> str | None:
    """Return the final answer in a response without thoughts; None where it has none, or none that is finished."""
    boxed = read_box(text)
    if boxed is not None:
        return _strip_sentence(boxed, kind) or None
    closing = read_closing_line(text)
    if closing is not None and not _LEAD.search(closing):
        return _finish(closing, kind)
    for statement in _iter_statements(text):
        if not statement or _UNFINISHED.search(statement):
            return None
        if _RANGE.match(statement):
            return None
        if not _REFUSAL.match(statement):
            return _finish(statement, kind)
    if kind == "mathematics":
        return _read_last_mathematics(text)
    return _read_last_choice(text) if kind == "choice" else _read_last_words(text)


def read_box(text: str) -> str | None:
    r"""Return the content of the last \boxed{}, of several joined by "and" or commas all; "" where it is not closed."""
    contents: list[str] = []
    start: int | None = None
    for match in reversed(list(_BOX.finditer(text))):
        content, end = _read_braces(text, match)
        if start is not None and (end > start or not _BETWEEN_BOXES.fullmatch(text[end:start])):
            break
        contents.insert(0, content)
        start = match.start()
        if not content:
            break
    return ", ".join(contents) if contents else None


def _read_braces(text: str, match: re.Match[str]) -> tuple[str, int]:
    """Return the content of the braces that a match opens, and where they end; "" where they are not closed."""
    if not match[0].endswith("{"):
        bare = re.compile(r"\w|\\[a-zA-Z]+").match(text, match.end())
        return (bare[0], bare.end()) if bare else ("", match.end())
    depth = 1
    for brace in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, match.end()):
        depth += (brace[0] == "{") - (brace[0] == "}")
        if depth == 0:
            return text[match.end() : brace.start()].strip(), brace.end()
    return "", match.end()


def read_closing_line(text: str) -> str | None:
    """Return the answer after "####" on the last line of a text; None where there is none, or it is a heading."""
    lines = text.rstrip().splitlines()
    match = _CLOSING_LINE.search(lines[-1]) if lines else None
    return None if match is None or _HEADING.match(match[1]) else match[1].strip()


def _iter_statements(text: str) -> list[str]:
    """Return what the text states as its answer, the last statement first."""
    return [_read_statement(text, match.end()) for match in reversed(list(_LEAD.finditer(text)))]


def _read_statement(text: str, start: int) -> str:
    """Return the rest of the sentence that begins at a position; a full stop in a formula does not end it."""
    text = text[start : start + MAX_STATEMENT]
    filler = _FILLER.match(text)
    text = text[filler.end() :] if filler else text
    formula = re.match(rf"(?!{_AMOUNT})(?:{_SPAN})", text, re.DOTALL)
    position = formula.end() if formula else 0
    while formula and (another := _next_formula(text, position)):
        position = another
    option = re.compile(r"\(?[A-Z]\)?\.(?=\s+\S)").match(text)
    end = _SENTENCE_END.search(text, option.end() if option else position)
    return text[: end.start() if end else len(text)].strip().strip("*").strip()


def _next_formula(text: str, position: int) -> int | None:
    """Return the end of a formula that "and", "or" or a comma joins to the one that ends at a position."""
    match = re.compile(rf"\s*(?:,|;|,?\s*and\b|,?\s*or\b)\s*(?:{_SPAN})", re.DOTALL).match(text, position)
    return match.end() if match else None


def _finish(statement: str, kind: Kind) -> str | None:
    """Return the answer in a statement; None where it is not finished."""
    if _UNFINISHED.search(statement):
        return None
    answer = _strip_sentence(statement, kind)
    return None if kind == "mathematics" and _is_unevaluated(answer) else answer or None


def _strip_sentence(statement: str, kind: Kind) -> str:
    """Return the answer in a statement without the words around it, where the reference is mathematics."""
    text = normalise(drop_dollars(statement))
    if kind == "choice":
        letter = re.match(r"\(?([A-Z])\)?(?:,| (?:because|since|as|which)\b)", text)
        return letter[1] if letter else text
    if kind != "mathematics" or is_mathematics(text) or is_choice(text):
        return text
    option = re.match(r"(?:\([A-Z]\)|[A-Z][.):])\s*(?=\S)", text)
    if option and is_mathematics(text[option.end() :]):
        return text[option.end() :]
    for pattern in (
        r".*(?:=|\bis\b|\bare\b|:)\s*(.+)",
        r"(.*?)(?:,? (?:because|since|as|which|where|for|per|each|when)\b.*)",
    ):
        match = re.fullmatch(pattern, text, re.DOTALL)
        if match and is_mathematics(match[1]):
            return match[1]
    formulas = [match for match in _ITEM.finditer(statement) if match.lastgroup]
    if formulas and not _PLAIN_NUMBER.match(statement):
        return _content(formulas[-1])
    first = re.match(rf"(?:{_NUMBER})(?:\s+[^\W\d_]+)?", text)
    if first:
        quantity = first[0] if parse_quantity(first[0]) else first[0].rsplit(maxsplit=1)[0]
        is_part = _OPERATOR_AFTER.match(text, first.end()) or re.compile(r"[\w\\({^]").match(text, first.end())
        return "" if is_part else quantity
    return _read_last_mathematics(text) or "" if re.search(r"\d", text) and has_words(text) else text


def drop_dollars(statement: str) -> str:
    """Return a statement in which formulas have no delimiters."""
    return _ITEM.sub(lambda match: _content(match) if match.lastgroup else match[0], statement)


def _content(match: re.Match[str]) -> str:
    """Return a formula without its delimiters."""
    return str(match[match.lastgroup]) if match.lastgroup else match[0]


def _is_unevaluated(answer: str) -> bool:
    """Return whether an answer is arithmetic on plain numbers that nobody evaluated, such as 9 * 2."""
    text = unify_signs(strip_delimiters(answer))
    if _ARITHMETIC.sub("", text):
        return False
    quantity = parse_quantity(text)
    if quantity is None:
        return bool(re.search(r"[\d)]\s*(?:[-+*/]|\\times|\\cdot|\\div)\s*[\d(]", text))
    return "/" in text and quantity.value.denominator == 1


def _read_last_mathematics(text: str) -> str | None:
    """Return the last number or formula of a text; None where it is a part of arithmetic without a result."""
    text = text.rstrip()[-MAX_TAIL:]
    heading = re.search(r"(?:^|\n)#{1,6}\s+([^\n]*)$", text)
    if _UNFINISHED.search(text[-40:]) or (heading and _HEADING.match(heading[1])):
        return None
    plain = normalise(text) if len(text) < MAX_STATEMENT else ""
    if plain and is_mathematics(plain) and "\n" not in text:
        return _finish_formula(plain)
    if len(text) < MAX_STATEMENT:
        tail = re.split(r"(?:\b(?:is|are|gives?|equals?)\b|:)\s*", _last_sentence(text))[-1]
        if re.match(r"[^$]*\\[a-zA-Z][^$]*$|[(\[{][^$]*$", tail) and is_mathematics(normalise(tail)):
            return _finish_formula(normalise(tail))
    items = list(_ITEM.finditer(text))
    if not items:
        return None
    last = items[-1]
    before, after = text[max(0, last.start() - 40) : last.start()], text[last.end() : last.end() + 20]
    if last.lastgroup:
        return _finish_formula(_content(last) + (" %" if re.match(r"\s?\\?%|\s?percent", after) else ""))
    if _OPERATOR_AFTER.match(after) or _OPERATOR_BEFORE.search(before):
        return None
    sign = "-" if re.search(r"(?:^|[\s=(:$*])[-\u2212]\s?\$?$", before) else ""
    unit = re.match(r"\s?([^\W\d_]+)", after)
    number = sign + last[0]
    named = f"{number} {unit[1]}" if unit else number
    return None if _is_unevaluated(number) else named if parse_quantity(normalise(named)) else number


def _finish_formula(formula: str) -> str | None:
    """Return the last side of a chain of equations; None where it is arithmetic that nobody evaluated."""
    if _UNFINISHED.search(formula):
        return None
    sides = re.split(r"(?<![<>!\\])=", formula)
    return None if _is_unevaluated(sides[-1]) else formula


def _last_sentence(text: str) -> str:
    """Return the last sentence of a text."""
    stripped = text.strip().rstrip(".!。*")
    ends = [match.end() for match in re.finditer(r"[.!?。]\s|\n", stripped)]
    return stripped[ends[-1] if ends else 0 :].strip()


def _read_last_choice(text: str) -> str | None:
    """Return the letter of the option that a text without a statement chooses: at its beginning or at its end."""
    text = text.strip()
    if is_choice(normalise(text)):
        return normalise(text)
    sentence = _last_sentence(text)
    end = re.search(r"\b(?:is|be|option|choice|choose|pick|select|:)\s*\W{0,3}\(?([A-Z])\)?\W{0,3}$", sentence)
    formulas = [match for match in _ITEM.finditer(sentence) if match.lastgroup]
    if formulas and is_choice(normalise(_content(formulas[-1]))):
        return normalise(_content(formulas[-1]))
    named = re.search(r"(?:\(([A-Z])\)|\b([A-Z]))\W{0,3} is (?:the )?(?:correct|right|best|answer)", sentence)
    first = re.match(r"\W{0,3}\(?([A-Z])[).:](?=\s)", text)
    for match in (end, named, first):
        if match:
            return str(next(group for group in match.groups() if group))
    return None


def _read_last_words(text: str) -> str | None:
    """Return the words after the last verb of a text without a statement, or all of a text that is one short line."""
    sentence = _last_sentence(text)
    spans = [match for match in _ITEM.finditer(sentence) if match.lastgroup]
    match = re.fullmatch(
        r".*?(?:\b(?:is|are|was|were|be|becomes?|equals)\s+|[:=]\s*)(?!not\b)(.+)", sentence, re.DOTALL
    )
    if spans and spans[-1].end() == len(sentence):
        return _content(spans[-1])
    if match:
        return match[1].strip()
    return sentence if "\n" not in text.strip() and len(sentence.split()) <= 3 else text.strip() or None
