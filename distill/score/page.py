"""The page of `genssd score`: one self-contained HTML file with tables and plots of a comparison."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from genssd.distill.pages.frame import render_frame, render_template
from genssd.distill.score.comparison import Comparison
from genssd.distill.score.control_text import format_correlation, format_wins
from genssd.distill.score.controls import ControlTable
from genssd.distill.score.feature_rows import FeatureRow
from genssd.distill.score.rank_statistics import Floats
from genssd.distill.score.ranking import TeacherRank

TITLE = "Finished traces, scored"


def render_page(
    comparison: Comparison,
    controls: ControlTable,
    rows: Sequence[FeatureRow],
    picks: Mapping[str, Sequence[int]],
    ranks: Mapping[str, Sequence[TeacherRank]],
    student: str,
) -> str:
    """Return the page's HTML. picks: indices of the rows that each criterion picks. ranks: by criterion."""
    teachers = sorted(comparison.pool.teachers)
    body = render_template(
        "genssd.distill.score",
        "page.html",
        title=TITLE,
        c=comparison,
        controls=controls,
        correlation=format_correlation,
        wins=format_wins,
        sets=[comparison.pool, *comparison.picked, comparison.selected],
        prompts=len({row["prompt"] for row in rows}),
        student=student,
        teachers=teachers if len(teachers) > 1 else [],
        ranks=ranks,
        lengths=_encode_png(_draw_lengths(rows, picks)),
        matrices=_encode_png(_draw_matrices(comparison)),
    )
    return render_frame(title=TITLE, body=body)


def _draw_matrices(comparison: Comparison) -> Figure:
    names, count = comparison.names, len(comparison.names)
    figure = Figure(figsize=(10.6, 4.3), layout="constrained")
    panels: list[tuple[str, Floats, float]] = [
        ("over the pool", comparison.correlation, -1.0),
        ("within prompts", comparison.correlation_within_prompts, -1.0),
        ("same pick", comparison.agreement, 0.0),
    ]
    for axis, (title, matrix, low) in zip(figure.subplots(1, 3), panels, strict=True):
        axis.imshow(matrix, cmap="RdBu" if low < 0 else "Blues", vmin=low, vmax=1.0)
        axis.set_title(title, fontsize=10)
        axis.set_xticks(range(count), names, rotation=40, ha="right", fontsize=8)
        axis.set_yticks(range(count), names if axis.get_subplotspec().is_first_col() else [""] * count, fontsize=8)
        for (y, x), value in np.ndenumerate(matrix):
            if not np.isnan(value):
                colour = "white" if abs(value) > 0.65 else "black"
                axis.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=8, color=colour)
    return figure


def _draw_lengths(rows: Sequence[FeatureRow], picks: Mapping[str, Sequence[int]]) -> Figure:
    figure = Figure(figsize=(8.0, 1.2 + 0.35 * (len(picks) + 1)), layout="constrained")
    axis = figure.subplots()
    labels = ["all responses", *picks]
    groups = [[row["tokens"] for row in rows], *[[rows[i]["tokens"] for i in chosen] for chosen in picks.values()]]
    axis.boxplot([group or [np.nan] for group in groups], orientation="horizontal", whis=(5, 95), showfliers=False)
    axis.set_yticks(range(1, len(labels) + 1), labels, fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel("tokens per response (quartiles, 5 % to 95 %)", fontsize=9)
    return figure


def _encode_png(figure: Figure) -> str:
    """Return the figure as a PNG file in base 64."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=130)
    return base64.b64encode(buffer.getvalue()).decode()
