"""The norm's kernel, through Triton's interpreter, against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from genssd.kernels import norm_triton
from genssd.kernels.norm import add_rms_norm_reference, rms_norm_reference

EPS = {torch.float32: 2.0**-22, torch.float16: 2.0**-10}  # bf16 is truncated by the interpreter


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uninitialised memory is NaN, so that reading it shows."""
    empty = torch.empty
    monkeypatch.setattr(norm_triton.torch, "empty", lambda *size, **options: empty(*size, **options).fill_(torch.nan))


def inputs(rows: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows + width)
    x, residual = (5 * torch.randn(2, rows, width, generator=generator)).to(dtype)
    return x, residual, torch.linspace(-1, 2, width).to(dtype)


def close(ours: Tensor, exact: Tensor) -> None:
    """Two roundings to the dtype: of the unit row and of its product with the weight."""
    error = (ours.double() - exact).abs()
    assert bool((error <= EPS[ours.dtype] * exact.abs() + 1e-7).all()), float(error.max())


@pytest.mark.parametrize("dtype", EPS, ids=str)
@pytest.mark.parametrize("offset", [None, 1.0])
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 1), (70, 63), (9, 128), (5, 1000), (3, 1025), (2, 9000)])
def test_values(rows: int, width: int, offset: float | None, dtype: torch.dtype) -> None:
    x, residual, weight = inputs(rows, width, dtype)
    exact = rms_norm_reference(x.double(), weight.double(), 1e-5, offset=offset)
    close(norm_triton.rms_norm_rows(x, weight, 1e-5, offset), exact)
    normed, total = norm_triton.add_rms_norm_rows(x, residual, weight, 1e-5, offset)
    assert torch.equal(total, residual + x)
    close(normed, add_rms_norm_reference(total.double(), torch.zeros(()), weight.double(), 1e-5, offset=offset)[0])


def test_the_product_with_the_weight_is_taken_in_the_dtype() -> None:
    """The unit row is rounded first, as in the models' own code; of that, few entries depend on the order of a sum."""
    x, _, weight = inputs(20, 500, torch.float16)
    plain = rms_norm_reference(x, weight, 1e-5)
    assert int((norm_triton.rms_norm_rows(x, weight, 1e-5) != plain).sum()) < 20


def test_with_an_offset_the_product_is_rounded_once() -> None:
    x, _, weight = inputs(20, 500, torch.float16)
    exact = rms_norm_reference(x.double(), weight.double(), 1e-5, offset=0.0)
    ours = norm_triton.rms_norm_rows(x, weight, 1e-5, 0.0)
    torch.testing.assert_close(ours.double(), exact, atol=1e-6, rtol=2.0**-11 + 1e-6)


@pytest.mark.parametrize("view", ["rows", "columns"])
def test_views(view: str) -> None:
    x, residual, weight = inputs(7, 40, torch.float32)
    wide: Any = torch.full((7, 99), torch.nan) if view == "rows" else torch.full((40, 7), torch.nan).T
    wide[:, :40] = x
    assert torch.equal(
        norm_triton.rms_norm_rows(wide[:, :40], weight, 1e-5), norm_triton.rms_norm_rows(x, weight, 1e-5)
    )
    apart = norm_triton.add_rms_norm_rows(residual, wide[:, :40], weight, 1e-5)
    together = norm_triton.add_rms_norm_rows(residual, x, weight, 1e-5)
    assert all(torch.equal(a, b) for a, b in zip(apart, together, strict=True))


def test_zeros_and_large_rows() -> None:
    weight = torch.ones(8)
    assert torch.equal(norm_triton.rms_norm_rows(torch.zeros(2, 8), weight, 1e-6), torch.zeros(2, 8))
    half = torch.full((1, 8), 6e4, dtype=torch.float16)
    torch.testing.assert_close(norm_triton.rms_norm_rows(half, weight.half(), 1e-6), torch.ones(1, 8).half())


def test_a_row_has_the_same_bits_in_any_batch() -> None:
    x, _, weight = inputs(50, 96, torch.float32)
    whole = norm_triton.rms_norm_rows(x, weight, 1e-6)
    assert torch.equal(whole[13:14], norm_triton.rms_norm_rows(x[13:14], weight, 1e-6))


def test_a_nan_stays_in_its_row() -> None:
    x, _, weight = inputs(20, 48, torch.float32)
    x[7, 3] = torch.nan
    broken = norm_triton.rms_norm_rows(x, weight, 1e-6).isnan().any(1)
    assert broken.nonzero().tolist() == [[7]]


def test_rows_that_fit_no_program_are_refused() -> None:
    with pytest.raises(ValueError, match="16385 are wider than 16384"):
        norm_triton.rms_norm_rows(torch.zeros(1, 16385), torch.zeros(16385), 1e-6)
