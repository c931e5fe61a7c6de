"""KL between standardised logits against its definition in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from genssd.kernels import head
from genssd.kernels.standardized import linear_standardized_kl


def make(rows: int = 5, vocabulary: int = 11, wider: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    shapes = [(rows, 4), (vocabulary, 4), (rows, 6), (vocabulary + wider, 6)]
    return [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes]


def by_definition(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    def standardized(z: torch.Tensor) -> torch.Tensor:
        return (z - z.mean(1, keepdim=True)) / (torch.std(z, 1, keepdim=True) + 1e-7) / temperature

    log_q, log_p = standardized(teacher).log_softmax(1), standardized(student).log_softmax(1)
    return temperature**2 * (log_q.exp() * (log_q - log_p)).sum(1)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("wider", [0, 3])
@pytest.mark.parametrize("chunk", [1, 2, 100])
def test_value_and_gradient(monkeypatch: pytest.MonkeyPatch, temperature: float, wider: int, chunk: int) -> None:
    hs, ws, ht, wt = make(wider=wider)
    monkeypatch.setitem(head.CHUNK_BYTES, "cpu", chunk * 4 * 11)
    weight = torch.tensor([1.0, 0.0, 2.0, 0.5, 1.0], dtype=torch.float64)
    hs.requires_grad_()
    ws.requires_grad_()
    found = linear_standardized_kl(hs, ws, ht, wt, temperature=temperature, row_weight=weight)
    rows = by_definition(hs @ ws.T, ht @ wt[:11].T, temperature)
    torch.testing.assert_close(found.rows, (rows * (weight > 0)).detach(), atol=1e-12, rtol=1e-10)
    expected = torch.autograd.grad((rows * weight).sum(), [hs, ws])
    for a, b in zip(torch.autograd.grad(found.total, [hs, ws]), expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-9)


def test_scale_and_shift_of_the_logits_change_nothing() -> None:
    hs, ws, ht, wt = make()
    plain = linear_standardized_kl(hs, ws, ht, wt).total
    torch.testing.assert_close(linear_standardized_kl(3.0 * hs, ws, ht, 0.2 * wt).total, plain, atol=1e-6, rtol=1e-6)
    same = linear_standardized_kl(hs, ws, 5.0 * hs, ws)
    assert float(same.total) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": -1.0}, "temperature"),
    ],
)
def test_what_it_refuses(change: dict[str, Any], message: str) -> None:
    hs, ws, ht, wt = make()
    with pytest.raises(ValueError, match=message):
        linear_standardized_kl(hs, ws, ht, wt, **change)
