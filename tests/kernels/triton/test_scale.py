"""The kernel that scales a gradient, through Triton's interpreter, against one rounding of the exact product."""

from __future__ import annotations

import pytest
import torch

from genssd.kernels.scale_triton import BLOCK, scale


@pytest.mark.parametrize("shape", [(0,), (0, 7), (1, 1), (3, 5), (1, BLOCK), (2, BLOCK + 1)])
@pytest.mark.parametrize(("dtype", "result"), [(torch.float32, torch.float16), (torch.float16, torch.float32)])
def test_a_gradient_is_rounded_once(shape: tuple[int, ...], dtype: torch.dtype, result: torch.dtype) -> None:
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    factor = torch.tensor(1.7)
    scaled = scale(gradient, factor, result)
    assert scaled.dtype == result
    # a product of two float32 numbers is exact in float64, and float32 rounds it before it is narrowed
    expected = (gradient.double() * factor.double()).float().to(result)
    assert torch.equal(scaled, expected)


def test_a_factor_that_the_narrow_dtype_does_not_hold() -> None:
    gradient = torch.full((4,), 2.0**-20, dtype=torch.float16)
    assert torch.equal(scale(gradient, torch.tensor(2.0**20), torch.float16), torch.ones(4, dtype=torch.float16))


def test_a_gradient_with_gaps_is_read_by_its_rows() -> None:
    gradient = torch.arange(12.0).reshape(3, 4)[:, :2]
    assert torch.equal(scale(gradient, torch.tensor(2.0), torch.float32), 2 * gradient)


def test_values_that_are_not_finite_stay() -> None:
    gradient = torch.tensor([torch.inf, -torch.inf, torch.nan, 1e38])
    scaled = scale(gradient, torch.tensor(10.0), torch.float32)
    assert scaled.isnan().tolist() == [False, False, True, False]
    assert scaled[[0, 1, 3]].tolist() == [torch.inf, -torch.inf, torch.inf]
