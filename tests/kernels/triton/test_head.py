"""The row-wise passes and the loss kernels, through Triton's interpreter, against float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from genssd.kernels import cross_entropy, divergence, divergence_triton, head, logprob, logprob_gradient, rows_triton
from genssd.kernels import topk_divergence as topk_module
from genssd.kernels.divergence import linear_divergence
from genssd.kernels.divergence_terms import DivergenceKind
from genssd.kernels.head import row_logsumexp, softmax_gradient, squash
from genssd.kernels.rows_triton import RowTiles
from genssd.kernels.topk_divergence import topk_divergence

TILES = RowTiles(block=64, num_warps=4)


def rows(width: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(5, width, generator=torch.Generator().manual_seed(seed))


def assert_twice_as_good(ours: Tensor, plain: Tensor, exact: Tensor) -> None:
    """Against float64, at most twice the error of the same arithmetic in torch's float32, and a few roundings."""
    budget = (plain - exact).abs().max()
    floor = 8 * torch.finfo(torch.float32).eps * exact.abs().max().clamp_min(1.0)
    assert (ours - exact).abs().max() <= 2 * budget + floor


@pytest.mark.parametrize("width", [1, 63, 64, 65, 257, 1025])
@pytest.mark.parametrize(("temperature", "softcap"), [(1.0, None), (0.7, None), (1.3, 4.0)])
def test_logsumexp(width: int, temperature: float, softcap: float | None) -> None:
    x = rows(width)
    ours = rows_triton.logsumexp_rows(x, temperature, softcap, tiles=TILES)
    exact = row_logsumexp(x.double(), temperature, softcap)
    assert_twice_as_good(ours, row_logsumexp(x, temperature, softcap), exact)


def test_logsumexp_of_bans_nans_and_far_logits() -> None:
    x = rows(200)
    x[0] = -torch.inf
    x[1, :150] = -torch.inf
    x[2, 30] = torch.nan
    x[3] += 1e4
    x[4] -= 1e4
    ours = rows_triton.logsumexp_rows(x, 1.0, None, tiles=TILES)
    assert ours[0] == -torch.inf
    assert bool(ours[2].isnan())
    kept = [1, 3, 4]
    torch.testing.assert_close(ours[kept], x[kept].logsumexp(1), atol=2e-3, rtol=1e-6)


