"""The table of controls as text, for a terminal of 100 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from genssd.distill.score.controls import ControlTable, CriterionControls, TeacherWins
from genssd.distill.score.rank_statistics import RankEstimate
from genssd.engine.common.amounts import format_count

LONGEST_NAME = 17
"""Longest name of a criterion that is written in front of its numbers; a longer one has a line of its own."""
NONE = "-"
WIDTH = 100
"""Number of columns that sentences are wrapped to."""
OVER_ALL = "rho over all"
"""Heading of the correlation over all responses, which is shown where there is none within prompts."""


@dataclass(frozen=True, slots=True)
class Column:
    """A column of the table."""

    heading: str
    subheading: str
    cell: Callable[[CriterionControls], str]
    """Function that returns a criterion's cell."""


COLUMNS = (
    Column("length", "rho", lambda c: format_correlation(c.length)),
    Column("length", OVER_ALL, lambda c: format_correlation(c.length_over_pool) if c.length is None else NONE),
    Column("steps", "rho", lambda c: _format_value(c.steps)),
    Column("teacher", "eta2", lambda c: NONE if c.teacher is None else f"{c.teacher:.2f}"),
    Column("right first", "all pairs", lambda c: format_wins(c.right_first)),
    Column("right first", "eq. length", lambda c: format_wins(c.right_first_at_equal_length)),
    Column("correct | length", "rho", lambda c: format_correlation(c.correct_given_length)),
)


def format_controls(table: ControlTable) -> list[str]:
    """Return the lines of the table, what its columns mean, the notes and the warnings. Empty columns are left out."""
    shown = [column for column in COLUMNS if any(column.cell(controls) != NONE for controls in table.criteria)]
    heads = [[column.heading for column in shown], [column.subheading for column in shown]]
    body = [[column.cell(controls) for column in shown] for controls in table.criteria]
    widths = [max(len(row[k]) for row in (*heads, *body)) for k in range(len(shown))]
    lines = [f"controls of {format_count(table.responses, 'response')} (rankings are turned so that more is better):"]
    if shown:
        lines += [_format_line("", head, widths) for head in heads]
    for controls, row in zip(table.criteria, body, strict=True) if shown else ():
        name = controls.name
        if len(name) > LONGEST_NAME:
            lines.append(f"  {name}")
            name = ""
        lines.append(_format_line(name, row, widths))
    lines += [f"  {line}" for line in _explain(table, {column.heading for column in shown})]
    texts = [f"  {note}" for note in table.notes]
    texts += [f"warning: {controls.warning}" for controls in table.criteria if controls.warning is not None]
    return lines + [line for text in texts for line in textwrap.wrap(text, WIDTH, subsequent_indent="    ")]


def format_correlation(estimate: RankEstimate | None) -> str:
    """Return a correlation with its interval, - for None."""
    if estimate is None:
        return NONE
    return f"{estimate.value:+.2f} [{estimate.low:+.2f},{estimate.high:+.2f}]"


def format_wins(estimate: RankEstimate | None) -> str:
    """Return a fraction of pairs and their number, - for None."""
    return NONE if estimate is None else f"{estimate.value:.0%} of {estimate.number:,}"


def describe_teacher(wins: TeacherWins) -> str:
    """Return how often a teacher's responses rank first at equal length; empty for too few pairs."""
    if wins.equal_length is None:
        return ""
    return f"at equal length first in {format_wins(wins.equal_length)}"


def shorten(name: str, longest: int = 24) -> str:
    """Return the name of a teacher; of a long one, such as a path, its end."""
    return name if len(name) <= longest else f"...{name[3 - longest :]}"


def _format_value(estimate: RankEstimate | None) -> str:
    return NONE if estimate is None else f"{estimate.value:+.2f}"


def _format_line(name: str, cells: Sequence[str], widths: Sequence[int]) -> str:
    padded = (cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
    return f"  {name:<{LONGEST_NAME}} {' '.join(padded)}".rstrip()


def _explain(table: ControlTable, headings: set[str]) -> list[str]:
    """Return what the columns mean, those that are shown alone."""
    lines = []
    if headings & {"length", "steps"}:
        where = f"within {format_count(table.choices, 'prompt')} with a choice" if "steps" in headings else "over all"
        lines.append(f"rho: Spearman's correlation, {where} [95 %, bootstrap over prompts]")
    if "teacher" in headings and table.teacher_by_chance is not None:
        lines.append(
            f"eta2: fraction of the variance of the ranks between teachers; {table.teacher_by_chance:.3f} by chance"
        )
    if "right first" in headings:
        lines.append(
            "right first: of pairs of a right and a wrong response to a prompt; eq. length: lengths within "
            f"{table.equal_length:.0%}"
        )
    if "correct | length" in headings:
        lines.append(f"correct | length: partial rho with correctness, {format_count(table.mixed, 'prompt')} with both")
    return lines
