"""The samplers' kernels, through Triton's interpreter, against the CPU's."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from genssd.kernels import draw_triton
from genssd.kernels.draw_triton import draw_rows
from genssd.kernels.head_triton import HeadLaunch, HeadTiles
from genssd.kernels.sampling import linear_sample, sample
from genssd.kernels.sampling_triton import sample_rows

TILES = HeadTiles(block_n=16, block_v=32, block_d=16, num_warps=4, num_stages=2)
LAUNCH = HeadLaunch(programs=3, tiles=TILES, interpret=True)


def draw(logits: Tensor, keys: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> Tensor:
    log_min_p = math.log(min_p) if min_p else 0.0
    return sample_rows(logits, keys, temperature, top_k, top_p, min_p, log_min_p, block=64)


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
@pytest.mark.parametrize("vocabulary", [1, 64, 257])
def test_draws_equal_the_cpus(temperature: float, top_k: int, top_p: float, min_p: float, vocabulary: int) -> None:
    logits = 3 * torch.randn(12, vocabulary, generator=torch.Generator().manual_seed(vocabulary))
    logits[0, 0] = -torch.inf if vocabulary > 1 else 0.0
    keys = torch.arange(12) * 7919 - (1 << 62)
    ours = draw(logits, keys, temperature, top_k, top_p, min_p)
    theirs = sample(logits, keys, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    assert torch.equal(ours, theirs)


def test_ties_at_a_boundary_are_kept() -> None:
    values = torch.tensor([0.0, 2.0, -0.0, 1.0, 2.0, 0.0, 1.0, -torch.inf, -3.0, 1.0])
    keys = torch.arange(24)
    logits = values.expand(24, -1)
    for top_k, top_p in [(3, 1.0), (2, 1.0), (6, 1.0), (0, 0.4), (0, 0.75), (0, 1e-9)]:
        ours = draw(logits, keys, 1.0, top_k, top_p, 0.0)
        assert torch.equal(ours, sample(logits, keys, top_k=top_k, top_p=top_p)), (top_k, top_p)
    assert set(draw(logits, keys, 1.0, 2, 1.0, 0.0).tolist()) == {1, 4}


def test_a_broken_row_is_flagged_and_leaves_the_others_alone() -> None:
    logits = torch.randn(6, 130, generator=torch.Generator().manual_seed(0))
    keys = torch.arange(6)
    clean = draw(logits, keys, 1.0, 7, 0.9, 0.0)
    logits[1, 100], logits[3, 0] = torch.nan, torch.inf
    logits[4] = -torch.inf
    broken = draw(logits, keys, 1.0, 7, 0.9, 0.0)
    assert broken[[1, 3, 4]].tolist() == [-1, -1, -1]
    assert torch.equal(broken[[0, 2, 5]], clean[[0, 2, 5]])


@pytest.mark.parametrize("options", [{}, {"temperature": 0.6}, {"temperature": 0.0}, {"softcap": 3.0}], ids=str)
@pytest.mark.parametrize("vocabulary", [None, 90])
def test_drawing_in_the_vocabulary_pass(options: dict[str, float], vocabulary: int | None) -> None:
    generator = torch.Generator().manual_seed(1)
    hidden, weight = torch.randn(19, 24, generator=generator), torch.randn(301, 24, generator=generator)
    bias, keys = torch.randn(301, generator=generator), torch.arange(19) * 31 - 7
    expected = linear_sample(hidden, weight, keys, bias=bias, vocabulary=vocabulary, **options)
    tokens, logprob = draw_rows(
        hidden, weight, keys, bias, options.get("temperature", 1.0), options.get("softcap"), vocabulary or 301,
        launch=LAUNCH,
    )  # fmt: skip
    assert torch.equal(tokens, expected.tokens)
    torch.testing.assert_close(logprob, expected.logprob, atol=2e-5, rtol=1e-5)
    described = dataclasses.replace(LAUNCH, tiles=dataclasses.replace(TILES, descriptors=True))
    again, _ = draw_rows(
        hidden, weight, keys, bias, options.get("temperature", 1.0), options.get("softcap"), vocabulary or 301,
        launch=described,
    )  # fmt: skip
    assert torch.equal(again, tokens)
    by_library, _ = draw_rows(
        hidden, weight, keys, bias, options.get("temperature", 1.0), options.get("softcap"), vocabulary or 301,
        launch=dataclasses.replace(LAUNCH, library=True),
    )  # fmt: skip
    assert torch.equal(by_library, tokens)


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
    for vocabulary in (1, 127, 128, 129, 700):
        hidden, weight = torch.randn(5, 8, generator=generator), torch.randn(vocabulary, 8, generator=generator)
        for temperature in (0.0, 1.0):
            drawn = draw_rows(hidden, weight, torch.arange(5), None, temperature, None, vocabulary, launch=LAUNCH)
            expected = linear_sample(hidden, weight, torch.arange(5), temperature=temperature)
            assert torch.equal(drawn[0], expected.tokens)


def test_drawing_flags_a_broken_row_and_breaks_ties_downwards() -> None:
    hidden, weight = torch.ones(3, 8), torch.ones(100, 8)
    hidden[1, 0] = torch.nan
    tokens, _ = draw_rows(hidden, weight, torch.arange(3), None, 0.0, None, 100, launch=LAUNCH)
    assert tokens.tolist() == [0, -1, 0]
