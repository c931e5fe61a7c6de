"""Distance between sorted probabilities against its definition in float64."""

from __future__ import annotations

import pytest
import torch

from genssd.kernels import head
from genssd.kernels.sorted_distance import linear_sorted_distance

ROWS, V, U = 5, 11, 17


def make(u: int = U) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(u)
    shapes = [(ROWS, 4), (V, 4), (ROWS, 6), (u, 6)]
    return [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes]


def by_definition(
    p: torch.Tensor, q: torch.Tensor, log_a: torch.Tensor | None = None, log_b: torch.Tensor | None = None
) -> torch.Tensor:
    """Pad, multiply, sort and subtract, one row after the other."""
    rows = []
    for i in range(len(p)):
        a = 1.0 if log_a is None else log_a[i].exp()
        b = 1.0 if log_b is None else log_b[i].exp()
        first, second = (a * p[i]).sort(descending=True).values, (b * q[i]).sort(descending=True).values
        width = max(len(first), len(second))
        pad = [torch.nn.functional.pad(row, (0, width - len(row))) for row in (first, second)]
        rows.append((pad[0] - pad[1]).abs().sum())
    return torch.stack(rows)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("u", [7, V, U])
@pytest.mark.parametrize("chunk", [1, 2, 100])
def test_value_and_gradients(
    monkeypatch: pytest.MonkeyPatch, temperature: float, softcap: float | None, u: int, chunk: int
) -> None:
    hs, ws, ht, wt = make(u)
    log_a = -torch.arange(ROWS, dtype=torch.float64)
    log_b = -torch.linspace(0, 1, ROWS, dtype=torch.float64)
    monkeypatch.setitem(head.CHUNK_BYTES, "cpu", chunk * 4 * 4 * (V + u))
    weight = torch.tensor([1.0, 0.0, 2.0, 0.5, 1.0], dtype=torch.float64)
    inputs = [tensor.requires_grad_() for tensor in (hs, ws, log_a)]
    loss = linear_sorted_distance(
        hs,
        ws,
        ht,
        wt,
        student_log_factor_N=log_a,
        teacher_log_factor_N=log_b,
        temperature=temperature,
        student_softcap=softcap,
        row_weight=weight,
    )
    x = hs @ ws.T if softcap is None else softcap * torch.tanh(hs @ ws.T / softcap)
    rows = by_definition((x / temperature).softmax(1), (ht @ wt.T / temperature).softmax(1), log_a, log_b)
    torch.testing.assert_close(loss.rows, (rows * (weight > 0)).detach(), atol=1e-12, rtol=1e-10)
    expected = torch.autograd.grad((rows * weight).sum(), inputs)
    for a, b in zip(torch.autograd.grad(loss.total, inputs), expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-9)


def test_the_order_of_the_vocabulary_changes_nothing() -> None:
    hs, ws, _, _ = make()
    order = torch.randperm(V, generator=torch.Generator().manual_seed(0))
    same = linear_sorted_distance(hs, ws, hs, ws[order])
    assert float(same.total) == pytest.approx(0.0, abs=1e-12)
    other = linear_sorted_distance(hs, ws, 2.0 * hs, ws)
    assert float(other.total) > 0.1


def test_it_lies_between_zero_and_two() -> None:
    sure = torch.tensor([[40.0]], dtype=torch.float64)
    one_hot = torch.cat([torch.ones(1, 1), torch.zeros(V - 1, 1)]).double()
    flat = torch.zeros(1000, 1, dtype=torch.float64)
    distance = float(linear_sorted_distance(sure, one_hot, sure, flat).total)
    assert distance == pytest.approx(2.0 * (1.0 - 1.0 / 1000), abs=1e-9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, "temperature"),
        ({"student_softcap": -1.0}, "student_softcap"),
        ({"teacher_log_factor_N": torch.zeros(2)}, r"teacher_log_factor_N must be \[5\], not \(2,\)"),
    ],
)
def test_what_it_refuses(change: dict[str, object], message: str) -> None:
    hs, ws, ht, wt = make()
    with pytest.raises(ValueError, match=message):
        linear_sorted_distance(hs, ws, ht, wt, **change)  # type: ignore[arg-type]
