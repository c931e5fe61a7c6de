"""The samplers' kernels, through Triton's interpreter, against the CPU's."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from genssd.kernels import draw_triton, filter_triton
from genssd.kernels.draw_triton import draw_rows, write_logits
from genssd.kernels.filter_triton import FilterTiles, sample_rows
from genssd.kernels.head_triton import HeadLaunch, HeadTiles
from genssd.kernels.sampling import gumbel_reference, keep_likely, linear_sample, sample

HEAD_TILES = HeadTiles(block_n=16, block_v=32, block_d=16, num_warps=4, num_stages=2)
LAUNCH = HeadLaunch(programs=3, tiles=HEAD_TILES, interpret=True)

TILES = FilterTiles(split=64, part=32, list_part=16, split_warps=4, tile=16, row_warps=4)


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uninitialised memory is NaN, so that reading it shows."""
    empty = torch.empty

    def poisoned(*size: Any, **options: Any) -> Tensor:
        tensor = empty(*size, **options)
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor.fill_(-1)

    monkeypatch.setattr(filter_triton.torch, "empty", poisoned)


def draw(
    logits: Tensor, keys: Tensor, temperature: float, top_k: int, top_p: float, min_p: float, *, judged: bool = False
) -> Tensor:
    log_min_p = math.log(min_p) if min_p else 0.0
    tiles = dataclasses.replace(TILES, judged=judged)
    return sample_rows(logits, keys, temperature, top_k, top_p, min_p, log_min_p, tiles=tiles)


FILTERS = [
    (1.0, 0, 1.0, 0.0),
    (0.0, 0, 1.0, 0.0),
    (0.7, 5, 1.0, 0.0),
    (1.0, 1, 1.0, 0.0),
    (1.0, 1000, 1.0, 0.0),
    (1.3, 0, 0.6, 0.0),
    (1.0, 0, 1e-6, 0.0),
    (1.0, 0, 1.0, 0.1),
    (1.3, 12, 0.8, 0.05),
]


@pytest.mark.parametrize(("temperature", "top_k", "top_p", "min_p"), FILTERS)
@pytest.mark.parametrize(("vocabulary", "judged"), [(1, False), (64, False), (257, False), (257, True)])
def test_draws_equal_the_cpus(
    temperature: float, top_k: int, top_p: float, min_p: float, vocabulary: int, judged: bool
) -> None:
    logits = 3 * torch.randn(3, vocabulary, generator=torch.Generator().manual_seed(vocabulary))
    logits[0, 0] = -torch.inf if vocabulary > 1 else 0.0
    keys = torch.arange(3) * 7919 - (1 << 62)
    ours = draw(logits, keys, temperature, top_k, top_p, min_p, judged=judged)
    theirs = sample(logits, keys, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("judged", [False, True])
def test_ties_at_a_boundary_are_kept(judged: bool) -> None:
    values = torch.tensor([0.0, 2.0, -0.0, 1.0, 2.0, 0.0, 1.0, -torch.inf, -3.0, 1.0])
    keys = torch.arange(8)
    logits = values.expand(8, -1)
    for top_k, top_p, rows in [(3, 1.0, 3), (2, 1.0, 8), (6, 1.0, 3), (0, 0.4, 3), (0, 0.75, 3), (0, 1e-9, 3)]:
        ours = draw(logits[:rows], keys[:rows], 1.0, top_k, top_p, 0.0, judged=judged)
        assert torch.equal(ours, sample(logits[:rows], keys[:rows], top_k=top_k, top_p=top_p)), (top_k, top_p)
        if top_k == 2:
            assert set(ours.tolist()) == {1, 4}


@pytest.mark.parametrize(("top_k", "judged"), [(7, False), (0, True)])
def test_a_broken_row_is_flagged_and_leaves_the_others_alone(top_k: int, judged: bool) -> None:
    logits = torch.randn(6, 130, generator=torch.Generator().manual_seed(0))
    keys = torch.arange(6)
    clean = draw(logits, keys, 1.0, top_k, 0.9, 0.0, judged=judged)
    logits[1, 100], logits[3, 0] = torch.nan, torch.inf
    logits[4] = -torch.inf
    broken = draw(logits, keys, 1.0, top_k, 0.9, 0.0, judged=judged)
    assert broken[[1, 3, 4]].tolist() == [-1, -1, -1]
    assert torch.equal(broken[[0, 2, 5]], clean[[0, 2, 5]])


def normal(rows: int, vocabulary: int, scale: float = 3.0, seed: int = 0) -> Tensor:
    return scale * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed))


