"""metrics.jsonl of a command whose models write responses: what they have done after every few prompts.

A line has `step`, the number of finished prompts, and, since this part of the run began:

    tokens_sampled, tokens_kept     by the teacher; kept ones of a search
    pruned                          fraction of the candidates of a search that were not kept
    teacher_tokens_per_second       tokens that the teacher samples in a second
    student_tokens_per_second       candidate tokens that the student scores in a second
    pages                           fraction of the caches' pages that hold tokens at this moment
    correct                         fraction of the responses to finished prompts that are correct, of those judged
    seconds                         time

What does not apply is left out. A resumed run appends to the lines that are there.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from genssd.distill.runs.journal import complete_rows
from genssd.distill.runs.metrics import METRICS_FILE, Metrics
from genssd.distill.runs.monitor_options import MonitorOptions
from genssd.distill.runs.run import Run
from genssd.distill.runs.writing import keep_spans
from genssd.engine.setup.model_facts import ModelFacts


class EngineMetrics:
    """The metrics of one part of a run. Use as a context manager, after the run is recorded."""

    def __init__(self, options: MonitorOptions, models: ModelFacts, metrics: Metrics, *, total: int) -> None:
        self._every = options.logging_steps
        self._models = models
        self._metrics = metrics
        self._total = total
        self._before = dataclasses.replace(models.usage)
        self._started = time.monotonic()
        self._num_judged = self._num_correct = 0

    @staticmethod
    def open(options: MonitorOptions, run: Run, command: str, models: ModelFacts, *, total: int) -> EngineMetrics:
        """Open metrics.jsonl of a run, without a torn last line, and the monitor. total: number of prompts.

        Raises InputError on a damaged line, and where the monitor's package is not installed.
        """
        path = run.path(METRICS_FILE)
        _cut_torn_line(path)
        return EngineMetrics(options, models, Metrics.open(path, options.report_to, command), total=total)

    def finish(self, done: int, verdicts: Iterable[bool | None]) -> None:
        """Take a finished prompt, and log where it is time. done: number of finished prompts, earlier parts included.

        verdicts: whether each of its responses is correct; None where it was not judged.
        """
        for verdict in verdicts:
            self._num_judged += verdict is not None
            self._num_correct += verdict is True
        if done % self._every == 0 or done == self._total:
            self._metrics.log({"step": done, **self._measure()})

    def _measure(self) -> dict[str, float]:
        now, before, seconds = self._models.usage, self._before, time.monotonic() - self._started
        sampled, scored = now.sampled_tokens - before.sampled_tokens, now.scored_tokens - before.scored_tokens
        judged = now.judged_candidates - before.judged_candidates
        values: dict[str, float] = {
            "tokens_sampled": sampled,
            "teacher_tokens_per_second": round(sampled / max(seconds, 1e-9), 3),
        }
        if judged:
            values["tokens_kept"] = now.kept_tokens - before.kept_tokens
            values["pruned"] = round(1.0 - (now.kept_candidates - before.kept_candidates) / judged, 6)
        if scored:
            values["student_tokens_per_second"] = round(scored / max(seconds, 1e-9), 3)
        use = self._models.cache_use
        if use.pages:
            values["pages"] = round(use.held_pages / use.pages, 6)
        if self._num_judged:
            values["correct"] = round(self._num_correct / self._num_judged, 6)
        return {**values, "seconds": round(seconds, 3)}

    def __enter__(self) -> EngineMetrics:
        self._metrics.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._metrics.__exit__(*error)


def _cut_torn_line(path: Path) -> None:
    """Remove a last line that a crash has left half written. Raises InputError on a damaged line before it."""
    ends = [end for _, end in complete_rows(path)]
    if path.exists() and path.stat().st_size > (ends[-1] if ends else 0):
        keep_spans(path, [(0, ends[-1])] if ends else [])
