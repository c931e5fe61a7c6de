"""What several commands print: accuracies, counts, warnings, and rows that could not be used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from genssd.distill.answers.accuracy import Accuracy
from genssd.distill.data.response_limits import describe_cuts
from genssd.engine.common.amounts import format_count
from genssd.engine.common.errors import InputError

MAX_LISTED = 10  # failures, bad rows or lines that are listed one by one


def print_accuracy(accuracy: Accuracy) -> None:
    """Print the accuracy of responses with a reference answer, if there are any, and how many are wrong."""
    if accuracy.estimate is not None:
        print(
            f"accuracy {accuracy.estimate} over {format_count(accuracy.judged, 'response')} with a reference answer "
            "(95 % interval): "
            f"{accuracy.correct} correct, {accuracy.wrong} wrong, {accuracy.undecided} undecided"
        )
        print_undecided(accuracy.undecided)


def print_cuts(cuts: Mapping[str, int], responses: int) -> None:
    """Print what cut the responses off, and the remedy, where it was most of them."""
    line = describe_cuts(cuts, responses)
    if line is not None:
        print(line)


def print_writers(writers: Mapping[str, Mapping[str, float]], tokens_sampled: int) -> None:
    """Print how much of the responses each of two writers wrote, and what they sampled for it."""
    parts = [
        f"{format_count(int(part['tokens']), 'token')} by the {writer} ({part['token_share']:.1%}; "
        f"{part['text_share']:.1%} of the text)"
        for writer, part in writers.items()
    ]
    print(f"{', '.join(parts)}; {format_count(tokens_sampled, 'token')} sampled by both")


def print_undecided(count: int) -> None:
    """Print how many responses could not be judged, where there are any."""
    if count:
        print(
            f"could not be judged, and counted as not correct: {format_count(count, 'response')}; the field "
            "`undecided` "
            "gives the reason"
        )


def raise_for_problems(bad_rows: Sequence[str], misfits: int, output_dir: Path) -> None:
    """Raise an error that lists the first rows that could not be used, if there are any.

    misfits: number of those that did not fit.
    """
    if bad_rows:
        again = f" ({misfits} of them did not fit: --resume tries them again)" if misfits else ""
        raise_for_bad_rows(f"could not be used; all others were{again}", bad_rows, output_dir)


def raise_for_bad_rows(outcome: str, bad_rows: Sequence[str], output_dir: Path) -> None:
    """Raise InputError that lists the first bad rows, if there are any. outcome: what follows the number of rows."""
    if bad_rows:
        listed = list_first(bad_rows, f"in {output_dir / 'bad_rows.txt'}")
        raise InputError(f"{format_count(len(bad_rows), 'row')} {outcome}:{listed}")


def list_statuses(statuses: Mapping[str, int]) -> str:
    """Return how many responses have each status, in words."""
    return list_counts(statuses) or "none was run"


def describe_rounds(median_chunks: float) -> str:
    """Return how often the student chose in a response, in words. median_chunks: median number of chunks in one."""
    if median_chunks <= 1.0:
        return (
            "one round per response (median), in which the student chose between whole responses: shorter chunks "
            "(--chunk.tokens) let it choose more often"
        )
    return f"{median_chunks:g} rounds per response (median)"


def list_counts(counts: Mapping[str, int]) -> str:
    """Return numbers with their names, by name."""
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))


def warn(text: str, console: Console) -> None:
    """Print one line on the console, as the commands' own errors are printed."""
    console.print(f"genssd: {text}", highlight=False, soft_wrap=True, markup=False)


def list_first(messages: Sequence[str], rest: str) -> str:
    """Return the first messages, each on a line of its own. rest: where the others are, as the end of a sentence."""
    more = len(messages) - MAX_LISTED
    lines = [*messages[:MAX_LISTED], *([f"and {more} more {rest}"] if more > 0 else [])]
    return "".join(f"\n  {line}" for line in lines)
