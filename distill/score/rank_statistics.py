"""Rank statistics of responses that belong to prompts: correlations, partial correlations, pairs; all with intervals.

The ranks of a prompt's responses are divided by the number of the others and centred: a response is a number in
[-1/2, 1/2], whatever the number of responses. Correlations within prompts are those of these numbers, so what makes one
prompt harder or longer than another plays no part in them.

Intervals are 95 % percentiles of a bootstrap over prompts, because responses to one prompt are not independent; the
ranks are not computed again in a draw. Where a number would rest on fewer than MIN_PROMPTS prompts it is None.

Shapes:  V variables   N responses   P prompts
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]
Indices = npt.NDArray[np.int64]

MIN_PROMPTS = 10
"""Least number of prompts that a correlation or an interval is computed from: of fewer, chance decides."""
MIN_PAIRS = 10
"""Least number of pairs that a fraction of pairs is computed from."""
DRAWS = 2000
"""Number of draws of the bootstrap."""
COMPARED_AT_ONCE = 32
"""Largest number of responses to a prompt that are ranked by comparing every two of them."""
DRAWN_AT_ONCE = 64
"""Number of draws that are held in memory together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankEstimate:
    """A correlation, or a fraction of pairs, with its 95 % interval."""

    value: float
    low: float
    high: float
    number: int
    """Number of prompts, or of pairs, that it is computed from."""

    def excludes(self, value: float) -> bool:
        """Return whether a value lies outside of the interval."""
        return not self.low <= value <= self.high


def mean_ranks(values: Floats) -> Floats:
    """Return the rank of every value, 0 for the smallest; equal values have the mean of their ranks."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    mean: Floats = (last - (counts + 1) / 2.0)[inverse]
    return mean


def rank_within(values_VN: Floats, groups: Sequence[Sequence[int]]) -> Floats:
    """Return the centred ranks within prompts, [V, N]; 0 for a prompt's only response. groups: indices by prompt."""
    ranks_VN = np.zeros_like(values_VN)
    by_size: dict[int, list[Sequence[int]]] = defaultdict(list)
    for members in groups:
        by_size[len(members)].append(members)
    for size, equal_groups in by_size.items():
        if size <= COMPARED_AT_ONCE:  # all prompts of a size together: a call for each of thousands takes seconds
            members_PM = np.array([list(members) for members in equal_groups])
            for row, values in zip(ranks_VN, values_VN, strict=True):
                a, b = values[members_PM][:, :, None], values[members_PM][:, None, :]
                row[members_PM] = ((a > b).sum(2) + ((a == b).sum(2) - 1) / 2.0) / max(1, size - 1) - 0.5 * (size > 1)
        else:
            for members in equal_groups:
                columns = list(members)
                for row, values in zip(ranks_VN, values_VN, strict=True):
                    row[columns] = mean_ranks(values[columns]) / (size - 1) - 0.5
    return ranks_VN


def rank_over_pool(values_VN: Floats) -> Floats:
    """Return the ranks over all responses, [V, N], as `rank_within` returns those of one prompt."""
    return rank_within(values_VN, [range(values_VN.shape[1])])


class RankMoments:
    """Second moments of some variables' ranks by prompt, from which every correlation and its interval follow."""

    def __init__(self, ranks_VN: Floats, groups: Sequence[Sequence[int]], *, seed: int = 0) -> None:
        """ranks_VN: of `rank_within` or `rank_over_pool`. groups: indices of the responses by prompt."""
        with_one = np.vstack((ranks_VN, np.ones(ranks_VN.shape[1])))
        parts = [with_one[:, list(members)] for members in groups]
        self._moments_PVV = np.array([part @ part.T for part in parts]).reshape(-1, len(with_one), len(with_one))
        self.num_prompts = len(groups)
        self._seed = seed

    @cached_property
    def _resampled(self) -> Floats:
        """The moments summed over bootstrap samples, [DRAWS, V + 1, V + 1]."""
        return resample_sums(self._moments_PVV, self._seed)

    def correlate(self, first: int, second: int) -> RankEstimate | None:
        """Return the correlation of two variables by index; None where one is constant or the prompts are too few."""
        return self._estimate((first, second))

    def correlate_given(self, first: int, second: int, given: int) -> RankEstimate | None:
        """Return the partial correlation of two variables given a third; None where it is not defined."""
        return self._estimate((first, second, given))

    def _estimate(self, variables: tuple[int, ...]) -> RankEstimate | None:
        if self.num_prompts < MIN_PROMPTS:
            return None
        chosen = [*variables, -1]  # the last one is the constant 1
        value = float(_partial(_correlations(self._moments_PVV.sum(0)[np.ix_(chosen, chosen)])))
        if math.isnan(value):
            return None
        drawn = _partial(_correlations(self._resampled[:, chosen][:, :, chosen]))
        low, high = np.percentile(drawn[~np.isnan(drawn)], [2.5, 97.5])
        return RankEstimate(value=value, low=float(low), high=float(high), number=self.num_prompts)


def resample_sums(table: Floats, seed: int) -> Floats:
    """Return the sums over prompts of DRAWS bootstrap samples, [DRAWS, ...]. table: [P, ...]."""
    flat = table.reshape(len(table), -1)
    sums = np.concatenate([counts @ flat for counts in _draw_counts(len(table), seed)])
    return sums.reshape(-1, *table.shape[1:])


def _draw_counts(prompts: int, seed: int) -> Iterator[Floats]:
    """Yield how often each prompt is in a bootstrap sample, [DRAWN_AT_ONCE or fewer, P]."""
    generator = np.random.default_rng(seed)
    for start in range(0, DRAWS, DRAWN_AT_ONCE):
        drawn = generator.integers(0, prompts, size=(min(DRAWN_AT_ONCE, DRAWS - start), prompts))
        yield np.stack([np.bincount(row, minlength=prompts) for row in drawn]).astype(np.float64)


