"""The gated units' kernel, through Triton's interpreter, against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from genssd.kernels import activation_triton
from genssd.kernels.activation import clamped_swiglu_reference, geglu_reference, swiglu_reference

ROUNDING = {torch.float32: 2.0**-20, torch.float16: 2.0**-11}  # bf16 is truncated by the interpreter
REFERENCES = {"silu": swiglu_reference, "gelu": geglu_reference, "clamped": clamped_swiglu_reference}
CLAMPS = {"alpha": 1.702, "limit": 7.0}


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uninitialised memory is NaN, so that reading it shows."""
    empty = torch.empty
    monkeypatch.setattr(
        activation_triton.torch, "empty", lambda *size, **options: empty(*size, **options).fill_(torch.nan)
    )


def gate_up(rows: int, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(width)
    return (4 * torch.randn(rows, 2 * width, generator=generator)).to(dtype)


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("name", REFERENCES)
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 63), (2, 64), (4, 65), (3, 300)])
def test_values(name: str, rows: int, width: int, dtype: torch.dtype) -> None:
    x = gate_up(rows, width, dtype)
    exact = REFERENCES[name](x.double())
    ours = activation_triton.gated_rows(x, name, **CLAMPS, block=64)
    assert ours.dtype == dtype
    # gelu by tanh loses digits where 1 + tanh cancels; ours is a quotient and does not, nor does float64
    torch.testing.assert_close(ours.double(), exact, atol=1e-6, rtol=ROUNDING[dtype])


@pytest.mark.parametrize("name", ["silu", "gelu"])
def test_far_gates(name: str) -> None:
    gates = torch.tensor([-1e30, -1e4, -100.0, 0.0, 100.0, 1e4, 1e30])
    ours = activation_triton.gated_rows(torch.cat((gates, torch.ones(7)))[None], name, block=4)
    torch.testing.assert_close(ours[0], gates.clamp_min(0.0), atol=1e-30, rtol=1e-6)


def test_clamped_gates() -> None:
    gate_up = torch.tensor([[-1e30, 1e30, 9.0, torch.nan, 1.0, 3.0, 1e30, -9.0, 1.0, torch.nan]])
    ours = activation_triton.gated_rows(gate_up, "clamped", **CLAMPS, block=4)
    torch.testing.assert_close(ours, clamped_swiglu_reference(gate_up), atol=1e-30, rtol=1e-6, equal_nan=True)


def test_rows_and_columns_may_have_any_stride() -> None:
    x = gate_up(5, 70)
    wide = torch.full((5, 200), torch.nan)
    wide[:, 20:160] = x
    expected = activation_triton.gated_rows(x, "silu", block=64)
    assert torch.equal(activation_triton.gated_rows(wide[:, 20:160], "silu", block=64), expected)
    assert torch.equal(activation_triton.gated_rows(x.T.contiguous().T, "silu", block=64), expected)
