"""The files that `genssd select` appends to for every finished prompt, in the order in which they are read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from genssd.distill.data import state_store, topk_store
from genssd.distill.data.row_bytes import find_end
from genssd.distill.data.state_store import StateStore
from genssd.distill.data.topk_store import TopkStore
from genssd.distill.runs.journal import Journal, complete_line
from genssd.distill.runs.run import Run
from genssd.distill.select.config import SelectConfig
from genssd.distill.select.resuming import TOPK_FILE, open_states
from genssd.distill.select.work import SearchedPrompt
from genssd.engine.setup.model_facts import ModelFacts


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchFiles:
    """The open files of a run. A prompt's decisions, top k and states are on disk before its selection."""

    journal: Journal
    decisions: Journal
    topk: TopkStore | None
    states: StateStore | None

    @staticmethod
    @contextmanager
    def open(run: Run, config: SelectConfig, models: ModelFacts) -> Iterator[SearchFiles]:
        """Open the files, those of bytes cut off after the last ones that a row refers to."""
        rows = run.done() if config.teacher_topk else iter(())
        topk_end = max((find_end(row, topk_store.FIELD) for row in rows), default=0)
        vocabulary = max(one.vocabulary("teacher") for one in models.teachers)
        journal = run.journal  # opened first: the run is recorded before the first file that belongs to it
        with (
            Journal(run.path("decisions.jsonl")) as decisions,
            TopkStore(run.path(TOPK_FILE), topk_end, vocabulary=vocabulary)
            if config.teacher_topk
            else nullcontext() as topk,
            open_states(run, config.teacher_states, models.fingerprints["teacher"]) as states,
        ):
            yield SearchFiles(journal=journal, decisions=decisions, topk=topk, states=states)

    def append(self, outcome: SearchedPrompt) -> None:
        """Write everything of a prompt that has a row. Raises InputError where the disk refuses it."""
        assert outcome.begun
        self.decisions.append_line(outcome.decisions)
        fields: dict[str, Any] = {topk_store.FIELD: None}
        if self.topk is not None and outcome.topk is not None:
            fields[topk_store.FIELD] = self.topk.append(outcome.topk)
        if self.states is not None and outcome.states is not None:
            fields[state_store.FIELD] = self.states.append(outcome.states)
        self.journal.append_line(complete_line(outcome.begun, fields))
