"""The command `genssd reproduce` and what it prints."""

from __future__ import annotations

from rich.console import Console

from genssd.distill.console import ProgressLine
from genssd.distill.reproduce.config import ReproduceConfig
from genssd.distill.reproduce.run import run_reproduce
from genssd.engine.common.amounts import format_count
from genssd.engine.common.errors import InputError
from genssd.outputs import print_outputs
from genssd.printing import list_first


def reproduce(config: ReproduceConfig, console: Console) -> None:
    """Run the comparison; print a line for every arm as it ends, and the comparisons with the controls."""
    with ProgressLine("reproduce", console) as line:

        def say(text: str) -> None:
            with line.paused():
                print(text, flush=True)

        summary = run_reproduce(config, say, line)
    for one in summary.results.main:
        print(f"{one.arm} minus {one.control}: {one.difference} points, {one.verdict}")
    print_outputs("reproduce", config.output_dir)
    if summary.failures:
        listed = list_first(summary.failures, f"in {summary.output_dir / 'bad_rows.txt'}")
        count = format_count(len(summary.failures), "arm")
        raise InputError(f"{count} could not be run, all others were; --resume tries again:{listed}")
