"""Choice of the scored responses of every prompt that are kept for training."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b
from typing import ClassVar

from genssd.distill.runs.effects import Need, Needs
from genssd.distill.score.ranking import FeatureRow, group_by_prompt
from genssd.engine.criteria.learning_gain import Lark
from genssd.engine.errors import InputError
from genssd.engine.options_check import check_types

LENGTH_KINDS = ("long", "short")
"""Kinds that a mix may name in addition to teachers: the longest and the shortest response of a prompt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PickOptions:
    """Options of the choice of responses."""

    NEEDS: ClassVar[Needs] = {"similarity": Need(lambda o: o.keep > 1, "a pick.keep of at least 2")}

    by: str | None = None
    """Name of the criterion that picks, one of the criteria; None: the first of them."""
    keep: int = 1
    """Maximum number of responses that are picked per prompt."""
    correct: bool = False
    """Whether only responses that are known to be correct may be picked."""
    finished: bool = True
    """Whether only responses that end by themselves may be picked."""
    loops: bool = False
    """Whether responses that end in a repetition may be picked, too."""
    min_steps: int = 0
    """Minimum number of steps in a picked response."""
    max_steps: int | None = None
    """Maximum number of steps in a picked response; None: no maximum."""
    threshold: float | None = None
    """Worst value that a picked response may have under the criterion; None: any value."""
    best_share: float = 1.0
    """Fraction of the picked responses, the best over all prompts, that are kept (MoRSD keeps about 0.3 by
    rationale_difficulty)."""
    similarity: float = 1.0
    """Maximum similarity of two picked responses to one prompt; of two that are more similar the better is picked. It
    is the Jaccard index of their word triples, in [0, 1]."""
    mix: tuple[str, ...] = ()
    """Kinds of responses and the proportion in which they are picked, one response per prompt: long=1 short=4 (Mix
    Distillation, 2502.12143), or teachers by name, big=1 small=4, each with its best response."""
    weigh: bool = False
    """Whether the picked rows get LARK's training weights (mean 1 per prompt); the picking criterion must be lark."""

    def __post_init__(self) -> None:
        check_types(self, infinite=("threshold",))
        if self.keep < 1:
            raise InputError(f"pick.keep must be at least 1, not {self.keep}")
        if self.min_steps < 0 or (self.max_steps is not None and self.max_steps < max(1, self.min_steps)):
            raise InputError(f"pick.min_steps and max_steps are no range: {self.min_steps} to {self.max_steps}")
        if self.threshold is not None and math.isnan(self.threshold):
            raise InputError("pick.threshold must be a number, not NaN")
        if not 0.0 < self.best_share <= 1.0:
            raise InputError(f"pick.best_share must lie in (0, 1], not {self.best_share}")
        if not 0.0 <= self.similarity <= 1.0:
            raise InputError(f"pick.similarity must lie in [0, 1], not {self.similarity}")
        self.parse_mix()
        if self.mix and (self.keep > 1 or self.similarity < 1.0 or self.best_share < 1.0):
            raise InputError("pick.mix takes one response per prompt: it has no keep, similarity or best_share")
        if self.weigh and (self.mix or self.similarity < 1.0 or self.best_share < 1.0 or self.threshold is not None):
            raise InputError("pick.weigh weighs the best of a pool: it has no mix, similarity, best_share or threshold")

    def is_eligible(self, row: FeatureRow) -> bool:
        """Return whether a response may be picked, apart from its value."""
        return (
            (row["finished"] or not self.finished)
            and (row["correct"] is True or not self.correct)
            and (not row["loop"] or self.loops)
            and row["steps"] >= self.min_steps
            and (self.max_steps is None or row["steps"] <= self.max_steps)
        )

    def parse_mix(self) -> dict[str, float]:
        """Return the fraction of every kind of the mix; they sum to 1. Empty without a mix.

        Raises InputError on a term of the mix that is not a new kind with a positive number.
        """
        parts: dict[str, float] = {}
        for term in self.mix:
            kind, _, number = term.rpartition("=")
            try:
                part = float(number)
            except ValueError:
                part = math.nan
            if not kind or not 0.0 < part < math.inf or kind in parts:
                raise InputError(f"pick.mix: {term!r} is not one kind with its part, like long=1 or a teacher's name=4")
            parts[kind] = part
        return {kind: part / sum(parts.values()) for kind, part in parts.items()}


