"""The matrix product: values, and bits that do not depend on the batch."""

from __future__ import annotations

import pytest
import torch

from genssd import _core
from genssd.kernels.linear import linear


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 15, 16, 17, 40])
def test_equals_float64(rows: int, bias: bool) -> None:
    x, w, b = torch.randn(rows, 48), torch.randn(30, 48), torch.randn(30)
    expected = x.double() @ w.double().T + (b.double() if bias else 0)
    torch.testing.assert_close(linear(x, w, b if bias else None).double(), expected, atol=2e-5, rtol=0)


@pytest.mark.skipif(not _core.instruction_sets(), reason="there is no native kernel for this processor")
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 96), (128, 384), (96, 259)])
def test_a_row_has_the_same_bits_alone_and_in_any_batch(inputs: int, outputs: int) -> None:
    x, w = torch.randn(70, inputs), torch.randn(outputs, inputs)
    whole = linear(x, w)
    for rows in (1, 2, 3, 7, 16, 33, 64):
        assert torch.equal(linear(x[5 : 5 + rows], w), whole[5 : 5 + rows]), rows
