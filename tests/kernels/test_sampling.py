"""Sampling: noise against Philox' known answers, filters against transformers, frequencies of draws against softmax."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from genssd.kernels.options import check_options
from genssd.kernels.sampling import gumbel_noise, gumbel_reference, keep_likely, philox_reference, sample

WORD = (1 << 32) - 1
CHI_SQUARE_P = 1e-4  # a correct sampler fails this with that probability; the draws are seeded, so once and for all


def philox_words(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10, written from the paper with unbounded integers."""
    c, k = list(counter), list(key)
    for i in range(10):
        if i:
            k = [(k[0] + 0x9E3779B9) & WORD, (k[1] + 0xBB67AE85) & WORD]
        low, high = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(high >> 32) ^ c[1] ^ k[0], high & WORD, (low >> 32) ^ c[3] ^ k[1], low & WORD]
    return c


def signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word


def chi_square_p(observed: Tensor, probability: Tensor) -> float:
    """The p-value of counts under a distribution; cells that expect less than 5 are pooled."""
    expected = probability.double() * observed.sum()
    rare = expected < 5
    observed, expected = (
        torch.cat((observed[~rare].double(), observed[rare].sum()[None].double())),
        torch.cat((expected[~rare], expected[rare].sum()[None])),
    )
    used = expected > 0
    if int(used.sum()) == 1:
        return float(observed[~used].sum() == 0)
    statistic = ((observed[used] - expected[used]) ** 2 / expected[used]).sum()
    freedom = torch.tensor((int(used.sum()) - 1) / 2.0, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, statistic / 2))


