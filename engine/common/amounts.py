"""Amounts in messages: numbers of things with their noun, and numbers of bytes in a unit that reads well."""

from __future__ import annotations

UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")


def format_count(number: int, noun: str) -> str:
    """Return a number of things, the last word of the noun in its plural where it is not one: 1 prompt, 2,000 prompts.

    noun: in its singular.
    """
    return f"{number:,} {noun if number == 1 else make_plural(noun)}"


def make_plural(noun: str) -> str:
    """Return a regular noun in its plural: rows, trajectories, prefixes."""
    if noun.endswith("y") and noun[-2:-1] not in ("a", "e", "o", "u"):
        return f"{noun[:-1]}ies"
    return f"{noun}es" if noun.endswith(("s", "x", "ch", "sh")) else f"{noun}s"


def format_bytes(count: float) -> str:
    """Return a number of bytes in the largest unit that it reaches: 512 bytes, 1.5 KiB, 64 MiB, 2.1 GiB."""
    unit = _choose_unit(count)
    return f"{_format_number(count / 1024**unit)} {UNITS[unit]}"


def format_part(part: float, whole: float) -> str:
    """Return a part and the whole of some bytes in the unit of the whole: 0.5 of 64 MiB."""
    unit = _choose_unit(whole)
    return f"{_format_number(part / 1024**unit)} of {format_bytes(whole)}"


def _choose_unit(count: float) -> int:
    """Return the index of the largest unit of which there is at least one; 1000 KiB and more are MiB."""
    unit = 0
    while count >= 1000 and unit + 1 < len(UNITS):
        count, unit = count / 1024, unit + 1
    return unit


def _format_number(number: float) -> str:
    """Return a number with one decimal, where it is below 100 and not whole."""
    return f"{number:.0f}" if number >= 99.95 or abs(number - round(number)) < 0.05 else f"{number:.1f}"
