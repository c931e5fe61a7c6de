"""The plot of a comparison: differences from the main controls with their intervals, and accuracy by teacher tokens."""

from __future__ import annotations

import io

from matplotlib.figure import Figure

from genssd.distill.reproduce.results import Results


def draw_plot(results: Results) -> bytes:
    """Return a PNG image."""
    compared = results.main[::-1]
    figure = Figure(figsize=(11.0, 2.0 + 0.24 * max(len(compared), 8)), layout="constrained")
    left, right = figure.subplots(1, 2)
    for place, one in enumerate(compared):
        difference = one.difference
        colour = {"better": "tab:green", "worse": "tab:red"}.get(one.verdict, "tab:gray")
        left.plot([100 * difference.low, 100 * difference.high], [place, place], color=colour)
        left.plot(100 * difference.value, place, "o", color=colour, markersize=4)
    left.set_yticks(range(len(compared)), [f"{one.arm} ({one.difference.seeds})" for one in compared], fontsize=7)
    left.axvline(0.0, color="black", linewidth=0.8)
    left.set_xlabel("accuracy minus the main control's, points (95 %)")
    left.set_title("arms, with their numbers of seeds", fontsize=9)
    for arm in results.arms:
        if arm.train_tokens and not arm.arm.name.count("/"):
            right.plot(arm.teacher_tokens, 100 * arm.accuracy, "o", color="tab:blue", markersize=4)
            right.annotate(arm.arm.name, (arm.teacher_tokens, 100 * arm.accuracy), fontsize=6)
    right.set_xlabel("tokens that the teacher sampled")
    right.set_ylabel("accuracy, %")
    right.set_title("accuracy at equal training tokens", fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
