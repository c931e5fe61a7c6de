"""Choice of the scored responses of every prompt that are kept for training."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from hashlib import blake2b

from genssd.distill.score.feature_rows import FeatureRow
from genssd.distill.score.pick_options import PickOptions
from genssd.distill.score.ranking import group_by_prompt
from genssd.engine.common.errors import InputError
from genssd.engine.criteria.learning_gain import Lark

LENGTH_KINDS = ("long", "short")
"""Kinds that a mix may name in addition to teachers: the longest and the shortest response of a prompt."""


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