def pick_responses(
    rows: Sequence[FeatureRow],
    values: Sequence[float],
    higher_is_better: bool,
    options: PickOptions = PickOptions(),
    read_text: Callable[[int], str] | None = None,
) -> list[int]:
    """Return the indices of every prompt's best responses, best first, prompts in order.

    values: the criterion's value of every row; of rows with equal values the first is picked. read_text: returns the
    text of the response of a row; needed where options.similarity is below 1.
    """
    sign = -1.0 if higher_is_better else 1.0
    worst = math.inf if options.threshold is None else sign * options.threshold
    groups: list[list[int]] = []
    for members in group_by_prompt(rows).values():
        allowed = [i for i in members if options.is_eligible(rows[i]) and sign * values[i] <= worst]
        groups.append(sorted(allowed, key=lambda i: sign * values[i]))
    if options.mix:
        return _pick_mix([group for group in groups if group], rows, options.parse_mix())
    if options.similarity < 1.0:
        assert read_text is not None
        groups = [_drop_similar(group, options.similarity, read_text) for group in groups]
    chosen = [i for group in groups for i in group[: options.keep]]
    if options.best_share < 1.0:
        count = math.ceil(options.best_share * len(chosen) - 1e-9)
        best = set(sorted(chosen, key=lambda i: sign * values[i])[:count])
        chosen = [i for i in chosen if i in best]
    return chosen


def _drop_similar(ordered: Sequence[int], similarity: float, read_text: Callable[[int], str]) -> list[int]:
    """Return rows, best first, without those that are more similar than `similarity` to a better one that remains."""
    triples = cache(lambda i: _split_word_triples(read_text(i)))
    remaining: list[int] = []
    for i in ordered:
        if all(jaccard(triples(i), triples(better)) <= similarity for better in remaining):
            remaining.append(i)
    return remaining


def _split_word_triples(text: str) -> frozenset[tuple[str, ...]]:
    words = text.lower().split()
    return frozenset(tuple(words[k : k + 3]) for k in range(max(1, len(words) - 2)))


def jaccard(left: frozenset[tuple[str, ...]], right: frozenset[tuple[str, ...]]) -> float:
    """Return the Jaccard index of two sets, the fraction of their union that both have; 1 for two empty sets."""
    union = len(left | right)
    return len(left & right) / union if union else 1.0


def _pick_mix(groups: Sequence[Sequence[int]], rows: Sequence[FeatureRow], fractions: Mapping[str, float]) -> list[int]:
    """Return one row per prompt. groups: every prompt's allowed rows, best first.

    Prompts are taken in the order of their hashes, so the order of the rows does not matter. Each is given to the kind
    that is furthest below its fraction, among the kinds that the prompt has.
    """
    teachers = {row["teacher"] for row in rows}
    for kind in fractions:
        if kind not in LENGTH_KINDS and kind not in teachers:
            raise InputError(
                f"pick.mix: no teacher is called {kind!r}; there are {', '.join(sorted(teachers))}, and long and short"
            )
    shuffled = sorted(range(len(groups)), key=lambda g: blake2b(rows[groups[g][0]]["prompt"].encode()).digest())
    counts = dict.fromkeys(fractions, 0)
    chosen: dict[int, int] = {}
    for g in shuffled:
        by_kind = {kind: row for kind in fractions if (row := _find_best(kind, groups[g], rows)) is not None}
        if by_kind:
            total = sum(counts.values()) + 1
            kind = max(by_kind, key=lambda kind: fractions[kind] * total - counts[kind])
            chosen[g], counts[kind] = by_kind[kind], counts[kind] + 1
    return [chosen[g] for g in sorted(chosen)]


def _find_best(kind: str, ordered: Sequence[int], rows: Sequence[FeatureRow]) -> int | None:
    """Return a prompt's response of a kind, None if it has none. ordered: the prompt's rows, best first."""
    if kind == "long":
        return max(ordered, key=lambda i: rows[i]["tokens"])
    if kind == "short":
        return min(ordered, key=lambda i: rows[i]["tokens"])
    return next((i for i in ordered if rows[i]["teacher"] == kind), None)


def compute_lark_weights(rows: Sequence[FeatureRow], values: Sequence[float], options: PickOptions) -> dict[int, float]:
    """Return LARK's weights of every prompt's eligible responses, times the number that is kept, by the row's index."""
    weights: dict[int, float] = {}
    for members in group_by_prompt(rows).values():
        eligible = [i for i in members if options.is_eligible(rows[i])]
        if eligible:
            budget = min(options.keep, len(eligible))
            prompt_weights = Lark.weights([values[i] for i in eligible], budget)
            weights |= {i: budget * weight for i, weight in zip(eligible, prompt_weights, strict=True)}
    return weights
