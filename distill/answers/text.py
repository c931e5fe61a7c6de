"""One spelling for answers: Unicode signs, LaTeX spacing, delimiters, currencies and units are written in one way."""

from __future__ import annotations

import re
import unicodedata

_SUPERSCRIPTS = {ord(sign): f"^{{{digit}}}" for sign, digit in zip("⁰¹²³⁴⁵⁶⁷⁸⁹", "0123456789", strict=True)}
_SIGNS = {
    **_SUPERSCRIPTS,
    **{ord(sign): "-" for sign in "\u2212\u2013—\u2010\u2011﹣"},
    ord("\u00d7"): r"\times ",
    ord("·"): r"\cdot ",
    ord("⋅"): r"\cdot ",
    ord("÷"): "/",
    ord("π"): r"\pi ",
    ord("∞"): r"\infty ",
    ord("≤"): r"\le ",
    ord("≥"): r"\ge ",
    ord("±"): r"\pm ",
    ord("\u222a"): r"\cup ",
    ord("∩"): r"\cap ",
    ord("∈"): r"\in ",
    ord("∅"): r"\emptyset ",
    ord("°"): r"^\circ ",
    ord("\u2044"): "/",
    ord("\uff0c"): ",",
    ord("。"): ".",
    ord("“"): '"',
    ord("”"): '"',
    ord("\u2019"): "'",
    ord("…"): "...",
}
_ROOT = re.compile(r"√\s*(?:\(([^()]*)\)|(\w+))")
_VULGAR = re.compile(r"(\d?)([¼-¾⅐-⅞])")
_SPACING = re.compile(r"\\[!,;:> ]|\\(?:q?quad|hspace|vspace)\b(?:\{[^{}]*\})?|(?<!\\)~")
_SIZING = re.compile(r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|textstyle|limits|nolimits)(?![a-zA-Z])\s*")
_TEXT = re.compile(
    r"\\(?:text(?:bf|it|rm|sf|tt|normal)?|mbox|mathrm|mathbf|mathit|operatorname|boldsymbol)\s*\{([^{}]*)\}"
)
_DELIMITERS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("**", "**"), ("__", "__"), ("`", "`"))
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")
_APPROXIMATELY = re.compile(
    r"^(?:\\approx|\\sim|≈|~|about|approximately|approx\.?|roughly)(?![a-z])\s*|(?<=\.\d)\.{3}$"
)
_SHORT_FRACTION = re.compile(r"\\frac\s*(\d)\s*(\d)|\\frac\s*(\d)\s*\{|\\frac\s*\{([^{}]*)\}\s*(\d)")


def unify_signs(text: str) -> str:
    """Return a text whose Unicode digits and mathematical signs are ASCII or LaTeX."""
    if text.isascii():
        return text
    text = _VULGAR.sub(lambda m: f"{m[1]} {unicodedata.normalize('NFKC', m[2])}" if m[1] else m[2], text)
    text = _ROOT.sub(lambda m: rf"\sqrt{{{m[1] or m[2]}}}", text.translate(_SIGNS))
    return unicodedata.normalize("NFKC", text).translate(_SIGNS)


def strip_delimiters(text: str) -> str:
    """Return a text without the delimiters of formulas and emphasis around it, and without a full stop at its end."""
    while True:
        before = text
        text = text.strip().rstrip(";,")
        text = text[:-1] if text.endswith(".") and not text.endswith("..") else text
        for opening, closing in _DELIMITERS:
            inner = text[len(opening) : len(text) - len(closing)]
            whole = text.startswith(opening) and text.endswith(closing) and len(text) > len(opening + closing)
            if whole and opening not in inner:
                text = inner
        if text == before:
            return text


def unwrap_text(text: str) -> str:
    r"""Return LaTeX whose words are not wrapped in \text{} and its relatives."""
    while (unwrapped := _TEXT.sub(r" \1 ", text)) != text:
        text = unwrapped
    return text


def normalise(text: str) -> str:
    r"""Return an answer in one spelling: without delimiters, LaTeX spacing, \text{}, thousands separators."""
    text = strip_delimiters(unify_signs(text))
    text = re.sub(r"(?<=\d)(?:,\\!|\{,\})\s*(?=\d{3})", "", text)
    text = _SIZING.sub("", text.replace(r"\{", r"\lbrace ").replace(r"\}", r"\rbrace "))
    text = _SPACING.sub(" ", text.replace(r"\\", "\0").replace(r"\,", "").replace(r"\!", "")).replace("\0", r"\\")
    text = re.sub(r"\\[dtc]frac", r"\\frac", text)
    if not re.search(r"\\(?:sin|cos|tan|cot|sec|csc)", text):
        text = re.sub(r"\^\s*\{?\s*\\circ\s*\}?|\\degree|\\deg\b", " degrees ", text)
    text = unwrap_text(text)
    text = text.replace(r"\%", "%").replace(r"\leq", r"\le").replace(r"\geq", r"\ge")
    text = _THOUSANDS.sub(_join_thousands, text)
    text = _SHORT_FRACTION.sub(_brace_fraction, text)
    text = _APPROXIMATELY.sub("", strip_delimiters(text))
    return re.sub(r"\s+", " ", text).strip()


def _join_thousands(match: re.Match[str]) -> str:
    """Return a number without its thousands separators; inside brackets a comma separates two numbers."""
    before = match.string[: match.start()].replace(r"\lbrace", "(").replace(r"\rbrace", ")")
    is_inside = sum(before.count(sign) for sign in "([") > sum(before.count(sign) for sign in ")]")
    return match[0] if is_inside else match[0].replace(",", "")


def _brace_fraction(match: re.Match[str]) -> str:
    if match[1]:
        return rf"\frac{{{match[1]}}}{{{match[2]}}}"
    return rf"\frac{{{match[3]}}}{{" if match[3] else rf"\frac{{{match[4]}}}{{{match[5]}}}"


def squeeze(text: str) -> str:
    """Return a normalised answer without spaces and redundant braces, to be compared as a string."""
    return re.sub(r"(?<=[_^])\{(\w)\}", r"\1", re.sub(r"\s+", "", text))


def fold_words(text: str) -> str:
    """Return words in lower case without quotes, punctuation around them and a leading article."""
    text = re.sub(r"\s+", " ", text.strip(" \t\n.,;:!?\"'()*`").casefold())
    return re.sub(r"^(?:the|an?) (?=\w)", "", text)


def split_top_level(text: str, separators: str = ",;") -> list[str]:
    """Return the parts of a text between separators that stand outside of all brackets."""
    parts, depth, start = [], 0, 0
    text = text.replace(r"\lbrace", "\1").replace(r"\rbrace", "\2")
    for i, sign in enumerate(text):
        depth += (sign in "([{\1") - (sign in ")]}\2")
        if depth <= 0 and sign in separators:
            parts.append(text[start:i])
            start = i + 1
    parts.append(text[start:])
    return [part.replace("\1", r"\lbrace").replace("\2", r"\rbrace").strip() for part in parts]
