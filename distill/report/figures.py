"""Figures over all prompts of one search: tokens, verdicts, scores kept and dropped, other criteria, accuracy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from genssd.distill.answers.accuracy import measure_accuracy
from genssd.distill.report.boxes import Box, round_value
from genssd.distill.select.judging import Judgement

BINS = 32
"""Number of bars of a distribution."""
TAIL = 2.5
"""Percentage of the scores on either side that a distribution gathers in its first and last bar."""


@dataclass(slots=True)
class CriterionFigures:
    """How one criterion judges all rounds of a search."""

    kept: list[float] = field(default_factory=list)
    """Values of the candidates that the run kept."""
    dropped: list[float] = field(default_factory=list)
    contested: int = 0
    """Number of rounds with more acceptable candidates than places."""
    differing: int = 0
    """Number of rounds in which the criterion keeps other candidates than the run."""
    prompts_differing: int = 0

    def add(self, judgements: Sequence[Judgement]) -> None:
        """Count the rounds of one prompt."""
        for judgement in judgements:
            self.contested += judgement.is_contested
            self.differing += not judgement.agrees
            for decided, value in zip(judgement.judged.decided, judgement.values, strict=True):
                (self.kept if decided.is_kept else self.dropped).append(value)
        self.prompts_differing += any(not judgement.agrees for judgement in judgements)

    def as_json(self) -> dict[str, Any]:
        """Return the counts and the distribution of the values."""
        counts = {name: getattr(self, name) for name in ("contested", "differing", "prompts_differing")}
        return {**counts, "scores": describe_scores(self.kept, self.dropped)}


@dataclass(slots=True)
class SearchFigures:
    """What is counted over the prompts of a search, those included whose trees are not shown."""

    prompts: int = 0
    rounds: int = 0
    tokens_kept: int = 0
    """Tokens of the best responses."""
    tokens_sampled: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    candidates: Counter[str] = field(default_factory=Counter)
    """Number of candidates by verdict."""
    tokens: Counter[str] = field(default_factory=Counter)
    """Number of tokens in them by verdict."""
    criteria: dict[str, CriterionFigures] = field(default_factory=dict)
    verdicts: list[dict[str, Any]] = field(default_factory=list)
    """Verdict on the best response of every prompt."""

    def add(
        self, entry: Mapping[str, Any], boxes: Iterable[Box], rounds: int, judgements: Mapping[str, Sequence[Judgement]]
    ) -> None:
        """Count one prompt. entry: its line in the page's list."""
        self.prompts += 1
        self.rounds += rounds
        self.statuses[entry["status"]] += 1
        self.tokens_kept += entry["tokens"]
        for box in boxes:
            self.candidates[box.verdict] += 1
            self.tokens[box.verdict] += box.sampled
            self.tokens_sampled += box.sampled
        for name, of_criterion in judgements.items():
            self.criteria.setdefault(name, CriterionFigures()).add(of_criterion)
        self.verdicts.append({name: entry[name] for name in ("correct", "undecided")})

    def as_json(self) -> dict[str, Any]:
        """Return the figures as the page's script reads them."""
        names = ("prompts", "rounds", "tokens_kept", "tokens_sampled", "statuses", "candidates", "tokens")
        return {
            **{name: getattr(self, name) for name in names},
            **measure_accuracy([[verdict] for verdict in self.verdicts]).as_json(),
            "criteria": {name: figures.as_json() for name, figures in self.criteria.items()},
        }


def describe_scores(kept: Sequence[float], dropped: Sequence[float]) -> dict[str, Any] | None:
    """Return the distributions of two groups of scores over the same bars; None where no score is finite.

    edges: BINS + 1 borders, between which TAIL to 100 - TAIL per cent of all scores lie; the bars at the ends hold what
    is outside of them as well. kept, dropped: number of scores in each bar. medians, counts: of the finite scores.
    """
    groups = [np.asarray(group, dtype=np.float64) for group in (kept, dropped)]
    finite = [group[np.isfinite(group)] for group in groups]
    together = np.concatenate(finite)
    if not len(together):
        return None
    low, high = np.percentile(together, [TAIL, 100 - TAIL])
    low, high = (low - 0.5, high + 0.5) if low == high else (low, high)
    edges = np.linspace(low, high, BINS + 1)
    bars = [np.histogram(np.clip(group, low, high), edges)[0].tolist() for group in finite]
    return {
        "edges": [round_value(edge) for edge in edges.tolist()],
        "kept": bars[0],
        "dropped": bars[1],
        "medians": [round_value(float(np.median(group))) if len(group) else None for group in finite],
        "counts": [len(group) for group in finite],
        "infinite": [len(group) - len(f) for group, f in zip(groups, finite, strict=True)],
    }
