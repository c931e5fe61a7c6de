"""The table of a comparison in Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from genssd.distill.reproduce.config import ReproduceConfig
from genssd.distill.reproduce.results import ArmResult, Comparison, Results
from genssd.engine.common.amounts import format_count

BEGIN, END = "<!-- written by genssd reproduce {task}: do not edit -->", "<!-- end of genssd reproduce {task} -->"
"""Lines around the table in a file that holds other text as well; {task} is the name of the task."""


def render_table(results: Results, config: ReproduceConfig) -> str:
    """Return the tables and what their columns mean."""
    sizes = config.sizes
    main = {one.arm: one for one in results.main}
    lines = [
        f"`genssd reproduce {config.task}`: {format_count(sizes.problems, 'problem')} per seed, "
        f"{format_count(config.candidates, 'candidate')}, {format_count(sizes.train_tokens, 'training token')} at a "
        f"learning rate of {sizes.learning_rate:g} in batches of {sizes.batch_size}, "
        f"{format_count(sizes.eval_problems, 'test problem')} per seed. `--arms NAME` repeats one row.",
        "",
        "| arm | what it is | commands | seeds | teacher tokens | student tokens | trained on | rows | right % | "
        "tokens per row | accuracy % | minus the control, points [95 %] | p, Holm | verdict |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---|---:|---|",
        *(_render_row(one, main.get(one.arm.name)) for one in results.arms),
        "",
        "**Further comparisons**: the same search, the same pool or as many teacher tokens.",
        "",
        "| arm | minus | seeds | points [95 %] | p | p, Holm | verdict |",
        "|---|---|---:|---|---:|---:|---|",
        *(_render_comparison(one) for one in results.others),
    ]
    if any(one.styles for one in results.arms):
        lines += ["", *_render_styles(results.arms)]
    return "\n".join(lines) + "\n"


def replace_table(text: str, table: str, task: str) -> str:
    """Return a document with its table of a task replaced, or added at the end where it has none."""
    begin, end = BEGIN.format(task=task), END.format(task=task)
    before, found, rest = text.partition(begin)
    after = rest.partition(end)[2] if found else ""
    gap = "" if not before or found else "\n"
    return f"{before}{gap}{begin}\n\n{table}\n{end}{after or chr(10)}"


def _render_row(one: ArmResult, comparison: Comparison | None) -> str:
    spread = f" ({', '.join(f'{100 * value:.1f}' for value in one.by_seed)})"
    cells = [
        one.arm.name,
        one.arm.paper,
        f"`{one.arm.command}`",
        str(len(one.seeds)),
        f"{one.teacher_tokens:,.0f}",
        f"{one.student_tokens:,.0f}",
        f"{one.train_tokens:,.0f}",
        f"{one.rows:,.0f}",
        "" if one.right is None else f"{100 * one.right:.0f}",
        "" if one.mean_tokens is None else f"{one.mean_tokens:.0f}",
        f"{100 * one.accuracy:.1f}{spread if len(one.seeds) > 1 else ''}",
        "" if comparison is None else f"{comparison.difference} vs {comparison.control}",
        "" if comparison is None else format_p(comparison.corrected),
        "" if comparison is None else comparison.verdict,
    ]
    return f"| {' | '.join(cells)} |"


def _render_comparison(one: Comparison) -> str:
    difference = one.difference
    cells = (
        one.arm, one.control, str(difference.seeds), str(difference), format_p(one.p), format_p(one.corrected),
        one.verdict,
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


def _render_styles(arms: Sequence[ArmResult]) -> list[str]:
    names = sorted({name for one in arms for name in one.styles})
    return [
        "**Styles** of the steps in the rows, %:",
        "",
        f"| arm | {' | '.join(names)} |",
        f"|---|{'---:|' * len(names)}",
        *(
            f"| {one.arm.name} | {' | '.join(f'{100 * one.styles.get(name, 0.0):.0f}' for name in names)} |"
            for one in arms
            if one.styles
        ),
    ]


def format_p(value: float | None) -> str:
    """Return a p-value as tables show it; nothing for none."""
    if value is None:
        return ""
    return "< 0.001" if value < 0.001 else f"{value:.3f}"