ROWS = {
    "equal": lambda v: torch.full((1, v), 0.25),
    "equal and far from 0": lambda v: torch.full((1, v), -3e7),
    "two values far from 0": lambda v: -3e7 - 2.0 * (torch.arange(v).reshape(1, v) % 9 > 0),
    "two values": lambda v: torch.where(torch.arange(v).reshape(1, v) % 3 == 0, 1.5, -0.5),
    "nearly flat": lambda v: normal(1, v, 0.01),
    "flat": lambda v: normal(1, v, 0.5),
    "huge spread": lambda v: normal(1, v, 1e6),
    "around 0": lambda v: normal(1, v, 1e-30),
    "mostly banned": lambda v: normal(1, v).masked_fill(torch.arange(v) % 7 != v % 7, -torch.inf),
    "on the cuts": lambda v: normal(1, v).round() * 2.0,
    "a long tail": lambda v: torch.cat((torch.zeros(1, 1), torch.full((1, v - 1), -13.7)), 1),
    "one far ahead": lambda v: torch.cat((torch.full((1, 1), 40.0), normal(1, v - 1)), 1),
}
"""Logits of a row, [1, V], by what is odd about them."""


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"),
    [(1.0, 0, 0.9, 0.0), (1.0, 40, 1.0, 0.0), (1.0, 0, 1.0, 0.02), (2.0, 60, 0.7, 0.01), (1.0, 9, 1.0, 0.3)],
)
@pytest.mark.parametrize("judged", [False, True])
def test_filters_of_odd_rows(temperature: float, top_k: int, top_p: float, min_p: float, judged: bool) -> None:
    """Lists that overflow, thresholds below the lowest cut and ties longer than a tile change nothing."""
    logits, keys = torch.cat([make(211) for make in ROWS.values()]), torch.arange(len(ROWS)) * 104729
    expected = sample(logits, keys, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    drawn = draw(logits, keys, temperature, top_k, top_p, min_p, judged=judged)
    assert dict(zip(ROWS, drawn.tolist(), strict=True)) == dict(zip(ROWS, expected.tolist(), strict=True))


@pytest.mark.parametrize(
    "tiles",
    [
        dataclasses.replace(TILES, capacity=1),
        dataclasses.replace(TILES, capacity=1000),
        dataclasses.replace(TILES, capacity=1, rounds=2, tile=8),
        dataclasses.replace(TILES, capacity=1, rounds=3, tile=8, cuts=2),
        dataclasses.replace(TILES, split=256, part=256, list_part=128, cuts=16, steps=8),
        dataclasses.replace(TILES, judged=True),
        dataclasses.replace(TILES, judged=True, capacity=1, cuts=2, steps=1),
        dataclasses.replace(TILES, judged=True, capacity=1000),
    ],
    ids=str,
)
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 0.9), (90, 0.8)])
def test_no_token_depends_on_the_sizes_of_tiles(tiles: FilterTiles, top_k: int, top_p: float) -> None:
    logits, keys = normal(2, 300, 2.0, seed=3), torch.arange(2)
    drawn = sample_rows(logits, keys, 1.0, top_k, top_p, 0.0, 0.0, tiles=tiles)
    assert torch.equal(drawn, sample(logits, keys, top_k=top_k, top_p=top_p))


VALUES = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, -torch.inf, -torch.inf, 3.5]), st.floats(-30, 30, width=32)
)


@settings(max_examples=25, deadline=None)
@given(
    row=st.lists(VALUES, min_size=1, max_size=90).filter(lambda row: max(row) > -math.inf),
    top_k=st.integers(0, 100),
    top_p=st.sampled_from([1.0, 0.99, 0.9, 0.5, 0.1, 1e-4]),
    min_p=st.sampled_from([0.0, 1e-6, 0.05, 0.5]),
    temperature=st.sampled_from([1.0, 0.5, 4.0]),
    key=st.integers(-(1 << 62), 1 << 62),
    judged=st.booleans(),
)
def test_any_row_draws_what_keep_likely_keeps(
    row: list[float], top_k: int, top_p: float, min_p: float, temperature: float, key: int, judged: bool
) -> None:
    """Up to the rounding of the sums: a token outside of what float32 keeps must be at the boundary in float64."""
    logits, keys = torch.tensor([row]), torch.tensor([key])
    drawn = draw(logits, keys, temperature, top_k, top_p, min_p, judged=judged)
    noisy = gumbel_reference(keys, len(row))
    z = logits / temperature
    candidates = {
        int((keep_likely(values, top_k, p, m) + noisy).argmax())
        for values in (z, z.double())
        for p in (top_p, *((top_p - 1e-6, top_p + 1e-6) if top_p < 1.0 else ()))
        for m in (min_p, min_p * (1 - 1e-6), min_p * (1 + 1e-6))
    }
    assert int(drawn) in candidates


