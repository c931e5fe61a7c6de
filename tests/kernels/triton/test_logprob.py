"""The scoring kernel's values, through Triton's interpreter, against float64.

The interpreter multiplies the bits of bf16: half precision is checked on a GPU, and by ahead-of-time compilation.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from genssd.kernels import logprob_triton
from genssd.kernels.head_triton import HeadLaunch, HeadTiles
from genssd.kernels.logprob import STATISTICS, TokenStats, linear_logprob
from genssd.kernels.logprob_triton import score_rows

SMALL = HeadTiles(block_n=16, block_v=32, block_d=16, num_warps=4, num_stages=2)
DESCRIPTORS = dataclasses.replace(SMALL, descriptors=True)


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uninitialised memory is NaN, so that reading it shows."""
    empty = torch.empty

    def poisoned(*size: Any, **options: Any) -> Tensor:
        tensor = empty(*size, **options)
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor.fill_(-1)

    monkeypatch.setattr(logprob_triton.torch, "empty", poisoned)


def inputs(rows: int, vocabulary: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = 2 * torch.randn(rows, width, generator=generator)
    weight = torch.randn(vocabulary, width, generator=generator)
    target = torch.randint(0, vocabulary, (rows,), generator=generator)
    target[-1] = vocabulary - 1
    return hidden, weight, target


def run(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    programs: int = 3,
    tiles: HeadTiles = SMALL,
    group: int = 2,
) -> TokenStats:
    return TokenStats.from_values(
        score_rows(
            hidden,
            weight,
            target,
            bias,
            temperature,
            softcap,
            launch=HeadLaunch(programs=programs, tiles=tiles, splits=5, group=group, interpret=True),
        )
    )


def assert_as_accurate_as_torch(hidden: Tensor, weight: Tensor, target: Tensor, **options: Any) -> None:
    """Against float64, at most twice the error of the same arithmetic in torch's float32."""
    bias = options.get("bias")
    wide = {**options, "bias": None if bias is None else bias.double()}
    truth = linear_logprob(hidden.double(), weight.double(), target, **wide)
    plain = linear_logprob(hidden, weight, target, **options)
    ours = run(hidden, weight, target, **options)
    for name in ("logprob", "logsumexp", "entropy", "sum_p2"):
        exact = getattr(truth, name)
        budget = (getattr(plain, name) - exact).abs().max()
        floor = 8 * torch.finfo(torch.float32).eps * exact.abs().max().clamp_min(1.0)
        assert (getattr(ours, name) - exact).abs().max() <= 2 * budget + floor, name
    assert torch.equal(ours.rank, truth.rank)


@pytest.mark.parametrize("vocabulary", [1, 255, 256, 257, 1023, 1025])
def test_vocabularies(vocabulary: int) -> None:
    assert_as_accurate_as_torch(*inputs(5, vocabulary, 24))


@pytest.mark.parametrize(("rows", "width"), [(1, 1), (15, 16), (16, 17), (33, 40)])
def test_rows_and_widths(rows: int, width: int) -> None:
    assert_as_accurate_as_torch(*inputs(rows, 70, width))


@pytest.mark.parametrize("options", [{"temperature": 0.7}, {"softcap": 5.0}, {"softcap": 30.0, "temperature": 2.0}])
def test_temperature_and_softcap(options: dict[str, float]) -> None:
    assert_as_accurate_as_torch(*inputs(9, 100, 12), **options)


def test_bias() -> None:
    assert_as_accurate_as_torch(*inputs(9, 100, 12), bias=torch.linspace(-3, 3, 100))


@pytest.mark.parametrize("shift", [200.0, -200.0, -1e4])
def test_a_shift_of_all_logits_changes_nothing(shift: float) -> None:
    hidden, weight, target = inputs(6, 90, 8)
    plain, shifted = run(hidden, weight, target), run(hidden, weight, target, bias=torch.full((90,), shift))
    tolerance = 4 * abs(shift) * torch.finfo(torch.float32).eps
    torch.testing.assert_close(shifted.logprob, plain.logprob, atol=tolerance, rtol=0)
    torch.testing.assert_close(shifted.entropy, plain.entropy, atol=tolerance, rtol=0)


def test_banned_tokens_have_no_probability() -> None:
    hidden, weight, target = inputs(6, 90, 8)
    bias = torch.zeros(90)
    bias[16:64] = -torch.inf  # whole tiles
    bias[70:75] = -torch.inf
    target[:] = torch.tensor([0, 5, 65, 80, 88, 89])
    ours = run(hidden, weight, target, bias=bias)
    kept = bias.isfinite()
    renumbered = torch.cumsum(kept, 0)[target] - 1
    exact = linear_logprob(hidden.double(), weight[kept].double(), renumbered)
    for name in ("logprob", "logsumexp", "entropy", "sum_p2"):
        torch.testing.assert_close(getattr(ours, name).double(), getattr(exact, name), atol=1e-5, rtol=1e-5)
    assert torch.equal(ours.rank, exact.rank)


def test_ties_do_not_raise_the_rank() -> None:
    hidden, weight, _ = inputs(4, 64, 8)
    weight[:] = weight[:1]  # all logits of a row are equal
    stats = run(hidden, weight, torch.tensor([0, 17, 40, 63]))
    assert stats.rank.tolist() == [1, 1, 1, 1]
    torch.testing.assert_close(stats.entropy, torch.full((4,), 64.0).log(), atol=1e-5, rtol=0)


def test_a_row_that_is_not_finite_does_not_touch_the_others() -> None:
    hidden, weight, target = inputs(5, 50, 8)
    clean = run(hidden, weight, target)
    hidden[2] = torch.nan
    broken = run(hidden, weight, target)
    assert not broken.logsumexp[2].isfinite()
    others = torch.tensor([0, 1, 3, 4])
    for name in STATISTICS:
        assert torch.equal(getattr(broken, name)[others], getattr(clean, name)[others])


def test_the_number_of_programs_changes_no_bit() -> None:
    hidden, weight, target = inputs(37, 300, 24)
    one, many = run(hidden, weight, target, programs=1), run(hidden, weight, target, programs=50)
    assert all(torch.equal(getattr(one, name), getattr(many, name)) for name in STATISTICS)


@pytest.mark.parametrize(("rows", "vocabulary", "width"), [(1, 31, 4), (16, 64, 16), (37, 301, 24), (50, 1000, 20)])
def test_descriptors_load_what_pointers_load(rows: int, vocabulary: int, width: int) -> None:
    operands = inputs(rows, vocabulary, width)
    pointers = run(*operands)
    for group in (1, 3):
        described = run(*operands, tiles=DESCRIPTORS, group=group)
        assert all(torch.equal(getattr(pointers, name), getattr(described, name)) for name in STATISTICS)


def test_permuting_rows_permutes_the_results() -> None:
    hidden, weight, target = inputs(32, 120, 24)
    order = torch.randperm(32, generator=torch.Generator().manual_seed(1))
    whole, permuted = run(hidden, weight, target), run(hidden[order], weight, target[order])
    for name in STATISTICS:
        assert torch.equal(getattr(whole, name)[order], getattr(permuted, name))


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "softcap": 5.0}], ids=["plain", "squashed"])
def test_from_the_librarys_product(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits of three rows at a time, in splits whose last one is not full, with a target at either end."""
    monkeypatch.setattr(logprob_triton, "LOGITS_BYTES", 3 * 4 * 157)
    monkeypatch.setattr(logprob_triton, "LOGITS_SPLIT", 64)
    monkeypatch.setattr(logprob_triton, "LOGITS_BLOCK", 16)
    hidden, weight, target = inputs(7, 157, 24)
    target[0] = 0
    bias = torch.linspace(-2, 2, 157) if options else None
    launch = HeadLaunch(programs=1, tiles=SMALL, library=True, interpret=True)
    temperature, softcap = options.get("temperature", 1.0), options.get("softcap")
    ours = TokenStats.from_values(score_rows(hidden, weight, target, bias, temperature, softcap, launch=launch))
    wide = None if bias is None else bias.double()
    exact = linear_logprob(hidden.double(), weight.double(), target, bias=wide, **options)
    for name in STATISTICS:
        torch.testing.assert_close(getattr(ours, name).double(), getattr(exact, name).double(), atol=1e-5, rtol=1e-5)
