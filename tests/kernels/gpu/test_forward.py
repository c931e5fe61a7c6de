"""The forward pass's Triton kernels on a real device: values against float64, bits against themselves, memory reads."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from genssd.kernels.activation import (
    clamped_swiglu,
    clamped_swiglu_reference,
    geglu,
    geglu_reference,
    swiglu,
    swiglu_reference,
)
from genssd.kernels.cache import copy_pages, copy_pages_reference, write_kv, write_kv_reference
from genssd.kernels.norm import add_rms_norm, rms_norm, rms_norm_reference

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

UNIT = {torch.float32: 2.0**-21, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
"""Half a unit in the last place of a half, with respect to a value; a few roundings of float32."""


def normal(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, device="cuda", generator=torch.Generator("cuda").manual_seed(seed)).to(dtype)


def assert_within(ours: Tensor, exact: Tensor, units: float) -> None:
    """Every entry, in units of its own size."""
    budget = units * UNIT[ours.dtype] * exact.abs() + 1e-6
    assert bool(((ours.double() - exact).abs() <= budget).all())


@pytest.mark.parametrize("dtype", UNIT, ids=str)
@pytest.mark.parametrize(
    ("rows", "width"), [(1, 1), (300, 63), (2049, 128), (64, 1024), (65, 4096), (3, 5120), (2, 16384)]
)
def test_norms(rows: int, width: int, dtype: torch.dtype) -> None:
    x, residual = normal(rows, width, dtype=dtype), normal(rows, width, dtype=dtype, seed=1)
    weight = torch.linspace(-1, 2, width, device="cuda").to(dtype)
    for offset in (None, 1.0):
        exact = rms_norm_reference(x.double(), weight.double(), 1e-6, offset=offset)
        assert_within(rms_norm(x, weight, 1e-6, offset=offset), exact, 2.1)
        normed, total = add_rms_norm(x, residual, weight, 1e-6, offset=offset)
        assert torch.equal(total, residual + x)
        assert_within(normed, rms_norm_reference(total.double(), weight.double(), 1e-6, offset=offset), 2.1)


@pytest.mark.parametrize("dtype", UNIT, ids=str)
@pytest.mark.parametrize(
    "names",
    [(swiglu, swiglu_reference), (geglu, geglu_reference), (clamped_swiglu, clamped_swiglu_reference)],
    ids=["swiglu", "geglu", "clamped_swiglu"],
)
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (300, 65), (65, 3072), (64, 12288)])
def test_gated_units(names: tuple[Callable[[Tensor], Tensor], ...], rows: int, width: int, dtype: torch.dtype) -> None:
    gate_up = 3 * normal(rows, 2 * width, dtype=dtype)
    assert_within(names[0](gate_up), names[1](gate_up.double()), 4 if dtype == torch.float32 else 1.1)


@pytest.mark.parametrize("dtype", UNIT, ids=str)
@pytest.mark.parametrize(("normed", "offset"), [(False, None), (True, None), (True, 1.0)])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "width", "rotated"),
    [(14, 2, 64, 64), (32, 8, 80, 20), (9, 3, 96, 96), (16, 8, 128, 128), (32, 8, 128, 96), (8, 1, 256, 256)],
)
def test_writes(
    heads: int, kv_heads: int, width: int, rotated: int, normed: bool, offset: float | None, dtype: torch.dtype
) -> None:
    rows, pages, page = 70, 9, 16
    qkv = normal(rows, heads + 2 * kv_heads, width, dtype=dtype)
    angle = normal(rows, rotated // 2, dtype=torch.float32, seed=1)
    slot = torch.randperm(pages * page, device="cuda")[:rows]
    slot[::7] = -1
    cache = torch.full((2, pages, page, kv_heads, width), torch.nan, device="cuda", dtype=dtype)
    exact_cache = cache.double()
    norms = [torch.linspace(-1, 2, width, device="cuda").to(dtype)] * 2 if normed else [None, None]
    q = write_kv(
        qkv, angle.cos(), angle.sin(), cache[0], cache[1], slot, heads=heads, q_norm=norms[0], k_norm=norms[1],
        norm_offset=offset,
    )  # fmt: skip
    wide = [None if norm is None else norm.double() for norm in norms]
    exact_q = write_kv_reference(
        qkv.double(), angle.cos(), angle.sin(), exact_cache[0], exact_cache[1], slot, heads=heads, q_norm=wide[0],
        k_norm=wide[1], norm_offset=offset,
    )  # fmt: skip
    for ours, exact in ((q, exact_q), (cache[0], exact_cache[0])):
        scale = float(exact.nan_to_num().abs().max())  # a rotation adds two products of rounded factors
        torch.testing.assert_close(ours.double(), exact, atol=4 * UNIT[dtype] * scale, rtol=0, equal_nan=True)
    torch.testing.assert_close(cache[1].double(), exact_cache[1], atol=0, rtol=0, equal_nan=True)


def test_a_row_has_the_same_bits_in_any_batch() -> None:
    x, weight = normal(513, 1024, dtype=torch.bfloat16), normal(1024, dtype=torch.bfloat16, seed=1)
    assert torch.equal(rms_norm(x, weight, 1e-6)[7:8], rms_norm(x[7:8], weight, 1e-6))
    whole, alone = add_rms_norm(x, x, weight, 1e-6), add_rms_norm(x[7:8], x[7:8], weight, 1e-6)
    assert torch.equal(whole[0][7:8], alone[0])
    assert torch.equal(swiglu(x)[7:8], swiglu(x[7:8]))
    qkv, norm = normal(513, 24, 128, dtype=torch.bfloat16), normal(128, dtype=torch.bfloat16)
    angle, slot = normal(513, 64, dtype=torch.float32), torch.arange(513, device="cuda")
    k, v = torch.zeros(2, 33, 16, 4, 128, device="cuda", dtype=torch.bfloat16)

    def write(rows: slice) -> Tensor:
        return write_kv(
            qkv[rows], angle[rows].cos(), angle[rows].sin(), k, v, slot[rows], heads=16, q_norm=norm, k_norm=norm
        )

    q, keys = write(slice(None)), k.clone()
    assert torch.equal(q[7:8], write(slice(7, 8)))
    assert torch.equal(k, keys)


@pytest.mark.parametrize("boxes", [False, True])
def test_copied_pages(boxes: bool) -> None:
    """boxes: the tokens of a page and head are contiguous, as in the engine's cache."""
    kv = normal(4, 2, 40, 8, 16, 128, dtype=torch.bfloat16)
    kv = kv.transpose(3, 4) if boxes else kv
    expected = kv.clone()
    order = torch.randperm(40, device="cuda")
    copy_pages(kv, order[:15], order[20:35])
    copy_pages_reference(expected, order[:15], order[20:35])
    assert torch.equal(kv, expected)


