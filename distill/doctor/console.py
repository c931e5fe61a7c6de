"""How findings are shown: on a console, with or without colours, and as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from genssd.distill.doctor.findings import Finding, Level, Mark, Piece, count_levels, find_worst
from genssd.engine.common.amounts import format_count

STYLES: dict[Level, str] = {"ok": "green", "warning": "bold yellow", "error": "bold red"}
PIECE_STYLES: dict[Mark, str] = {"text": "", "control": "magenta", "trained": "green", "untrained": "dim"}
LEVEL_WIDTH = 9
"""Columns of the level, with the space after it."""
INDENT = 2
"""Columns by which details are indented."""
FORMAT = "genssd doctor 1"
"""Name and version of the form of the JSON output."""


def show_findings(findings: Sequence[Finding], console: Console) -> None:
    """Print findings with their details and fixes, then how many have each level."""
    for finding in findings:
        style = STYLES[finding.level]
        first = Text.assemble((finding.name, "bold"), ": ", _escape(finding.line))
        _print_beside(Text(finding.level, style=style), first, console)
        if finding.detail:
            _print_beside(Text(), paint(finding.detail), console, indent=INDENT)
        if finding.fix is not None:
            fix = Text(f"-> {_escape(finding.fix)}", style="cyan" if finding.level == "ok" else style)
            _print_beside(Text(), fix, console)
    console.print(Text(describe_counts(findings), style=STYLES[find_worst(findings)]))


def _print_beside(level: Text, text: Text, console: Console, indent: int = 0) -> None:
    """Print a text in the column beside the level, wrapped to the width of the console, without spaces at line ends."""
    left = LEVEL_WIDTH + indent
    for number, line in enumerate(text.wrap(console, max(20, console.width - left), overflow="fold")):
        head = level if number == 0 else Text()
        whole = Text.assemble(head, " " * (left - len(head)), line)
        whole.rstrip()
        console.print(whole, soft_wrap=True)


def describe_counts(findings: Sequence[Finding]) -> str:
    """Return how many findings have each level, in words."""
    counts = count_levels(findings)
    parts = [f"{counts['ok']} ok", format_count(counts["warning"], "warning"), format_count(counts["error"], "error")]
    return ", ".join(parts)


def paint(pieces: Sequence[Piece]) -> Text:
    """Return a detail in colours: control tokens, and what is trained on. Characters that do not print are escaped."""
    text = Text()
    for piece in pieces:
        style = f"{PIECE_STYLES[piece.mark]}{' bold' if piece.is_control else ''}".strip()
        text.append(_escape(piece.text), style=style or None)
    return text


def write_json(findings: Sequence[Finding], command: str | None) -> str:
    """Return findings as one object of JSON. command: the command whose inputs were examined; None without one."""
    report: dict[str, Any] = {
        "format": FORMAT,
        "command": command,
        "level": find_worst(findings),
        "counts": count_levels(findings),
        "findings": [finding.as_json() for finding in findings],
    }
    return json.dumps(report, indent=1, ensure_ascii=False)


def _escape(text: str) -> str:
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)
