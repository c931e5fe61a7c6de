"""Metrics of a training: always metrics.jsonl, and a monitor where one is wanted and installed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from genssd.distill.runs.journal import Journal
from genssd.engine.errors import InputError


class Monitor(Protocol):
    """Takes the numbers of a step."""

    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class Metrics:
    """metrics.jsonl and a monitor at once. Use as a context manager."""

    def __init__(self, journal: Path, report_to: str) -> None:
        self._monitor = open_monitor(report_to, journal.parent)
        self._journal = Journal(journal)

    def log(self, row: Mapping[str, Any]) -> None:
        """row: numbers by name, `step` among them."""
        self._journal.append(row)
        if self._monitor is not None:
            self._monitor.log(row["step"], {name: value for name, value in row.items() if name != "step"})

    def __enter__(self) -> Metrics:
        self._journal.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._journal.__exit__(*error)
        if self._monitor is not None:
            self._monitor.close()


class Silence:
    """In place of Metrics, for the processes that do not write."""

    def log(self, row: Mapping[str, Any]) -> None:
        """Nothing."""

    def __enter__(self) -> Silence:
        return self

    def __exit__(self, *error: Any) -> None:
        pass


def open_monitor(report_to: str, output_dir: Path) -> Monitor | None:
    """The named monitor; None for "none". Raises InputError when it is not installed."""
    makers: dict[str, Callable[[Path], Monitor]] = {"tensorboard": _TensorBoard, "wandb": _WandB}
    if report_to == "none":
        return None
    try:
        return makers[report_to](output_dir)
    except ImportError:
        raise InputError(f"report_to={report_to} needs the package {report_to}: pip install {report_to}") from None


class _TensorBoard:
    def __init__(self, output_dir: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(output_dir / "tensorboard")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(f"train/{name}", value, step)

    def close(self) -> None:
        self._writer.close()


class _WandB:
    def __init__(self, output_dir: Path) -> None:
        import wandb

        self._run: Any = wandb.init(dir=str(output_dir), name=output_dir.name)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()
