"""The cache's kernels, through Triton's interpreter, against the reference in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from genssd.kernels import cache_triton
from genssd.kernels.cache import copy_pages_reference, write_kv_reference

PAGE = 4
ROUNDING = {torch.float32: 2.0**-21, torch.float16: 2.0**-9}  # bf16 is truncated by the interpreter


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uninitialised memory is NaN, so that reading it shows."""
    empty = torch.empty
    monkeypatch.setattr(cache_triton.torch, "empty", lambda *size, **options: empty(*size, **options).fill_(torch.nan))


def inputs(
    rows: int, heads: int, kv_heads: int, width: int, dtype: torch.dtype, rotated: int | None = None
) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(width)
    qkv = torch.randn(rows, heads + 2 * kv_heads, width, generator=generator).to(dtype)
    angle = torch.randn(rows, (rotated or width) // 2, generator=generator)
    slot = torch.randperm(5 * PAGE, generator=generator)[:rows]
    slot[1::3] = -1
    return qkv, angle.cos(), angle.sin(), slot


def pages(kv_heads: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return views of one tensor, like a layer of an engine's cache, with NaN in unwritten slots."""
    k, v = torch.full((2, 5, PAGE, kv_heads, width), torch.nan, dtype=dtype)
    return k, v


def ours(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    slot: Tensor,
    kv: tuple[Tensor, Tensor],
    heads: int,
    norms: list[Any],
    offset: float | None = None,
) -> tuple[Tensor, ...]:
    return cache_triton.write_kv_rows(qkv, cos, sin, *kv, slot, heads, *norms, 1e-6, offset), *kv


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize(("normed", "offset"), [(False, None), (True, None), (True, 1.0)])
@pytest.mark.parametrize(
    ("rows", "heads", "kv_heads", "width", "rotated"),
    [
        (1, 1, 1, 2, 2), (5, 3, 1, 6, 2), (16, 4, 2, 64, 64), (4, 14, 2, 80, 20), (7, 9, 3, 96, 96), (3, 8, 8, 128, 96),
        (2, 4, 1, 256, 256),
    ],
)  # fmt: skip
def test_values(
    rows: int,
    heads: int,
    kv_heads: int,
    width: int,
    rotated: int,
    normed: bool,
    offset: float | None,
    dtype: torch.dtype,
) -> None:
    qkv, cos, sin, slot = inputs(rows, heads, kv_heads, width, dtype, rotated)
    norms = [torch.linspace(-1, 2, width).to(dtype), torch.linspace(2, 1, width).to(dtype)] if normed else [None, None]
    found = ours(qkv, cos, sin, slot, pages(kv_heads, width, dtype), heads, norms, offset)
    exact_k, exact_v = pages(kv_heads, width, torch.float64)
    q_norm, k_norm = (None if norm is None else norm.double() for norm in norms)
    exact_q = write_kv_reference(
        qkv.double(), cos, sin, exact_k, exact_v, slot, heads=heads, q_norm=q_norm, k_norm=k_norm, norm_offset=offset
    )
    for mine, exact in zip(found, (exact_q, exact_k, exact_v), strict=True):
        assert mine.dtype == dtype
        # a rotation adds two rounded products; slots that nothing writes stay NaN
        scale = exact.nan_to_num().abs().max()
        torch.testing.assert_close(mine.double(), exact, atol=float(ROUNDING[dtype] * scale), rtol=0, equal_nan=True)
    assert int((~found[1].flatten(0, 1).isnan()).all(-1).all(-1).sum()) == int((slot >= 0).sum())


def test_views_of_rows_heads_and_pages() -> None:
    qkv, cos, sin, slot = inputs(6, 3, 2, 16, torch.float32)
    expected = ours(qkv, cos, sin, slot, pages(2, 16, torch.float32), 3, [None, None])
    wide = torch.full((6, 9, 40), torch.nan)
    wide[:, 1:8, :16] = qkv
    angles = torch.stack((cos, sin), -1)
    spread = torch.full((2, 5, PAGE, 4, 16), torch.nan)
    found = ours(
        wide[:, 1:8, :16], angles[..., 0], angles[..., 1], slot, (spread[0, :, :, ::2], spread[1, :, :, ::2]), 3,
        [None, None],
    )  # fmt: skip
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=0, rtol=0, equal_nan=True)
    assert bool(spread[:, :, :, 1::2].isnan().all())


def test_a_row_has_the_same_bits_in_any_batch() -> None:
    qkv, cos, sin, slot = inputs(9, 3, 2, 16, torch.float32)
    whole = ours(qkv, cos, sin, slot, pages(2, 16, torch.float32), 3, [None, None])[0]
    one = slice(5, 6)
    alone = ours(qkv[one], cos[one], sin[one], slot[one], pages(2, 16, torch.float32), 3, [None, None])[0]
    assert torch.equal(whole[one], alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("block", [4, 64])
@pytest.mark.parametrize("boxes", [False, True])
def test_copied_pages(dtype: torch.dtype, block: int, boxes: bool) -> None:
    """boxes: the tokens of a page and head are contiguous."""
    kv = torch.randn(3, 2, 6, 3, 2, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    kv = kv.transpose(3, 4) if boxes else kv
    expected = kv.clone()
    source, destination = torch.tensor([1, 5, 1]), torch.tensor([4, 0, 2])
    cache_triton.copy_page_rows(kv, source, destination, block=block)
    copy_pages_reference(expected, source, destination)
    assert torch.equal(kv, expected)