@pytest.mark.parametrize(("top_k", "judged"), [(60, False), (0, True)])
def test_a_row_draws_the_same_in_any_batch_and_memory(top_k: int, judged: bool) -> None:
    logits, keys = normal(5, 211), torch.arange(5) * 31
    together = draw(logits, keys, 1.0, top_k, 0.9, 0.0, judged=judged)
    apart = torch.zeros(5, 300)[:, :211].copy_(logits)
    assert torch.equal(draw(apart, keys, 1.0, top_k, 0.9, 0.0, judged=judged), together)
    assert torch.equal(draw(logits[3:4], keys[3:4], 1.0, top_k, 0.9, 0.0, judged=judged), together[3:4])


@pytest.mark.parametrize("options", [{}, {"temperature": 0.6}, {"temperature": 0.0}, {"softcap": 3.0}], ids=str)
@pytest.mark.parametrize("vocabulary", [None, 90])
def test_drawing_in_the_vocabulary_pass(options: dict[str, float], vocabulary: int | None) -> None:
    generator = torch.Generator().manual_seed(1)
    hidden, weight = torch.randn(19, 24, generator=generator), torch.randn(301, 24, generator=generator)
    bias, keys = torch.randn(301, generator=generator), torch.arange(19) * 31 - 7
    if vocabulary is not None:
        bias[vocabulary] += 20.0  # the first id that may not be drawn would win
    expected = linear_sample(hidden, weight, keys, bias=bias, vocabulary=vocabulary, **options)
    tokens, logprob = draw_rows(
        hidden, weight, keys, bias, options.get("temperature", 1.0), options.get("softcap"), vocabulary or 301,
        launch=LAUNCH,
    )  # fmt: skip
    assert torch.equal(tokens, expected.tokens)
    torch.testing.assert_close(logprob, expected.logprob, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_logits_by_descriptors_and_by_the_library(softcap: float | None) -> None:
    generator = torch.Generator().manual_seed(1)
    hidden, weight = torch.randn(19, 24, generator=generator), torch.randn(301, 24, generator=generator)
    bias = torch.randn(301, generator=generator)
    logits = write_logits(hidden, weight, bias, softcap, launch=LAUNCH)
    described = dataclasses.replace(LAUNCH, tiles=dataclasses.replace(HEAD_TILES, descriptors=True))
    assert torch.equal(write_logits(hidden, weight, bias, softcap, launch=described), logits)
    by_library = write_logits(hidden, weight, bias, softcap, launch=dataclasses.replace(LAUNCH, library=True))
    torch.testing.assert_close(by_library, logits, atol=1e-5, rtol=1e-5)


def test_rows_beyond_one_block_of_logits_are_drawn_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(1)
    hidden, weight = torch.randn(7, 24, generator=generator), torch.randn(301, 24, generator=generator)
    whole = draw_rows(hidden, weight, torch.arange(7), None, 1.0, None, 301, launch=LAUNCH)
    monkeypatch.setattr(draw_triton, "LOGITS_BYTES", 3 * 301 * 4)
    parts = draw_rows(hidden, weight, torch.arange(7), None, 1.0, None, 301, launch=LAUNCH)
    assert torch.equal(parts[0], whole[0])
    assert torch.equal(parts[1], whole[1])


def test_a_split_of_a_row_ends_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draw_triton, "DRAW_TILING", draw_triton.DrawTiling(split=128, block=64, num_warps=4))
    generator = torch.Generator().manual_seed(2)
    for vocabulary in (1, 127, 128, 129, 300):
        hidden, weight = torch.randn(3, 8, generator=generator), torch.randn(vocabulary, 8, generator=generator)
        for temperature in (0.0, 1.0):
            drawn = draw_rows(hidden, weight, torch.arange(3), None, temperature, None, vocabulary, launch=LAUNCH)
            expected = linear_sample(hidden, weight, torch.arange(3), temperature=temperature)
            assert torch.equal(drawn[0], expected.tokens)


def test_drawing_flags_a_broken_row_and_breaks_ties_downwards() -> None:
    hidden, weight = torch.ones(3, 8), torch.ones(100, 8)
    hidden[1, 0] = torch.nan
    tokens, _ = draw_rows(hidden, weight, torch.arange(3), None, 0.0, None, 100, launch=LAUNCH)
    assert tokens.tolist() == [0, -1, 0]