def test_pages_beyond_two_to_the_31_entries() -> None:
    """8.6 GB of keys and values in bf16."""
    kv = torch.zeros(1, 2, 65536 + 8, 16, 16, 128, device="cuda", dtype=torch.bfloat16)
    qkv = normal(1, 48, 128, dtype=torch.bfloat16)
    angle = torch.zeros(1, 64, device="cuda")
    last = 65536 + 7
    write_kv(qkv, angle.cos(), angle.sin(), kv[0, 0], kv[0, 1], torch.tensor([last * 16 + 15], device="cuda"), heads=16)
    assert torch.equal(kv[0, 0, last, 15], qkv[0, 16:32])
    assert torch.equal(kv[0, 1, last, 15], qkv[0, 32:])
    copy_pages(kv, torch.tensor([last], device="cuda"), torch.tensor([last - 1], device="cuda"))
    assert torch.equal(kv[:, :, last - 1], kv[:, :, last])
    assert int(kv.count_nonzero()) == int(2 * (qkv[:, 16:] != 0).sum())


def test_a_lost_gradient_is_refused() -> None:
    x, weight = normal(4, 64, dtype=torch.bfloat16).requires_grad_(), normal(64, dtype=torch.bfloat16)
    runs: list[Callable[[], object]] = [
        lambda: rms_norm(x, weight, 1e-6),
        lambda: add_rms_norm(x, x, weight, 1e-6),
        lambda: swiglu(x),
        lambda: geglu(x),
        lambda: clamped_swiglu(x),
    ]
    for run in runs:
        with pytest.raises(ValueError, match="not differentiated"):
            run()
        with torch.no_grad():
            run()


def test_the_operators_are_captured_into_a_graph() -> None:
    x, weight = normal(8, 256, dtype=torch.bfloat16), normal(256, dtype=torch.bfloat16)
    k, v = torch.zeros(2, 4, 16, 2, 32, device="cuda", dtype=torch.bfloat16)
    angle, slot = torch.zeros(8, 16, device="cuda"), torch.arange(8, device="cuda")

    def step() -> Tensor:
        h, total = add_rms_norm(x, x, weight, 1e-6)
        q = write_kv(h.view(8, 8, 32), angle.cos(), angle.sin(), k, v, slot, heads=4)
        return swiglu(torch.cat((q.flatten(1), total), 1))

    expected = step().clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    found.zero_()
    slot[4:] = -1
    k.zero_()
    graph.replay()
    assert torch.equal(found, expected)
    assert bool((k.flatten(0, 1)[:4] != 0).any())
    assert not bool((k.flatten(0, 1)[4:] != 0).any())
