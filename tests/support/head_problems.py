"""Small problems over a linear head, and the cross-entropy by its definition."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

OPTIONS: list[dict[str, float]] = [
    {"temperature": 0.5},
    {"temperature": 2.5},
    {"softcap": 3.0},
    {"softcap": 8.0, "temperature": 0.7},
]


def problem(rows: int, vocabulary: int, width: int = 6, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """hidden, weight and targets, the last of which is the last column."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=generator)
    weight = torch.randn(vocabulary, width, generator=generator)
    target = torch.randint(0, vocabulary, (rows,), generator=generator)
    target[-1] = vocabulary - 1
    return hidden, weight, target


def log_softmax(x: Tensor, temperature: float = 1.0, softcap: float | None = None) -> Tensor:
    """Compute the loss by its definition, so that torch can differentiate it."""
    if softcap is not None:
        x = softcap * (x / softcap).tanh()
    z = x / temperature
    z = z - z.detach().max(1, keepdim=True).values
    return z - z.exp().sum(1, keepdim=True).log()


def naive(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    row_weight: Tensor | None = None,
    ignore_index: int = -100,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The weighted sum and every row's loss, in the dtype of the inputs."""
    kept = target != ignore_index
    logprob = log_softmax(hidden @ weight.T, temperature, softcap).gather(1, (target * kept)[:, None])[:, 0]
    losses = -logprob * kept
    total = losses.sum() if row_weight is None else (losses * row_weight).sum()
    return total, losses


Result = tuple[Tensor, Tensor, Tensor, Tensor]


def evaluate(
    loss: Callable[..., tuple[Tensor, Tensor]], hidden: Tensor, weight: Tensor, *rest: Tensor, **options: Any
) -> Result:
    """total, rows, and the gradients of total in hidden and weight."""
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    total, rows = loss(hidden, weight, *rest, **options)
    return total.detach(), rows.detach(), *torch.autograd.grad(total, (hidden, weight))


def exact(hidden: Tensor, weight: Tensor, target: Tensor, **options: Any) -> Result:
    if "row_weight" in options:
        options["row_weight"] = options["row_weight"].double()
    return evaluate(naive, hidden.double(), weight.double(), target, **options)


def assert_close(ours: Result, expected: Result, tolerance: float) -> None:
    for name, value, truth in zip(("total", "rows", "d_hidden", "d_weight"), ours, expected, strict=True):
        torch.testing.assert_close(
            value.double(),
            truth.double(),
            atol=tolerance,
            rtol=tolerance,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def assert_equal(ours: Result, others: Result) -> None:
    for name, value, other in zip(("total", "rows", "d_hidden", "d_weight"), ours, others, strict=True):
        assert torch.equal(value, other), name


HIDDEN, WEIGHT, TARGET = torch.zeros(3, 4), torch.ones(5, 4), torch.tensor([0, 1, 4])
