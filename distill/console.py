"""Progress while a command runs: a live line on a terminal, a plain line every half minute elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from genssd.distill.diagnose.run import DiagnoseProgress
from genssd.distill.select.run import SelectProgress
from genssd.distill.train.trainer import TrainProgress

PLAIN_INTERVAL = 30.0  # seconds between plain lines


class ProgressLine:
    """The progress of one task. Use as a context manager; `update` may be called at any rate."""

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
        """Show how many of the task's items are done, and a note."""
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


def report_selection(line: ProgressLine) -> Callable[[SelectProgress], None]:
    """Return a function that shows finished prompts, tokens kept and sampled, tokens per second, and pages in use."""
    started = time.monotonic()

    def report(p: SelectProgress) -> None:
        rate = p.tokens_sampled / (time.monotonic() - started)
        spent = f"kept {_short(p.tokens_kept)}/{_short(p.tokens_sampled)} tok  {_short(rate)}/s"
        line.update(p.done, p.total, f"{spent}  pages {_short(p.pages_in_use)}/{_short(p.pages)}")

    return report


def _short(count: float) -> str:
    """Return a count in at most five characters or so: 9999, 10k."""
    return f"{count:.0f}" if count < 10_000 else f"{count / 1000:.0f}k"


def report_training(line: ProgressLine) -> Callable[[TrainProgress], None]:
    """Return a function that shows the percentage done, the loss and tokens per second."""

    def report(p: TrainProgress) -> None:
        note = f"step {p.step}  loss {p.loss:.4f}  {p.tokens_per_second:,.0f} tok/s"
        line.update(int(100 * p.fraction_done), 100, note)

    return report


class TaskLines:
    """A progress line for each of several tasks, one after the other. Use as a context manager."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._task = ""
        self._line: ProgressLine | None = None
        self._show: Callable[..., None] = lambda progress: None

    def report(self, task: str, progress: SelectProgress | TrainProgress | tuple[int, int]) -> None:
        """Show the progress of a task; a new name begins a new line."""
        if task != self._task or self._line is None:
            self.close()
            self._task, self._line = task, ProgressLine(task, self._console)
            self._line.__enter__()
            if isinstance(progress, SelectProgress):
                self._show = report_selection(self._line)
            else:
                self._show = report_training(self._line) if isinstance(progress, TrainProgress) else self._count
        self._show(progress)

    def _count(self, progress: tuple[int, int]) -> None:
        assert self._line is not None
        self._line.update(*progress, "responses")

    def close(self) -> None:
        """Remove the line."""
        if self._line is not None:
            self._line.__exit__(None, None, None)
            self._line = None

    def __enter__(self) -> TaskLines:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def report_counts(line: ProgressLine, note: str) -> Callable[[int, int], None]:
    """Return a function that shows how many items of a total are done. note: what the items are."""
    return lambda done, total: line.update(done, total, note)


def report_diagnosis(line: ProgressLine) -> Callable[[DiagnoseProgress], None]:
    """Return a function that shows the phase and, while nodes are forced, the completions of the question's budget."""

    def report(p: DiagnoseProgress) -> None:
        completions = f"  {p.completions}/{p.budget} completions" if p.phase == "forcing" else ""
        line.update(p.done, p.total, f"{p.phase}{completions}")

    return report