def _correlations(moments: Floats) -> Floats:
    """Return correlation matrices, NaN for constant variables. moments: [..., V + 1, V + 1], the constant 1 last."""
    ones = moments[..., -1:, -1:]
    covariance = moments[..., :-1, :-1] - moments[..., :-1, -1:] * moments[..., -1:, :-1] / ones
    variance = np.einsum("...ii->...i", covariance).copy()
    variance[variance <= 1e-12 * ones[..., 0]] = np.nan
    norm = np.sqrt(variance)
    correlation: Floats = np.clip(covariance / (norm[..., :, None] * norm[..., None, :]), -1.0, 1.0)
    return correlation


def _partial(correlation: Floats) -> Floats:
    """Return the correlation of the first two of the variables, given the third where there is one."""
    r = correlation[..., 0, 1]
    if correlation.shape[-1] == 2:
        return r
    a, b = correlation[..., 0, 2], correlation[..., 1, 2]
    left = (1.0 - a * a) * (1.0 - b * b)
    left = np.where(left > 1e-9, left, np.nan)  # a variable that the third one determines has no correlation left
    given: Floats = np.clip((r - a * b) / np.sqrt(left), -1.0, 1.0)
    return given


def explained_by_label(ranks_VN: Floats, labels: Sequence[str], groups: Sequence[Sequence[int]]) -> list[float | None]:
    """Return, of every variable, the fraction of the variance of its ranks within prompts that labels explain.

    None where it is not defined. This is R^2 of the least-squares fit of the ranks by one constant per label, both
    centred within prompts: eta squared of the labels where every prompt has as many responses of each. groups: indices
    by prompt; prompts with one label alone take no part. Without any relation it is (labels - 1) / (responses -
    prompts) on average.
    """
    mixed = [list(members) for members in groups if len({labels[i] for i in members}) > 1]
    if len(mixed) < MIN_PROMPTS:
        return [None] * len(ranks_VN)
    names = sorted({labels[i] for members in mixed for i in members})
    design, target = [], []
    for members in mixed:
        indicator = np.array([[float(labels[i] == name) for name in names] for i in members])
        design.append(indicator - indicator.mean(0))
        target.append(ranks_VN[:, members].T - ranks_VN[:, members].mean(1))
    x, y = np.concatenate(design), np.concatenate(target)
    fit = x @ np.linalg.lstsq(x, y, rcond=None)[0]
    return [float(a @ a) / float(b @ b) if b @ b > 1e-12 else None for a, b in zip(fit.T, y.T, strict=True)]


@dataclass(frozen=True, slots=True)
class Pairs:
    """Pairs of responses to the same prompt, one entry each."""

    prompt: Indices
    """Index of the prompt."""
    first: Indices
    """Index of one response."""
    second: Indices
    """Index of the other response."""

    def __len__(self) -> int:
        return len(self.prompt)

    def where(self, chosen: Flags) -> Pairs:
        """Return some of the pairs. chosen: one bool per pair."""
        return Pairs(self.prompt[chosen], self.first[chosen], self.second[chosen])

    def with_larger_first(self, values_N: Floats) -> Pairs:
        """Return the pairs whose responses have different values, each ordered so that the first has the larger."""
        a, b = values_N[self.first], values_N[self.second]
        first, second = np.where(a > b, self.first, self.second), np.where(a > b, self.second, self.first)
        return Pairs(self.prompt, first, second).where(a != b)

    def length_differences(self, lengths_N: Floats) -> Floats:
        """Return by how much the lengths of every pair differ, as a fraction of the longer one's."""
        a, b = lengths_N[self.first], lengths_N[self.second]
        difference: Floats = np.abs(a - b) / np.maximum(np.maximum(a, b), 1.0)
        return difference


def list_pairs(groups: Sequence[Sequence[int]]) -> Pairs:
    """Return all pairs of responses to the same prompt. groups: indices by prompt."""
    parts = [np.empty((3, 0), dtype=np.int64)]
    for prompt, members in enumerate(groups):
        first, second = np.triu_indices(len(members), 1)
        indices = np.asarray(members, dtype=np.int64)
        parts.append(np.stack((np.full(len(first), prompt), indices[first], indices[second])))
    return Pairs(*np.concatenate(parts, axis=1))


def count_wins(values_VN: Floats, pairs: Pairs, *, seed: int = 0) -> list[RankEstimate | None]:
    """Return, of every variable, the fraction of pairs whose first response has the larger value.

    Equal values count half. None for fewer than MIN_PAIRS pairs, or pairs of fewer than MIN_PROMPTS prompts.
    """
    if len(pairs) < MIN_PAIRS or len(np.unique(pairs.prompt)) < MIN_PROMPTS:
        return [None] * len(values_VN)
    _, prompt = np.unique(pairs.prompt, return_inverse=True)
    a, b = values_VN[:, pairs.first], values_VN[:, pairs.second]
    wins: Floats = np.where(a == b, 0.5, (a > b).astype(np.float64))
    columns = [np.bincount(prompt).astype(np.float64), *(np.bincount(prompt, weights=row) for row in wins)]
    sums = resample_sums(np.stack(columns, axis=1), seed)
    low, high = np.percentile(sums[:, 1:] / sums[:, :1], [2.5, 97.5], axis=0)
    return [
        RankEstimate(value=float(row.mean()), low=float(low[k]), high=float(high[k]), number=len(pairs))
        for k, row in enumerate(wins)
    ]
