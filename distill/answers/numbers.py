"""Exact values of numbers as answers have them: with a currency, a percent sign, a unit, as fractions, as powers."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

MAX_DIGITS = 400
"""Length above which a number is left to math-verify."""
MAX_EXPONENT = 400
"""Power of ten above which a number is left to math-verify."""
ROUNDING = Fraction(1, 10**6)
"""Relative error up to which a rounded decimal equals a fraction that has no finite decimal."""
FLOAT_ROUNDING = Fraction(1, 10**12)
"""Relative error up to which two decimals of many digits are equal: that of computed floating-point numbers."""

CURRENCY = r"(?:\\?[$€£¥₹]|USD|US\$)"
_DECIMAL = r"\d+(?:\.\d*)?|\.\d+"
_VALUE = re.compile(
    rf"(?P<sign>[-+]?)\s*{CURRENCY}?\s*(?P<sign2>-?)\s*(?:"
    r"(?P<whole>\d+)?\s*\\frac\s*\{\s*(?P<minus>-?)\s*(?P<top>\d+)\s*\}\s*\{\s*(?P<bottom>\d+)\s*\}"
    r"|(?:(?P<whole2>\d+)\s+)?(?P<top2>\d+)\s*/\s*(?P<bottom2>\d+)"
    r"|10\s*\^\s*\{?\s*(?P<power2>-?\d+)\s*\}?"
    rf"|(?P<decimal>{_DECIMAL})"
    r"(?:[eE](?P<exponent>[-+]?\d+)|\s*(?:\\times|\\cdot|[x*])\s*10\s*\^\s*\{?\s*(?P<power>-?\d+)\s*\}?)?"
    r")(?P<rest>.*)",
    re.DOTALL,
)
_PERCENT = re.compile(r"(?:%|percent\b|per cent\b|percentage points?\b|pct\b)\s*(.*)", re.DOTALL | re.IGNORECASE)
_SYNONYMS = {
    "cm": "centimeter centimetre",
    "mm": "millimeter millimetre",
    "km": "kilometer kilometre",
    "m": "meter metre",
    "g": "gram gramme",
    "kg": "kilogram kilo",
    "mg": "milligram",
    "l": "liter litre",
    "ml": "milliliter millilitre",
    "s": "second sec",
    "min": "minute",
    "h": "hour hr",
    "day": "day",
    "week": "week",
    "month": "month",
    "year": "year yr",
    "in": "inch inches",
    "ft": "foot feet",
    "yd": "yard",
    "mi": "mile",
    "lb": "pound",
    "oz": "ounce",
    "degree": "degree deg",
    "radian": "radian rad",
    "dollar": "dollar buck",
    "cent": "cent",
    "euro": "euro",
    "mph": "mph",
}
_UNITS = {word: unit for unit, words in _SYNONYMS.items() for word in (unit, *words.split())}
_NO_NOUN = re.compile(
    r"sin|cos|tan|cot|log|ln|exp|sqrt|or|and|pi|if|not|mod|infinity|per|over|plus|minus|times|divided|january|february|"
    r"march|april|may|june|july|august|september|october|november|december|[ap]\.?m\.?|bc|ad"
)
"""Words after a number that make it something else than a count of things."""
_NOUN = re.compile(r"[^\W\d_][^\W\d_.'/-]*(?:[.'/-][^\W\d_]+)*\.?")


_NUMBER_WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
)
_VALUES_OF_WORDS = {word: str(value) for value, word in enumerate(re.findall(r"\w+", _NUMBER_WORDS))}


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantity:
    """A number with what stands around it."""

    value: Fraction
    is_decimal: bool
    """Whether it is written with a decimal point or a power of ten, so that it may be rounded."""
    is_percent: bool
    unit: str
    """Known unit of measurement with its power; empty where it has none."""
    nouns: frozenset[str]
    """Other words after the number, in lower case and without the s of the plural."""


def parse_quantity(text: str) -> Quantity | None:
    """Return the number in a normalised answer, with its unit; None where the answer is not one number."""
    if len(text) > MAX_DIGITS:
        return None
    text = _VALUES_OF_WORDS.get(text.lower(), text)
    match = _VALUE.fullmatch(text.strip())
    value = None if match is None else _read_value(match)
    if match is None or value is None:
        return None
    rest, is_percent = match["rest"], False
    if percent := _PERCENT.fullmatch(rest.strip()):
        rest, is_percent = f" {percent[1]}", True
    unit = _find_unit(rest) if rest.strip() else "dollar^1" if "$" in text else ""
    nouns: frozenset[str] = frozenset()
    if unit is None:
        unit, words = "", rest.lower().split()
        if not rest.startswith(" ") or not all(map(_is_noun, words)):
            return None
        nouns = frozenset(word.strip(".").removesuffix("s") for word in words)
    return Quantity(
        value=value,
        is_decimal=bool(match["decimal"] and ("." in match["decimal"] or match["exponent"] or match["power"])),
        is_percent=is_percent,
        unit=unit,
        nouns=nouns,
    )


def _is_noun(word: str) -> bool:
    readable = len(word) > 2 and _NOUN.fullmatch(word) is not None and (not word.isascii() or set(word) & set("aeiouy"))
    return word in ("of", "in", "to", "a", "by") or bool(readable and not _NO_NOUN.fullmatch(word))


def _read_value(match: re.Match[str]) -> Fraction | None:
    top, bottom = match["top"] or match["top2"], match["bottom"] or match["bottom2"]
    if top:
        if int(bottom) == 0:
            return None
        value = int(match["whole"] or match["whole2"] or 0) + Fraction(int(top), int(bottom))
    else:
        exponent = int(match["exponent"] or match["power"] or match["power2"] or 0)
        if abs(exponent) > MAX_EXPONENT:
            return None
        value = Fraction(match["decimal"] or "1") * Fraction(10) ** exponent
    negative = sum((match[name] or "") == "-" for name in ("sign", "sign2", "minus")) % 2
    return -value if negative else value


def _find_unit(words: str) -> str | None:
    """Return the name of a known unit, with its power; None where the words are not one.

    A unit of one letter needs a space before it: 5m is 5 times m.
    """
    if len(quotient := re.split(r"\s*/\s*|\s+per\s+", words)) == 2:
        above, below = (_find_unit(f" {part.strip()}") for part in quotient)
        return f"{above}/{below}" if above and below else None
    match = re.fullmatch(
        r"(square|sq\.?|cubic)?\s*([a-zA-Z]+)\.?\s*(?:\^\s*\{?(\d)\}?|(squared|cubed))?", words.strip()
    )
    if match is None or (len(match[2]) == 1 and not words[0].isspace()):
        return None
    word = match[2] if match[2] in _UNITS else match[2].lower()
    name = _UNITS.get(word) or _UNITS.get(word.removesuffix("s"))
    power = match[3] or ("2" if (match[1] or match[4] or "").startswith("sq") else "3" if match[1] or match[4] else "1")
    return None if name is None else f"{name}^{power}"


def are_equal(reference: Quantity, response: Quantity) -> bool:
    """Return whether two quantities are the same: value and, where both have a known one, unit.

    25 % is 25 as well as 0.25, because data sets write both; of two percentages only the number counts. A decimal of
    at least six correct digits equals a fraction that has no finite decimal.
    """
    if reference.unit and response.unit and reference.unit != response.unit:
        return False
    values = {response.value}
    if reference.is_percent != response.is_percent:
        values.add(response.value / 100 if response.is_percent else response.value * 100)
    limit = Fraction(0)
    if reference.is_decimal and response.is_decimal:
        limit = FLOAT_ROUNDING
    elif reference.is_decimal != response.is_decimal:
        exact = response.value if reference.is_decimal else reference.value
        limit = ROUNDING if _is_endless(exact) else limit
    return any(abs(value - reference.value) <= limit * abs(reference.value) for value in values)


def _is_endless(value: Fraction) -> bool:
    """Return whether a fraction has no finite decimal."""
    denominator = value.denominator
    for prime in (2, 5):
        while denominator % prime == 0:
            denominator //= prime
    return denominator != 1
