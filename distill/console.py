"""Progress while a command runs: a live line on a terminal; elsewhere a plain line after a few seconds, then rarely.

Notes, such as how many rows were read, stay on the screen; a command that takes a few seconds only prints none.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from genssd.distill.runs.progress import Measurement, Progress, Stage, measure
from genssd.distill.train.trainer import TrainProgress
from genssd.engine.common.amounts import format_part

FIRST_PLAIN = 5.0
"""Seconds after which a command prints its notes and a stage its first plain line."""
PLAIN_INTERVAL = 30.0
"""Seconds between two plain lines of one stage."""
TICK = 0.2
"""Seconds between two looks at whether a plain line is due."""
LIVE_RATE = 4.0
"""How often per second the live line is drawn."""


class ProgressLine(Progress):
    """The progress of one command on a console. Use as a context manager.

    beside: returns a line about what another process does meanwhile, which is shown below; "" for none.
    """

    def __init__(self, title: str, console: Console, beside: Callable[[], str] | None = None) -> None:
        self._title = title
        self._console = console
        self._beside = beside or str
        self._stage = Stage(name="")
        self._started = time.monotonic()
        self._live: Live | None = None
        self._notes: list[str] = []
        """Notes that are not printed yet."""
        self._stopped = threading.Event()
        self._printer = threading.Thread(target=self._print_when_due, daemon=True)

    def show(self, stage: Stage) -> None:
        self._stage = stage

    def __call__(self, done: float, total: float, detail: str = "") -> None:
        self._stage.done, self._stage.total, self._stage.detail = done, total, detail

    def note(self, text: str) -> None:
        self._notes.append(text)

    def __enter__(self) -> ProgressLine:
        if not self._console.quiet:
            self._printer.start()
        if self._console.is_terminal:
            self._start_live()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped.set()
        if self._printer.is_alive():
            self._printer.join()
        self._stop_live()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Remove the live line while the block prints."""
        was_live = self._live is not None
        self._stop_live()
        yield
        if was_live:
            self._start_live()

    def _start_live(self) -> None:
        self._live = Live(
            console=self._console, get_renderable=self._render, refresh_per_second=LIVE_RATE, transient=True
        )
        self._live.start()

    def _stop_live(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _render(self) -> Table:
        """Return the live line of the moment."""
        stage = self._stage
        measured = measure(stage, time.monotonic())
        line = Table.grid(padding=(0, 1))
        fraction = _fraction_done(stage, measured)
        bar = ProgressBar(total=1.0, completed=fraction or 0.0, width=10, pulse=fraction is None)
        line.add_row(bar, Text(describe(self._title, stage, measured)))
        if text := self._beside():
            line.add_row("", Text(text))
        return line

    def _print_when_due(self) -> None:
        """Print notes, and plain lines where there is no terminal, until the command ends; the body of a thread."""
        printed_stage, due = None, self._started + FIRST_PLAIN
        while not self._stopped.wait(TICK):
            now = time.monotonic()
            if now < self._started + FIRST_PLAIN:
                continue
            try:
                while self._notes:
                    self._print(self._notes.pop(0))
                stage = self._stage
                if self._console.is_terminal:
                    continue
                if now >= (due if stage is printed_stage else stage.started + FIRST_PLAIN):
                    self._print(describe(self._title, stage, measure(stage, now)))
                    if text := self._beside():
                        self._console.print(text, highlight=False, soft_wrap=True, markup=False)
                    printed_stage, due = stage, now + PLAIN_INTERVAL
            except OSError:  # the reader of stderr has gone, or its disk is full: the work goes on
                return

    def _print(self, text: str) -> None:
        line = text if text.startswith(self._title) else f"{self._title}: {text}"
        self._console.print(line, highlight=False, soft_wrap=True, markup=False)


def describe(title: str, stage: Stage, measured: Measurement) -> str:
    """Return a stage and what it has done so far as one line."""
    parts = []
    if stage.unit == "%":
        parts.append(f"{stage.done:.0f} %")
    elif stage.total:
        parts.append(f"{stage.done:.0f}/{stage.total:.0f} {stage.unit}")
    parts += filter(None, [stage.detail, *_describe_engine(stage, measured)])
    if measured.seconds_left is not None:
        bound = "at most " if measured.is_bound else ""
        parts.append(f"{bound}{_format_seconds(measured.seconds_left)} left")
    else:
        parts.append(f"{_format_seconds(measured.seconds)} so far")
    named = f"{title}, {stage.name}" if stage.name else title
    return f"{named}: {', '.join(parts)}"


def _describe_engine(stage: Stage, measured: Measurement) -> list[str]:
    """Return the tokens that the stage's engine has written or read, their rate, and its pages in use."""
    engine = None if stage.engine is None else stage.engine()
    if engine is None:
        return []
    parts = []
    if measured.written or stage.work == "writing":
        tokens = f"{_short(measured.written)} tokens written"
        if measured.tokens_left is not None:
            bound = "at most" if measured.is_bound else "about"
            tokens = f"{_short(measured.written)} of {bound} {_short(measured.written + measured.tokens_left)} tokens"
        parts.append(tokens if measured.written else f"{_short(measured.read)} tokens of prompts read")
        if measured.pruned is not None:
            parts.append(f"{_short(measured.kept)} kept, {measured.pruned:.0%} of the candidates pruned")
    elif measured.tokens_left is not None:
        parts.append(f"{_short(measured.read)} of at most {_short(measured.read + measured.tokens_left)} tokens read")
    else:
        parts.append(f"{_short(measured.read)} tokens read")
    if measured.written or measured.read:
        scored = f" written, {_short(measured.scored / measured.seconds)} scored" if measured.scored else ""
        parts.append(f"{_short(measured.rate)} tokens/s{scored}")
    use = engine.cache_use
    return [*parts, f"{use.held_pages:,}/{use.pages:,} pages ({format_part(use.held_bytes, use.bytes)})"]


def _fraction_done(stage: Stage, measured: Measurement) -> float | None:
    """Return the fraction of a stage that is done; None where it is not known."""
    if measured.seconds_left is not None:
        return measured.seconds / (measured.seconds + measured.seconds_left)
    return stage.done / stage.total if stage.done and stage.total else None


def _short(count: float) -> str:
    """Return a count in five characters or so: 9999, 10.0k, 123k, 1.2M."""
    if count < 10_000:
        return f"{count:.0f}"
    if count < 999_500:
        return f"{count / 1000:.1f}k" if count < 99_950 else f"{count / 1000:.0f}k"
    return f"{count / 1e6:.1f}M"


def _format_seconds(seconds: float) -> str:
    """Return a time as 42 s, 3:05 or 1:02:03."""
    whole = round(seconds)
    if whole < 100:
        return f"{whole} s"
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"


def report_training(progress: Progress) -> Callable[[TrainProgress], None]:
    """Return a function that passes the steps of a training on: percentage, step, loss, and tokens per second."""
    progress.begin("reading the data and loading the model")
    is_begun = False

    def report(p: TrainProgress) -> None:
        nonlocal is_begun
        if not is_begun:
            progress.begin("", unit="%", total=100)
            is_begun = True
        detail = f"step {p.step}, loss {p.loss:.4f}, {p.tokens_per_second:,.0f} tokens/s"
        progress(100 * p.fraction_done, 100, detail)

    return report
