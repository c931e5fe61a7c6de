"""The process that runs math-verify, started by `formulas.py` as a script.

It reads lines of JSON, each a pair (reference, response) of LaTeX, and writes a line for each: "equal", "different" or
"unreadable" where math-verify finds no mathematics in the reference.
"""

from __future__ import annotations

import json
import logging
import resource
import sys

from latex2sympy2_extended import NormalizationConfig
from math_verify import parse, verify
from math_verify.parser import LatexExtractionConfig

MAX_MEMORY = 4 << 30
"""Bytes of address space that the process may take; towers of powers would take all that there is."""

_NORMALISATION = NormalizationConfig(
    basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="last", equations=False
)
"""Units are compared by `forms.py`: math-verify would drop the variable of 5m."""
_CONFIG = [LatexExtractionConfig(boxed_match_priority=0, normalization_config=_NORMALISATION)]


def compare(reference: str, response: str) -> str:
    """Return how math-verify compares two LaTeX formulas. Its own time limit is off: the parent process has one."""
    expected, given = (
        parse(f"\\boxed{{{text}}}", _CONFIG, fallback_mode="no_fallback", parsing_timeout=None)
        for text in (reference, response)
    )
    if not expected:
        return "unreadable"
    is_equal = bool(given) and verify(expected, given, allow_set_relation_comp=True, timeout_seconds=None)
    return "equal" if is_equal else "different"


def main() -> None:
    """Answer every line of standard input until it ends."""
    logging.disable(logging.CRITICAL)
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
    compare("1", "1")  # the first call takes longer than the following ones
    print("ready", flush=True)
    for line in sys.stdin:
        print(compare(*json.loads(line)), flush=True)


if __name__ == "__main__":
    main()
