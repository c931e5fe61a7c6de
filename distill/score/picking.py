"""Which of a prompt's scored responses are kept for training."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b

from genssd.distill.score.ranking import Row, by_prompt
from genssd.engine.criteria.learning_gain import Lark
from genssd.engine.errors import InputError

LENGTHS = ("long", "short")
"""What a mix may name beside teachers: the longest and the shortest response."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pick:
    """What may be picked, and how."""

    by: str | None = None
    """Which of the criteria picks; None: the first."""
    keep: int = 1
    """Responses per prompt."""
    correct: bool = False
    """Only responses that are known to be correct."""
    finished: bool = True
    """Only responses that end by themselves."""
    loops: bool = False
    """Responses that end in a repetition, too."""
    min_steps: int = 0
    max_steps: int | None = None
    threshold: float | None = None
    """Only responses whose value is no worse."""
    best_share: float = 1.0
    """Of the picked, the best share over all prompts (MoRSD keeps about 0.3 by rationale_difficulty)."""
    similarity: float = 1.0
    """Pass over a response that shares more than this of its word triples (Jaccard) with a better one."""
    mix: tuple[str, ...] = ()
    """One response per prompt, kinds in proportion: long=1 short=4 (Mix Distillation, 2502.12143), or teachers by name,
    big=1 small=4, each by its best response."""
    weigh: bool = False
    """Give the picked responses LARK's training weights (mean 1 per prompt); lark has to be what picks."""

    def __post_init__(self) -> None:
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
        self.shares()
        changed = self.keep > 1 or self.similarity < 1.0 or self.best_share < 1.0
        if self.mix and changed:
            raise InputError("pick.mix takes one response per prompt: it has no keep, similarity or best_share")
        if self.weigh and (self.mix or self.similarity < 1.0 or self.best_share < 1.0 or self.threshold is not None):
            raise InputError("pick.weigh weighs the best of a pool: it has no mix, similarity, best_share or threshold")

    def eligible(self, row: Row) -> bool:
        """Whether a response may be picked, whatever its value."""
        return (
            (row["finished"] or not self.finished)
            and (row["correct"] is True or not self.correct)
            and (not row["loop"] or self.loops)
            and row["steps"] >= self.min_steps
            and (self.max_steps is None or row["steps"] <= self.max_steps)
        )

    def shares(self) -> dict[str, float]:
        """The mix, summing to 1; empty without one."""
        parts: dict[str, float] = {}
        for term in self.mix:
            kind, _, share = term.rpartition("=")
            try:
                part = float(share)
            except ValueError:
                part = math.nan
            if not kind or not 0.0 < part < math.inf or kind in parts:
                raise InputError(f"pick.mix: {term!r} is not one kind with its part, like long=1 or a teacher's name=4")
            parts[kind] = part
        return {kind: part / sum(parts.values()) for kind, part in parts.items()}


def pick(
    rows: Sequence[Row],
    column: Sequence[float],
    higher_is_better: bool,
    options: Pick = Pick(),
    text_of: Callable[[int], str] | None = None,
) -> list[int]:
    """The rows of every prompt's best responses, best first, prompts in order; of equal ones the first.

    text_of: of a row; needed where `similarity` counts.
    """
    sign = -1.0 if higher_is_better else 1.0
    worst = math.inf if options.threshold is None else sign * options.threshold
    groups: list[list[int]] = []
    for members in by_prompt(rows).values():
        allowed = [i for i in members if options.eligible(rows[i]) and sign * column[i] <= worst]
        groups.append(sorted(allowed, key=lambda i: sign * column[i]))
    if options.mix:
        return _mixed([group for group in groups if group], rows, options.shares())
    if options.similarity < 1.0:
        assert text_of is not None
        groups = [_unlike(group, options, text_of) for group in groups]
    chosen = [i for group in groups for i in group[: options.keep]]
    if options.best_share < 1.0:
        count = math.ceil(options.best_share * len(chosen) - 1e-9)
        best = set(sorted(chosen, key=lambda i: sign * column[i])[:count])
        chosen = [i for i in chosen if i in best]
    return chosen


def _unlike(ordered: Sequence[int], options: Pick, text_of: Callable[[int], str]) -> list[int]:
    """Best first, without what is too much like a better one."""
    triples = cache(lambda i: _word_triples(text_of(i)))
    taken: list[int] = []
    for i in ordered:
        if all(jaccard(triples(i), triples(other)) <= options.similarity for other in taken):
            taken.append(i)
    return taken


def _word_triples(text: str) -> frozenset[tuple[str, ...]]:
    words = text.lower().split()
    return frozenset(tuple(words[k : k + 3]) for k in range(max(1, len(words) - 2)))


def jaccard(some: frozenset[tuple[str, ...]], others: frozenset[tuple[str, ...]]) -> float:
    """The share of all elements that both have; 1 for two empty sets."""
    union = len(some | others)
    return len(some & others) / union if union else 1.0


def _mixed(groups: Sequence[Sequence[int]], rows: Sequence[Row], shares: Mapping[str, float]) -> list[int]:
    """One row per prompt. Prompts are dealt in an order of their own hashes, each to the kind that lacks most."""
    teachers = {row["teacher"] for row in rows}
    for kind in shares:
        if kind not in LENGTHS and kind not in teachers:
            raise InputError(
                f"pick.mix: no teacher is called {kind!r}; there are {', '.join(sorted(teachers))}, and long and short"
            )
    dealt = sorted(range(len(groups)), key=lambda g: blake2b(rows[groups[g][0]]["prompt"].encode()).digest())
    counts = dict.fromkeys(shares, 0)
    chosen: dict[int, int] = {}
    for g in dealt:
        found = {kind: row for kind in shares if (row := _of_kind(kind, groups[g], rows)) is not None}
        if found:
            dealt_so_far = sum(counts.values()) + 1
            kind = max(found, key=lambda kind: shares[kind] * dealt_so_far - counts[kind])
            chosen[g], counts[kind] = found[kind], counts[kind] + 1
    return [chosen[g] for g in sorted(chosen)]


def _of_kind(kind: str, ordered: Sequence[int], rows: Sequence[Row]) -> int | None:
    """A prompt's response of a kind, of its responses best first."""
    if kind == "long":
        return max(ordered, key=lambda i: rows[i]["tokens"])
    if kind == "short":
        return min(ordered, key=lambda i: rows[i]["tokens"])
    return next((i for i in ordered if rows[i]["teacher"] == kind), None)


def lark_weights(rows: Sequence[Row], column: Sequence[float], options: Pick) -> dict[int, float]:
    """LARK's weights of every prompt's eligible responses, times how many of them are kept."""
    weights: dict[int, float] = {}
    for members in by_prompt(rows).values():
        able = [i for i in members if options.eligible(rows[i])]
        if able:
            budget = min(options.keep, len(able))
            of_pool = Lark.weights([column[i] for i in able], budget)
            weights |= {i: budget * weight for i, weight in zip(able, of_pool, strict=True)}
    return weights
