"""The command `genssd reproduce` and what it prints."""

from __future__ import annotations

from rich.console import Console

from genssd.distill.console import ProgressLine
from genssd.distill.reproduce.config import ReproduceConfig
from genssd.distill.reproduce.run import run_reproduce
from genssd.outputs import print_outputs


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
