"""The options of commands that write metrics while their models write responses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from genssd.distill.runs.field_kinds import Operational
from genssd.engine.common.errors import InputError

MonitorName = Literal["none", "tensorboard", "wandb", "trackio"]
"""Names of the programs that metrics can be sent to."""


@dataclass(frozen=True, kw_only=True)  # no slots: a class derives from only one base that has them
class MonitorOptions:
    """Where the metrics of a command go, and how often."""

    report_to: Operational[MonitorName] = "none"
    """Monitor that gets the metrics in addition to metrics.jsonl."""
    logging_steps: Operational[int] = 10
    """Number of finished prompts between two lines of metrics.jsonl; the last prompt always has a line."""

    def check_monitoring(self) -> None:
        """Raise InputError where logging_steps is below 1."""
        if self.logging_steps < 1:
            raise InputError(f"logging_steps must be at least 1, not {self.logging_steps}")
