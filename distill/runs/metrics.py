"""Metrics of a command: metrics.jsonl always, TensorBoard, Weights & Biases or trackio where report_to names it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from genssd.distill.runs.journal import Journal
from genssd.distill.runs.writing import name_failure
from genssd.engine.common.errors import InputError

METRICS_FILE = "metrics.jsonl"


class Monitor(Protocol):
    """A program that shows the metrics of a command."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Take the metrics of a step, by name."""

    def close(self) -> None:
        """Finish, so that no metrics are lost."""


class Metrics:
    """metrics.jsonl together with a monitor. Use as a context manager."""

    def __init__(self, journal: Journal, monitor: Monitor | None, directory: Path) -> None:
        self._journal = journal
        self._monitor = monitor
        self._directory = directory

    @staticmethod
    def open(path: Path, report_to: str, command: str) -> Metrics:
        """Open metrics.jsonl of a command to append to it, and the named monitor.

        Raises InputError when it is not installed.
        """
        with name_failure(path.parent):
            monitor = open_monitor(report_to, path.parent, command)
        return Metrics(Journal(path), monitor, path.parent)

    def log(self, row: Mapping[str, Any]) -> None:
        """Write a row of numbers by name, one of which is `step`. Raises InputError when the disk refuses it."""
        self._journal.append(row)
        if self._monitor is not None:
            with name_failure(self._directory, kept="; metrics.jsonl is kept"):
                self._monitor.log(row["step"], {name: value for name, value in row.items() if name != "step"})

    def __enter__(self) -> Metrics:
        self._journal.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._journal.__exit__(*error)
        if self._monitor is not None:
            with suppress(OSError):  # a monitor that cannot be finished hides no error, and spoils no work
                self._monitor.close()


class NoMetrics:
    """Replacement of Metrics in the processes that write no files."""

    def log(self, row: Mapping[str, Any]) -> None:
        """Ignore the row."""

    def __enter__(self) -> NoMetrics:
        return self

    def __exit__(self, *error: Any) -> None:
        pass


def open_monitor(report_to: str, output_dir: Path, command: str) -> Monitor | None:
    """Open the named monitor; return None for "none". command: before the names of the metrics in TensorBoard.

    Raises InputError when its package is not installed.
    """
    openers: dict[str, Callable[[Path, str], Monitor]] = {
        "tensorboard": _open_tensorboard,
        "wandb": _open_wandb,
        "trackio": _open_trackio,
    }
    if report_to == "none":
        return None
    try:
        return openers[report_to](output_dir, command)
    except ImportError:
        raise _make_missing_error(report_to) from None


def check_monitor(report_to: str) -> None:
    """Check that the package of a monitor is installed, without importing it. Raises InputError if it is not."""
    if report_to != "none" and find_spec(report_to) is None:
        raise _make_missing_error(report_to)


def _make_missing_error(report_to: str) -> InputError:
    return InputError(f"report_to={report_to} needs the package {report_to}: pip install {report_to}")


class _TensorBoard:
    """Monitor that writes TensorBoard's event files."""

    def __init__(self, writer: Any, command: str) -> None:
        self._writer = writer
        self._command = command

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(f"{self._command}/{name}", value, step)

    def close(self) -> None:
        self._writer.close()


def _open_tensorboard(output_dir: Path, command: str) -> Monitor:
    from torch.utils.tensorboard import SummaryWriter

    return _TensorBoard(SummaryWriter(output_dir / "tensorboard"), command)


class _WandB:
    """Monitor that sends to Weights & Biases."""

    def __init__(self, run: Any) -> None:
        self._run = run

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


def _open_wandb(output_dir: Path, command: str) -> Monitor:
    import wandb

    return _WandB(wandb.init(dir=str(output_dir), name=output_dir.name, job_type=command))


class _Trackio:
    """Monitor that writes to trackio's database, which `trackio show` displays."""

    def __init__(self, run: Any) -> None:
        self._run = run

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(metrics=dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


def _open_trackio(output_dir: Path, command: str) -> Monitor:
    import trackio

    return _Trackio(trackio.init(project=f"genssd {command}", name=output_dir.name, embed=False))
