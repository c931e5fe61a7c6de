"""The command `genssd report` and what it prints."""

from __future__ import annotations

from rich.console import Console

from genssd.distill.console import ProgressLine
from genssd.distill.report.config import ReportConfig
from genssd.distill.report.run import run_report
from genssd.engine.common.amounts import format_bytes, format_count
from genssd.engine.common.errors import InputError
from genssd.printing import list_first


def report(config: ReportConfig, console: Console) -> None:
    """Write the page and print what it shows. Raises InputError where lines of the runs could not be read."""
    with ProgressLine("report", console) as line:
        summary = run_report(config, report=line)
    for name in summary.unfinished:
        print(f"{name} has no summary: it is at work or was interrupted, and the page shows what it has")
    parts = (
        (summary.searches, "search", f" with the trees of {format_count(summary.prompts, 'prompt')}"),
        (summary.trainings, "training", ""),
        (summary.evaluations, "evaluation", ""),
    )
    print(", ".join(f"{format_count(count, noun)}{more}" for count, noun, more in parts if count))
    print(f"written to {summary.path} ({format_bytes(summary.bytes)}); open it in a browser")
    if summary.faults:
        listed = list_first(summary.faults, "which the page lists")
        raise InputError(
            f"{format_count(len(summary.faults), 'line')} could not be read; the page has all others:{listed}"
        )
