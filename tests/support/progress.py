"""A receiver of progress that keeps what it is told."""

from __future__ import annotations

from genssd.distill.runs.progress import Progress, Stage


class Recorder(Progress):
    """Keeps the names of stages, the counts reported in them, and the notes."""

    def __init__(self) -> None:
        self.stages: list[str] = []
        self.counts: list[tuple[float, float]] = []
        self.notes: list[str] = []

    def show(self, stage: Stage) -> None:
        self.stages.append(stage.name)

    def __call__(self, done: float, total: float, detail: str = "") -> None:
        self.counts.append((done, total))

    def note(self, text: str) -> None:
        self.notes.append(text)
