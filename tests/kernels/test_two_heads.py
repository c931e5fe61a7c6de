"""What the losses between a student's head and a frozen teacher's have in common."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from genssd.kernels.head import HeadLoss
from genssd.kernels.sorted_distance import linear_sorted_distance
from genssd.kernels.standardized import linear_standardized_kl

Loss = Callable[..., HeadLoss]
LOSSES = [linear_sorted_distance, linear_standardized_kl]


def make() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator).double() for shape in ((5, 4), (11, 4), (5, 6), (11, 6))]


@pytest.mark.parametrize("loss", LOSSES)
def test_values_of_rows_of_weight_zero_have_no_effect(loss: Loss) -> None:
    hs, ws, ht, wt = make()
    weight = torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0])
    clean = loss(hs, ws, ht, wt, row_weight=weight)
    hs[1], ht[1] = float("nan"), float("inf")
    hs.requires_grad_()
    found = loss(hs, ws, ht, wt, row_weight=weight)
    assert torch.equal(found.rows, clean.rows)
    (gradient,) = torch.autograd.grad(found.total, [hs])
    assert bool(torch.isfinite(gradient).all())
    assert bool((gradient[1] == 0).all())


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("rows", [0, 5])
def test_without_a_row_that_counts_loss_and_gradients_are_zero(loss: Loss, rows: int) -> None:
    hs, ws, ht, wt = make()
    hs, ws = hs[:rows].requires_grad_(), ws.requires_grad_()
    nothing = loss(hs, ws, ht[:rows], wt, row_weight=torch.zeros(rows))
    assert float(nothing.total.detach()) == 0.0
    assert all(bool((gradient == 0).all()) for gradient in torch.autograd.grad(nothing.total, [hs, ws]))


@pytest.mark.parametrize("loss", LOSSES)
def test_other_numbers_of_rows_are_refused(loss: Loss) -> None:
    hs, ws, ht, wt = make()
    with pytest.raises(ValueError, match="3 rows of the student, 5 of the teacher"):
        loss(hs[:3], ws, ht, wt)
