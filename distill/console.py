"""What a person sees while a command runs: a live line on a terminal, sparse plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from genssd.distill.diagnose.run import DiagnoseProgress
from genssd.distill.select.run import SelectProgress
from genssd.distill.train.trainer import TrainProgress

PLAIN_INTERVAL = 30.0  # seconds between lines where there is no terminal


class ProgressLine:
    """One task's progress. Use as a context manager; call `update` as often as you like."""

    def __init__(self, title: str, console: Console) -> None:
        self._title = title
        self._console = console
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=10),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._task: TaskID = self._progress.add_task(title, total=None, note="")
        self._printed = time.monotonic()

    def update(self, done: int, total: int, note: str) -> None:
        """Show how far the task is."""
        self._progress.update(self._task, completed=done, total=total, note=note)
        now = time.monotonic()
        if not self._console.is_terminal and now - self._printed >= PLAIN_INTERVAL:
            self._printed = now
            self._console.print(f"{self._title}: {done}/{total} {note}", highlight=False, soft_wrap=True)

    def __enter__(self) -> ProgressLine:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()


def selecting(line: ProgressLine) -> Callable[[SelectProgress], None]:
    """Prompts done, tokens kept of those sampled, rate, pages."""
    started = time.monotonic()

    def report(p: SelectProgress) -> None:
        rate = p.tokens_sampled / (time.monotonic() - started)
        spent = f"kept {_short(p.tokens_kept)}/{_short(p.tokens_sampled)} tok  {_short(rate)}/s"
        line.update(p.done, p.total, f"{spent}  pages {_short(p.pages_in_use)}/{_short(p.pages)}")

    return report


def _short(count: float) -> str:
    return f"{count:.0f}" if count < 10_000 else f"{count / 1000:.0f}k"


def training(line: ProgressLine) -> Callable[[TrainProgress], None]:
    """Share done, loss, rate."""

    def report(p: TrainProgress) -> None:
        note = f"step {p.step}  loss {p.loss:.4f}  {p.tokens_per_second:,.0f} tok/s"
        line.update(int(100 * p.fraction_done), 100, note)

    return report


class Phases:
    """A line for each of several tasks that follow each other. Use as a context manager."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._what = ""
        self._line: ProgressLine | None = None
        self._show: Callable[..., None] = lambda progress: None

    def report(self, what: str, progress: SelectProgress | TrainProgress | tuple[int, int]) -> None:
        """How far the task `what` is; another one begins with another name."""
        if what != self._what or self._line is None:
            self.close()
            self._what, self._line = what, ProgressLine(what, self._console)
            self._line.__enter__()
            if isinstance(progress, SelectProgress):
                self._show = selecting(self._line)
            else:
                self._show = training(self._line) if isinstance(progress, TrainProgress) else self._count
        self._show(progress)

    def _count(self, progress: tuple[int, int]) -> None:
        assert self._line is not None
        self._line.update(*progress, "responses")

    def close(self) -> None:
        """Take the line away."""
        if self._line is not None:
            self._line.__exit__(None, None, None)
            self._line = None

    def __enter__(self) -> Phases:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def counting(line: ProgressLine, note: str) -> Callable[[int, int], None]:
    """Things done of a total."""
    return lambda done, total: line.update(done, total, note)


def diagnosing(line: ProgressLine) -> Callable[[DiagnoseProgress], None]:
    """The phase and, where completions are spent, how many of the question's budget."""

    def report(p: DiagnoseProgress) -> None:
        spent = f"  {p.completions}/{p.budget} completions" if p.phase == "forcing" else ""
        line.update(p.done, p.total, f"{p.phase}{spent}")

    return report