@pytest.mark.parametrize("width", [1, 63, 65, 300])
@pytest.mark.parametrize(("temperature", "softcap"), [(1.0, None), (0.7, 4.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])  # bf16 is truncated by the interpreter
@pytest.mark.parametrize("terms", [1, 3])
def test_softmax_gradient(
    width: int, temperature: float, softcap: float | None, dtype: torch.dtype, terms: int
) -> None:
    x, coefficients = rows(width), rows(5, seed=1)[:terms].contiguous()
    if softcap is None:
        x[:, :: max(2, width // 5)] = -torch.inf
        x[:, -1] = 0.0
    exact_x = x.double()
    exact = softmax_gradient(
        exact_x, row_logsumexp(exact_x, temperature, softcap), coefficients.double(), temperature, softcap,
        torch.float64,
    )  # fmt: skip
    lse = row_logsumexp(x, temperature, softcap)
    plain = softmax_gradient(x.clone(), lse, coefficients, temperature, softcap, dtype)
    ours = rows_triton.softmax_gradient_rows(x.clone(), lse, coefficients, temperature, softcap, dtype, tiles=TILES)
    assert ours.dtype == dtype
    assert_twice_as_good(ours.double(), plain.double(), exact)


@pytest.mark.parametrize("width", [1, 63, 64, 65, 300])
@pytest.mark.parametrize(("temperature", "softcap"), [(1.0, None), (0.7, 4.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_cross_entropy_rows(width: int, temperature: float, softcap: float | None, dtype: torch.dtype) -> None:
    x, weight = rows(width), torch.tensor([1.0, 0.5, 0.0, 2.0, 1.0])
    target = torch.tensor([0, width - 1, 0, width // 2, width // 3])
    x[0, 0] = 60.0  # probability 1 but for a rounding, where p - 1 would lose the gradient
    x[2] = 0.0

    def evaluate(x: Tensor) -> tuple[Tensor, Tensor]:
        lse = row_logsumexp(x, temperature, softcap)
        loss = lse - squash(x, temperature, softcap).gather(1, target[:, None])[:, 0]
        dz = (squash(x, temperature, softcap) - lse[:, None]).exp() * weight[:, None].to(x)
        dz = dz.scatter(1, target[:, None], weight[:, None].to(x) * torch.expm1(-loss[:, None]))
        return loss.masked_fill(weight == 0, 0.0), head.unsquash_gradient(dz, x, temperature, softcap)

    exact, plain = evaluate(x.double()), evaluate(x)
    loss, dx = rows_triton.cross_entropy_rows(x, target, weight, temperature, softcap, dtype, tiles=TILES)
    assert_twice_as_good(loss, plain[0], exact[0])
    assert dx.dtype == dtype
    assert_twice_as_good(dx.double(), plain[1].to(dtype).double(), exact[1])
    assert dx.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()


@pytest.mark.parametrize("kind", get_args(DivergenceKind))
@pytest.mark.parametrize("width", [1, 64, 65, 300])
def test_divergence_in_half_precision_overwrites_the_logits(kind: str, width: int) -> None:
    x, y, weight = rows(width), rows(width, seed=1), torch.ones(5)
    mix = {"forward_kl": 0.0, "reverse_kl": 0.0}.get(kind, 0.3)
    exact = divergence.divergence_rows(x.double(), y.double(), weight.double(), kind, mix, 1.0, None, None, x.dtype)
    _, dx = divergence_triton.divergence_rows(x, y, weight, kind, mix, 1.0, None, None, torch.float16, tiles=TILES)
    assert dx.dtype == torch.float16
    torch.testing.assert_close(dx.float(), exact[1], atol=1e-6, rtol=2e-3)


@pytest.mark.parametrize("kind", get_args(DivergenceKind))
@pytest.mark.parametrize(("student", "teacher"), [(1, 1), (130, 130), (130, 70), (65, 140)])
@pytest.mark.parametrize("caps", [(None, None), (3.0, 5.0)])
def test_divergence_rows(kind: str, student: int, teacher: int, caps: tuple[float | None, float | None]) -> None:
    x, y = rows(student), rows(teacher, seed=1)
    weight = torch.tensor([1.0, 0.5, 0.0, 2.0, 1.0])
    for mix in (0.1, 0.9) if kind not in ("forward_kl", "reverse_kl") else (0.0,):
        options = (kind, mix, 0.8, *caps)
        exact = divergence.divergence_rows(x.double(), y.double(), weight.double(), *options, torch.float64)
        plain = divergence.divergence_rows(x.clone(), y, weight, *options, torch.float32)
        ours = divergence_triton.divergence_rows(x.clone(), y, weight, *options, torch.float32, tiles=TILES)
        for value in range(2):
            assert_twice_as_good(ours[value], plain[value], exact[value])
        assert bool((ours[1][2] == 0).all())


@pytest.mark.parametrize("kind", get_args(DivergenceKind))
def test_equal_rows_do_not_diverge(kind: str) -> None:
    x = rows(150)
    mix = {"forward_kl": 0.0, "reverse_kl": 0.0}.get(kind, 0.3)
    loss, dx = divergence_triton.divergence_rows(
        x.clone(), x, torch.ones(5), kind, mix, 1.0, None, None, torch.float32, tiles=TILES
    )
    torch.testing.assert_close(loss, torch.zeros(5), atol=1e-6, rtol=0)
    torch.testing.assert_close(dx, torch.zeros(5, 150), atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", get_args(DivergenceKind))
def test_bans_and_far_logits_stay_finite(kind: str) -> None:
    x, y = rows(150), rows(150, seed=1)
    x[:, 40:110] = y[:, 40:110] = -torch.inf
    x[1, 3], y[1, 4] = 500.0, 500.0  # all of each distribution where the other has almost nothing
    x[2] += 1e4
    mix = {"forward_kl": 0.0, "reverse_kl": 0.0}.get(kind, 0.3)
    loss, dx = divergence_triton.divergence_rows(
        x.clone(), y, torch.ones(5), kind, mix, 1.0, None, None, torch.float32, tiles=TILES
    )
    exact, exact_dx = divergence.divergence_rows(
        x.double(), y.double(), torch.ones(5).double(), kind, mix, 1.0, None, None, torch.float64
    )
    torch.testing.assert_close(loss.double(), exact, atol=2e-3, rtol=1e-4)
    torch.testing.assert_close(dx.double(), exact_dx, atol=2e-3, rtol=1e-3)


@pytest.fixture
def through_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Row-wise work of the operators goes to the interpreted kernels, as on a GPU."""

    def small(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *arguments: function(*arguments, tiles=TILES)

    logsumexp, gradient = small(rows_triton.logsumexp_rows), small(rows_triton.softmax_gradient_rows)
    for module in (cross_entropy, topk_module, logprob_gradient):
        if hasattr(module, "row_logsumexp"):
            monkeypatch.setattr(module, "row_logsumexp", logsumexp)
        monkeypatch.setattr(module, "softmax_gradient", gradient)
    monkeypatch.setattr(divergence, "divergence_rows", small(divergence_triton.divergence_rows))
    monkeypatch.setitem(head.CHUNK_BYTES, "cpu", 4 * 150 * 4)


def gradients(loss: Callable[..., Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
    hidden, weight = rows(8).to(dtype).requires_grad_(), rows(8, seed=2).repeat(30, 1).to(dtype).requires_grad_()
    total = loss(hidden, weight)
    return total.detach(), *torch.autograd.grad(total, (hidden, weight))


def target() -> Tensor:
    return torch.tensor([0, 149, 7, -100, 63])


LOSSES = {
    "cross_entropy": lambda h, w: cross_entropy.linear_cross_entropy(h, w, target(), softcap=9.0).total,
    "logprob": lambda h, w: logprob.linear_logprob(h, w, target().abs(), temperature=0.8).logprob.sum(),
    "entropy": lambda h, w: logprob.linear_logprob(h, w, target().abs(), temperature=0.8).entropy.sum(),
    "divergence": lambda h, w: linear_divergence(h, w, rows(6).to(h), rows(6, 3).repeat(30, 1).to(h), kind="jsd").total,
    "topk": lambda h, w: (
        topk_divergence(
            h, w, torch.arange(20).reshape(5, 4) * 7, torch.full((5, 4), 0.2).log(), kind="forward_kl"
        ).total
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_the_operators_on_these_kernels(name: str, through_triton: None, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = gradients(LOSSES[name], torch.float32)
    monkeypatch.undo()
    exact, plain = gradients(LOSSES[name], torch.float64), gradients(LOSSES[name], torch.float32)
    for value in range(3):
        assert_twice_as_good(ours[value], plain[value], exact[value])
