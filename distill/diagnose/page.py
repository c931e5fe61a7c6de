"""The page that `genssd diagnose` writes: one self-contained HTML file with verdict, tables and coloured text."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from jinja2 import Environment

from genssd.distill.diagnose.reliability import Interval
from genssd.distill.diagnose.rows import Row
from genssd.distill.diagnose.tables import Cell, Diagnosis, Group
from genssd.distill.diagnose.verdict import verdict


def render(diagnosis: Diagnosis, rows: Sequence[Row], nodes: Sequence[Row], student: str, shown_questions: int) -> str:
    """The page's HTML. shown_questions: how many are shown with their text, those with the most to see first."""
    by_place = {(node["index"], node["rollout"], node["position"]): node for node in nodes}
    environment = Environment(autoescape=True)
    environment.filters.update(colour=_colour, bounds=_bounds, share=_share, number=_number)
    template = files("genssd.distill.diagnose").joinpath("page.html").read_text(encoding="utf-8")
    pairs = [f"{teacher} | {loss}" for teacher in diagnosis.teachers for loss in diagnosis.losses]
    lead = diagnosis.groups[0].lead
    first = pairs[0] if lead is None else f"{lead.best.teacher} | {lead.best.loss}"
    return environment.from_string(template).render(
        title="Where distillation would help",
        d=diagnosis,
        student=student,
        verdict=verdict(diagnosis),
        tables=[_table(group, diagnosis) for group in diagnosis.distinct_groups],
        windows=[_table(group, diagnosis) for group in diagnosis.windows],
        pairs=pairs,
        chosen=first,
        questions=[_question(row, by_place, first) for row in _most_to_see(rows, nodes)[:shown_questions]],
        ratio=diagnosis.costs.naive_prefix_tokens / max(1, diagnosis.costs.prefix_tokens),
    )


def _table(group: Group, diagnosis: Diagnosis) -> dict[str, Any]:
    """Cells by teacher and loss."""
    cells = {(cell.teacher, cell.loss): cell for cell in group.cells}
    return {
        "group": group,
        "rows": [
            (teacher, [cells[teacher, loss] for loss in diagnosis.losses], group.advantage[teacher])
            for teacher in diagnosis.teachers
        ],
        "best": max(group.cells, key=_rank),
    }


def _rank(cell: Cell) -> float:
    return cell.alignment.value if math.isfinite(cell.alignment.value) else -math.inf


def _most_to_see(rows: Sequence[Row], nodes: Sequence[Row]) -> list[Row]:
    """Questions with the most nodes that are not flat first."""
    told: dict[int, int] = {}
    for node in nodes:
        told[node["index"]] = told.get(node["index"], 0) + (len(set(node["success"] or ())) > 1)
    return sorted(rows, key=lambda row: (-told.get(row["index"], 0), row["index"]))


def _question(row: Row, by_place: Mapping[tuple[int, int, int], Row], first: str) -> dict[str, Any]:
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
                    _token(piece, by_place.get((row["index"], i, t)), first)
                    for t, piece in enumerate(rollout["pieces"])
                ],
            }
            for i, rollout in enumerate(row["rollouts"])
        ],
    }


def _token(piece: str, node: Row | None, first: str) -> dict[str, Any]:
    if node is None:
        return {"text": piece, "node": False}
    flat = {f"{teacher} | {loss}": value for teacher, of in node["alignment"].items() for loss, value in of.items()}
    return {
        "text": piece.replace("\n", "\u21b5\n"),
        "node": True,
        "values": json.dumps({name: v if isinstance(v, str) else round(v, 3) for name, v in flat.items()}),
        "value": flat[first],
        "tip": _tip(node),
    }


def _tip(node: Row) -> str:
    """What stands beside a node: its candidates, most likely first."""
    order = sorted(range(len(node["p"])), key=lambda j: -node["p"][j])
    if node["value"] is None:
        return f"only {node['texts'][0]!r} to choose"
    lines = [f"V {node['value']:.2f}, halves agree {node['agreement']:+.2f}", "token: p, success, q of each teacher"]
    for j in order:
        said = ", ".join(f"{name} {q[j]:.2f}" for name, q in node["q"].items())
        here = " (stands here)" if j == node["sampled"] else ""
        lines.append(f"{node['texts'][j]!r}: {node['p'][j]:.2f}, {node['success'][j]:.2f}, {said}{here}")
    return "\n".join(lines)


def _colour(value: float | str) -> str:
    """CSS of a cosine: blue towards success, red away from it, hatched where undefined. The page's script says the
    same."""
    if isinstance(value, str):
        return "background: #e6e6e6; color: #777"
    if math.isnan(value):
        return ""
    hue, strength = (214, value) if value >= 0 else (8, -value)
    return f"background: hsl({hue} 85% {97 - 30 * min(strength, 1.0):.0f}%)"


def _bounds(value: Interval) -> str:
    return "" if math.isnan(value.low) else f"[{value.low:+.2f}, {value.high:+.2f}]"


def _share(value: Interval) -> str:
    """An advantage, in percent with its interval."""
    if math.isnan(value.value):
        return "-"
    return f"{100 * value.value:+.1f} % [{100 * value.low:+.1f}, {100 * value.high:+.1f}]"


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:+.2f}"
