"""The page of `genssd diagnose`: one self-contained HTML file with the verdict, the tables and coloured rollouts."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from genssd.distill.diagnose.diagnosis import Cell, Diagnosis, Group
from genssd.distill.diagnose.reliability import Interval
from genssd.distill.diagnose.rows import Row
from genssd.distill.diagnose.verdict import write_verdict
from genssd.distill.pages.frame import read_file, render_frame, render_template

PACKAGE = "genssd.distill.diagnose"
TITLE = "Where distillation would help"


def render_page(
    diagnosis: Diagnosis, rows: Sequence[Row], nodes: Sequence[Row], student: str, shown_questions: int
) -> str:
    """Return the page's HTML. rows: lines of questions.jsonl. nodes: lines of nodes.jsonl.

    shown_questions: maximum number of questions shown with their text; those with the most nodes that are not flat come
    first.
    """
    by_position = {(node["index"], node["rollout"], node["position"]): node for node in nodes}
    pairs = [f"{teacher} | {loss}" for teacher in diagnosis.teachers for loss in diagnosis.losses]
    lead = diagnosis.groups[0].lead
    chosen = pairs[0] if lead is None else f"{lead.best.teacher} | {lead.best.loss}"
    ordered = _order_by_informative_nodes(rows, nodes)
    filters: dict[str, Callable[..., object]] = {
        "colour": _style_cosine,
        "bounds": _format_bounds,
        "percent": _format_advantage,
        "number": _format_number,
    }
    body = render_template(
        PACKAGE,
        "page.html",
        filters,
        title=TITLE,
        d=diagnosis,
        student=student,
        verdict=write_verdict(diagnosis),
        tables=[_arrange_cells(group, diagnosis) for group in diagnosis.distinct_groups],
        windows=[_arrange_cells(group, diagnosis) for group in diagnosis.windows],
        pairs=pairs,
        chosen=chosen,
        questions=[_describe_question(row, by_position, chosen) for row in ordered[:shown_questions]],
        ratio=diagnosis.costs.naive_prefix_tokens / max(1, diagnosis.costs.prefix_tokens),
    )
    style, script = read_file(PACKAGE, "page.css"), read_file(PACKAGE, "page.js")
    return render_frame(title=TITLE, body=body, style=style, script=script)


def _arrange_cells(group: Group, diagnosis: Diagnosis) -> dict[str, Any]:
    """Return the template's values of one table: a row of cells per teacher, with its advantage, and the best cell."""
    cells = {(cell.teacher, cell.loss): cell for cell in group.cells}
    return {
        "group": group,
        "rows": [
            (teacher, [cells[teacher, loss] for loss in diagnosis.losses], group.advantage[teacher])
            for teacher in diagnosis.teachers
        ],
        "best": max(group.cells, key=_sort_key),
    }


def _sort_key(cell: Cell) -> float:
    return cell.alignment.value if math.isfinite(cell.alignment.value) else -math.inf


def _order_by_informative_nodes(rows: Sequence[Row], nodes: Sequence[Row]) -> list[Row]:
    """Return the questions' lines, those with the most nodes that are not flat first."""
    counts: Counter[int] = Counter()
    for node in nodes:
        counts[node["index"]] += len(set(node["success"] or ())) > 1
    return sorted(rows, key=lambda row: (-counts[row["index"]], row["index"]))


def _describe_question(row: Row, by_position: Mapping[tuple[int, int, int], Row], chosen: str) -> dict[str, Any]:
    """Return the template's values of one question.

    by_position: lines of nodes.jsonl by (question, rollout, position). chosen: the "teacher | loss" that colours.
    """
    prompt = row["prompt"]
    text = prompt if isinstance(prompt, str) else "\n".join(message["content"] for message in prompt)
    return {
        "text": text,
        "answer": row["answer"],
        "line": row["source"]["line"],
        "rollouts": [
            {
                "correct": rollout["correct"],
                "status": rollout["status"],
                "tokens": [
                    _describe_token(piece, by_position.get((row["index"], i, t)), chosen)
                    for t, piece in enumerate(rollout["pieces"])
                ],
            }
            for i, rollout in enumerate(row["rollouts"])
        ],
    }


def _describe_token(piece: str, node: Row | None, chosen: str) -> dict[str, Any]:
    """Return the template's values of one token. node: its line of nodes.jsonl, if it is a node."""
    if node is None:
        return {"text": piece, "node": False}
    alignment = {
        f"{teacher} | {loss}": value for teacher, losses in node["alignment"].items() for loss, value in losses.items()
    }
    return {
        "text": piece.replace("\n", "\u21b5\n"),
        "node": True,
        "values": json.dumps({name: v if isinstance(v, str) else round(v, 3) for name, v in alignment.items()}),
        "value": alignment[chosen],
        "tip": _write_tooltip(node),
    }


def _write_tooltip(node: Row) -> str:
    """Return the text that is shown when the pointer rests on a node: its candidates, most likely first."""
    order = sorted(range(len(node["p"])), key=lambda j: -node["p"][j])
    if node["value"] is None:
        return f"only {node['texts'][0]!r} to choose"
    lines = [f"V {node['value']:.2f}, halves agree {node['agreement']:+.2f}", "token: p, success, q of each teacher"]
    for j in order:
        teachers = ", ".join(f"{name} {q[j]:.2f}" for name, q in node["q"].items())
        mark = " (stands here)" if j == node["sampled"] else ""
        lines.append(f"{node['texts'][j]!r}: {node['p'][j]:.2f}, {node['success'][j]:.2f}, {teachers}{mark}")
    return "\n".join(lines)


def _style_cosine(value: float | str) -> str:
    """Return the CSS of a cosine: blue towards success, orange away from it, grey where undefined.

    The function `styleOf` of the page's script must return the same.
    """
    if isinstance(value, str):
        return "background: var(--faint); color: var(--soft)"
    if math.isnan(value):
        return ""
    colour = "cool" if value >= 0 else "heat"
    return f"background: color-mix(in srgb, var(--{colour}) {65 * min(abs(value), 1.0):.0f}%, transparent)"


def _format_bounds(value: Interval) -> str:
    return "" if math.isnan(value.low) else f"[{value.low:+.2f}, {value.high:+.2f}]"


def _format_advantage(value: Interval) -> str:
    """Return an advantage in percent, with its interval."""
    if math.isnan(value.value):
        return "-"
    return f"{100 * value.value:+.1f} % [{100 * value.low:+.1f}, {100 * value.high:+.1f}]"


def _format_number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:+.2f}"