def transformers_filtered(logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> Tensor:
    scores = TemperatureLogitsWarper(temperature)(None, logits)
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1.0:
        scores = TopPLogitsWarper(top_p)(None, scores)
    if min_p > 0.0:
        scores = MinPLogitsWarper(min_p)(None, scores)
    return scores


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([WORD] * 4, [WORD] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_the_oracle_gives_the_known_answers_of_random123(counter: list[int], key: list[int], words: list[int]) -> None:
    assert philox_words(counter, key) == words


@settings(max_examples=50, deadline=None)
@given(key=st.integers(0, (1 << 64) - 1), counter=st.integers(0, (1 << 62) - 1))
def test_reference_philox_equals_the_oracle(key: int, counter: int) -> None:
    words = [int(word) for word in philox_reference(torch.tensor([signed(key)]), torch.tensor([counter]))]
    assert words == philox_words([counter & WORD, counter >> 32, 0, 0], [key & WORD, key >> 32])


def test_native_noise_equals_the_formula_on_the_oracles_bits() -> None:
    keys = [0, 1, (1 << 63) - 1, -(1 << 63), -1, 123456789012345678]
    native = gumbel_noise(torch.tensor(keys), 300)
    for row, key in enumerate(keys):
        word = key & ((1 << 64) - 1)
        for v in (0, 1, 2, 17, 40, 63, 64, 255, 256, 299):
            words = philox_words([v // 64 * 16 + v % 16, 0, 0, 0], [word & WORD, word >> 32])
            u = (words[v // 16 % 4] + 0.5) / 2**32
            surprise = -math.log1p(-u)
            budget = 2e-6 + 2.0**-25 * math.exp(surprise) / surprise  # the native kernel has u in float32
            assert float(native[row, v]) == pytest.approx(-math.log(surprise), abs=budget, rel=2e-6)


def test_native_noise_equals_the_reference_everywhere() -> None:
    keys = torch.randint(-(1 << 62), 1 << 62, (7,), generator=torch.Generator().manual_seed(0))
    native, reference = gumbel_noise(keys, 40_001), gumbel_reference(keys, 40_001)
    # the native kernel has u in float32: that loses up to 2^-25 of 1 - u, and -log(1 - u) is exp(-noise)
    surprise = torch.exp(-reference.double())
    budget = 3e-6 * (1 + reference.abs()) + 2.0**-24 * torch.exp(surprise) / surprise
    body = reference > -2.6
    assert bool(((native - reference).abs() <= budget)[body].all())
    assert bool((native[~body] < -2.5).all())
    assert bool(native.isfinite().all())


def test_noise_has_the_law_of_gumbel() -> None:
    noise = gumbel_noise(torch.arange(20), 20_000).double().flatten()
    euler = 0.5772156649015329
    standard = math.pi / math.sqrt(6)
    n = len(noise)
    assert abs(float(noise.mean()) - euler) < 4 * standard / math.sqrt(n)
    assert abs(float(noise.var()) / standard**2 - 1) < 4 * math.sqrt(4.4 / n)  # the kurtosis of Gumbel is 5.4
    cdf = torch.exp(-torch.exp(-noise.sort().values))
    steps = torch.arange(n, dtype=torch.float64)
    distance = max(float((cdf - steps / n).max()), float(((steps + 1) / n - cdf).max()))
    assert distance < 1.95 / math.sqrt(n)  # Kolmogorov-Smirnov at p = 0.001


def test_noise_depends_on_key_and_token_alone() -> None:
    keys = torch.tensor([5, 6, 5, -7])
    wide = gumbel_noise(keys, 50_000)
    assert torch.equal(wide[0], wide[2])
    assert not torch.equal(wide[0], wide[1])
    assert torch.equal(gumbel_noise(keys[3:], 100)[0], wide[3, :100])
    assert torch.equal(gumbel_noise(keys.flip(0), 50_000).flip(0), wide)
    # neighbouring keys give unrelated rows
    pair = gumbel_noise(torch.tensor([1, 2]), 50_000).double()
    assert abs(float(torch.corrcoef(pair)[0, 1])) < 4 / math.sqrt(50_000)


def test_noise_does_not_depend_on_threads() -> None:
    keys, threads = torch.arange(9), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = gumbel_noise(keys, 30_000)
        torch.set_num_threads(2)
        assert torch.equal(gumbel_noise(keys, 30_000), one)
    finally:
        torch.set_num_threads(threads)


FILTERS = [
    pytest.param(0.7, 0, 1.0, 0.0, id="temperature"),
    pytest.param(1.0, 5, 1.0, 0.0, id="top-k"),
    pytest.param(1.0, 1, 1.0, 0.0, id="top-1"),
    pytest.param(1.0, 1000, 1.0, 0.0, id="top-k-beyond-the-vocabulary"),
    pytest.param(1.0, 0, 0.6, 0.0, id="top-p"),
    pytest.param(1.0, 0, 1e-6, 0.0, id="top-p-of-one-token"),
    pytest.param(1.0, 0, 1.0, 0.1, id="min-p"),
    pytest.param(1.3, 12, 0.8, 0.05, id="all"),
    pytest.param(0.5, 30, 0.95, 0.2, id="all-cold"),
]


@pytest.mark.parametrize(("temperature", "top_k", "top_p", "min_p"), FILTERS)
@pytest.mark.parametrize("vocabulary", [1, 2, 31, 257])
def test_filters_equal_transformers(
    temperature: float, top_k: int, top_p: float, min_p: float, vocabulary: int
) -> None:
    generator = torch.Generator().manual_seed(vocabulary)
    logits = 3 * torch.randn(40, vocabulary, generator=generator)  # distinct almost surely
    expected = transformers_filtered(logits, temperature, top_k, top_p, min_p)
    kept = keep_likely(logits / temperature, top_k, top_p, min_p)
    assert torch.equal(kept.isfinite(), expected.isfinite())
    assert torch.equal(kept, expected)


@settings(max_examples=100, deadline=None)
@given(
    values=st.lists(st.integers(-3, 3), min_size=1, max_size=12),
    top_k=st.integers(0, 6),
    top_p=st.sampled_from([0.05, 0.3, 0.5, 0.77, 1.0]),
    min_p=st.sampled_from([0.0, 0.03, 0.3]),
    banned=st.booleans(),
)
def test_ties_at_a_boundary_are_kept_and_nothing_else(
    values: list[int], top_k: int, top_p: float, min_p: float, banned: bool
) -> None:
    """Each filter's rule, written per token in float64: a token stays when its value is one the filter keeps."""
    logits = [float(v) for v in values] + ([-math.inf] if banned else [])
    order = sorted(logits, reverse=True)
    threshold = -math.inf
    if 0 < top_k < len(order):
        threshold = order[top_k - 1]
        order = [v if v >= threshold else -math.inf for v in order]
    if top_p < 1.0:
        total = sum(math.exp(v) for v in order)
        before, margin = 0.0, math.inf
        last = order[0]
        for v in order:
            margin = min(margin, abs(before / total - top_p))
            if before / total < top_p and v > -math.inf:
                last = v
            before += math.exp(v)
        if margin < 1e-5:
            return  # the boundary itself is within float32's rounding
        threshold = max(threshold, last)
    if min_p > 0.0:
        threshold = max(threshold, max(values) + math.log(min_p))
    kept = keep_likely(torch.tensor([logits]), top_k, top_p, min_p)[0].tolist()
    assert [k > -math.inf for k in kept] == [v >= threshold and v > -math.inf for v in logits]


@pytest.mark.parametrize(("temperature", "top_k", "top_p", "min_p"), FILTERS)
def test_draws_follow_the_filtered_softmax(temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    logits = torch.tensor([2.0, -1.0, 0.3, 0.0, 1.7, -3.0, 0.9, -0.2, -torch.inf, 0.55, -5.0, 1.0])
    draws = 20_000
    keys = torch.arange(draws) * 7919 + 13
    tokens = sample(logits.expand(draws, -1), keys, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    probability = transformers_filtered(logits[None], temperature, top_k, top_p, min_p).softmax(dim=1)[0]
    observed = torch.bincount(tokens, minlength=len(logits))
    assert int(observed[probability == 0].sum()) == 0, "a removed or banned token was drawn"
    assert chi_square_p(observed, probability) > CHI_SQUARE_P


def test_temperature_zero_takes_the_largest_logit_and_the_lowest_id_of_a_tie() -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0, -1.0], [5.0, -torch.inf, 5.0, 5.0], [-9.0, -8.0, -7.0, -6.0]])
    for options in ({}, {"top_k": 2, "top_p": 0.5, "min_p": 0.1}):
        assert sample(logits, torch.tensor([1, 2, 3]), temperature=0.0, **options).tolist() == [1, 0, 3]


def test_a_single_allowed_token_is_always_drawn() -> None:
    logits = torch.full((1000, 50), -torch.inf)
    logits[:, 31] = -1e4
    assert sample(logits, torch.arange(1000)).unique().tolist() == [31]


def test_a_rows_token_does_not_depend_on_the_other_rows() -> None:
    logits = torch.randn(64, 101, generator=torch.Generator().manual_seed(3))
    keys = torch.arange(64) * 31
    options = {"temperature": 0.9, "top_k": 40, "top_p": 0.9, "min_p": 0.01}
    together = sample(logits, keys, **options)
    alone = torch.cat([sample(logits[i : i + 1], keys[i : i + 1], **options) for i in range(64)])
    order = torch.randperm(64, generator=torch.Generator().manual_seed(4))
    assert torch.equal(together, alone)
    assert torch.equal(sample(logits[order], keys[order], **options), together[order])
    assert len(together.unique()) > 10


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_without_a_number_is_named(bad: float, temperature: float) -> None:
    logits = torch.zeros(5, 7)
    logits[3, 2] = bad
    with pytest.raises(ValueError, match=r"row 3"):
        sample(logits, torch.arange(5), temperature=temperature)


def test_a_row_without_a_finite_logit_is_named() -> None:
    logits = torch.zeros(3, 7)
    logits[1] = -torch.inf
    with pytest.raises(ValueError, match=r"row 1"):
        sample(logits, torch.arange(3))


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ((-0.1, 0, 1.0, 0.0), "temperature"),
        ((math.nan, 0, 1.0, 0.0), "temperature"),
        ((math.inf, 0, 1.0, 0.0), "temperature"),
        ((1.0, -1, 1.0, 0.0), "top_k"),
        ((1.0, 0, 0.0, 0.0), "top_p"),
        ((1.0, 0, 1.1, 0.0), "top_p"),
        ((1.0, 0, math.nan, 0.0), "top_p"),
        ((1.0, 0, 1.0, -0.1), "min_p"),
        ((1.0, 0, 1.0, 1.0), "min_p"),
        ((1.0, 0, 1.0, math.nan), "min_p"),
    ],
)
def test_an_option_out_of_range_is_named(options: tuple[float, int, float, float], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        check_options(*options)
