"""Reverse KL over the student's most likely tokens, against torch's autograd over full logits in float64."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import Tensor

from genssd.kernels import head
from genssd.kernels.logprob import linear_logprob
from genssd.kernels.logprob_at import linear_logprob_at
from genssd.kernels.options import TailRule
from genssd.kernels.topk_divergence import topk_divergence

TAILS: tuple[TailRule, ...] = get_args(TailRule)
Gradients = tuple[Tensor, Tensor, Tensor, Tensor]
"""Total, rows, and the gradients of the total in the student's hidden states and weight."""


def heads(rows: int = 9, vocabulary: int = 31, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((rows, 6), (vocabulary, 6), (rows, 4), (vocabulary, 4))
    return tuple(torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes)  # type: ignore[return-value]


def log_softmax(hidden: Tensor, weight: Tensor, temperature: float, softcap: float | None) -> Tensor:
    x = hidden @ weight.T
    return ((x if softcap is None else softcap * (x / softcap).tanh()) / temperature).log_softmax(1)


def oracle(log_p: Tensor, log_q: Tensor, k: int, tail: str) -> Tensor:
    """The losses of the rows whose gradient by autograd is that of the rule, from full log-probabilities."""
    ids = log_p.topk(k, dim=1).indices
    inside = torch.zeros_like(log_p, dtype=torch.bool).scatter_(1, ids, True)
    p, q = log_p.exp(), log_q.exp()
    if tail == "renormalize":
        log_p, log_q = (x.masked_fill(~inside, -torch.inf).log_softmax(1).gather(1, ids) for x in (log_p, log_q))
        return (log_p.exp() * (log_p - log_q)).sum(1)
    terms = p * (log_p - log_q)
    if tail == "policy_gradient":
        surrogate = terms.detach() * log_p
        terms = terms.detach() + surrogate - surrogate.detach()
    total = terms.gather(1, ids).sum(1)
    if tail == "bucket" and k < log_p.shape[1]:
        rest_p, rest_q = ((x * ~inside).sum(1) for x in (p, q))
        total = total + rest_p * (rest_p / rest_q).log()
    return total


def differentiate(total: Tensor, rows: Tensor, inputs: tuple[Tensor, Tensor]) -> Gradients:
    return total.detach(), rows.detach(), *torch.autograd.grad(total, inputs)


def ours(
    tensors: tuple[Tensor, ...], k: int, tail: TailRule, row_weight: Tensor, temperature: float, softcap: float | None
) -> Gradients:
    hidden, weight, teacher_hidden, teacher_weight = tensors
    options = {"temperature": temperature, "softcap": softcap}
    unused = torch.zeros(len(hidden), dtype=torch.int64)
    top = linear_logprob(hidden, weight, unused, topk=k, **options).topk  # type: ignore[arg-type]
    assert top is not None
    inputs = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    loss = topk_divergence(
        *inputs, top.ids, linear_logprob_at(teacher_hidden, teacher_weight, top.ids, **options),  # type: ignore[arg-type]
        kind="reverse_kl", tail=tail, temperature=temperature, student_softcap=softcap, row_weight=row_weight,
    )  # fmt: skip
    return differentiate(loss.total, loss.rows, inputs)


def exact(
    tensors: tuple[Tensor, ...], k: int, tail: str, row_weight: Tensor, temperature: float, softcap: float | None
) -> Gradients:
    hidden, weight, teacher_hidden, teacher_weight = (x.double() for x in tensors)
    inputs = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    log_q = log_softmax(teacher_hidden, teacher_weight, temperature, softcap)
    rows = oracle(log_softmax(*inputs, temperature, softcap), log_q, k, tail)
    return differentiate((rows * row_weight.double()).sum(), rows, inputs)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("k", [1, 5, 31])
@pytest.mark.parametrize(("temperature", "softcap"), [(1.0, None), (1.7, 4.0)])
def test_value_and_gradient_are_those_of_full_logits(
    tail: TailRule, k: int, temperature: float, softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(head.CHUNK_BYTES, "cpu", 4 * 4 * 31)  # four rows in a chunk
    tensors, row_weight = heads(), torch.linspace(0.5, 2.0, 9)
    truth = exact(tensors, k, tail, row_weight, temperature, softcap)
    for given, tolerance in ((tensors, 1e-9), (tuple(x.float() for x in tensors), 2e-5)):
        # a float32 choice may differ among ties alone, of which random logits have none
        results = ours(given, k, tail, row_weight, temperature, softcap)
        for result, value in zip(results, truth, strict=True):
            torch.testing.assert_close(result.double(), value, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("tail", TAILS)
def test_the_whole_vocabulary_is_the_full_divergence(tail: TailRule) -> None:
    """The sum of grad p over all tokens is 0, so drop and policy_gradient have the same gradient there."""
    tensors, ones = heads(), torch.ones(9)
    full = exact(tensors, 31, "drop", ones, 1.0, None)
    for result, value in zip(ours(tensors, 31, tail, ones, 1.0, None), full, strict=True):
        torch.testing.assert_close(result, value, atol=1e-9, rtol=1e-9)


def test_drop_moves_mass_out_of_the_top_k_where_the_models_agree_and_policy_gradient_does_not() -> None:
    hidden, weight, _, _ = heads()
    same = (hidden, weight, hidden, weight)
    for tail, moves in (("drop", True), ("policy_gradient", False), ("bucket", False), ("renormalize", False)):
        _, rows, d_hidden, _ = ours(same, 4, tail, torch.ones(9), 1.0, None)  # type: ignore[arg-type]
        assert float(rows.abs().max()) < 1e-9
        assert bool((d_hidden.abs() > 1e-6).any()) == moves
    probabilities = log_softmax(hidden, weight, 1.0, None).exp()
    ids = probabilities.topk(4, dim=1).indices
    _, _, d_hidden, _ = ours(same, 4, "drop", torch.ones(9), 1.0, None)
    after = log_softmax(hidden - 1e-3 * d_hidden, weight, 1.0, None).exp()
    assert bool((after.gather(1, ids).sum(1) < probabilities.gather(1, ids).sum(1)).all())


@pytest.mark.parametrize("tail", ["drop", "policy_gradient"])
def test_unused_places_and_rows_of_weight_zero(tail: TailRule) -> None:
    hidden, weight, teacher_hidden, teacher_weight = heads()
    ids = log_softmax(hidden, weight, 1.0, None).topk(4, dim=1).indices
    logprob = linear_logprob_at(teacher_hidden, teacher_weight, ids)
    padded = torch.cat((ids, torch.full((9, 2), -1)), 1)
    assert (linear_logprob_at(teacher_hidden, teacher_weight, padded)[:, 4:] == -torch.inf).all()
    results = []
    for given, log_q in ((ids, logprob), (padded, linear_logprob_at(teacher_hidden, teacher_weight, padded))):
        inputs = hidden.clone(), weight.clone().requires_grad_()
        if given is padded:
            inputs[0][3] = torch.nan
        inputs[0].requires_grad_()
        row_weight = torch.ones(9).index_fill(0, torch.tensor([3]), 0.0)
        loss = topk_divergence(*inputs, given, log_q, kind="reverse_kl", tail=tail, row_weight=row_weight)
        results.append(differentiate(loss.total, loss.rows, inputs))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)
    assert (results[1][2][3] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_probabilities_of_several_tokens(dtype: torch.dtype) -> None:
    _, _, hidden, weight = (x.to(dtype) for x in heads())
    ids = torch.randint(0, 31, (9, 3), generator=torch.Generator().manual_seed(1))
    expected = log_softmax(hidden.double(), weight.double(), 0.7, 5.0).gather(1, ids)
    result = linear_logprob_at(hidden.requires_grad_(), weight, ids, temperature=0.7, softcap=5.0)
    assert result.dtype == torch.float32
    assert not result.requires_grad
    torch.testing.assert_close(result.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("hidden", "ids", "options", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(2, 1, dtype=torch.int64), {}, r"hidden \(2, 3\)"),
        (torch.zeros(2, 4), torch.zeros(3, 1, dtype=torch.int64), {}, r"ids must be int64 \[2, K\]"),
        (torch.zeros(2, 4), torch.zeros(2, 1), {}, "ids must be int64.*float32"),
        (torch.zeros(2, 4), torch.full((2, 1), 5), {}, "the id 5 lies outside the vocabulary of 5"),
        (torch.zeros(2, 4), torch.zeros(2, 1, dtype=torch.int64), {"temperature": 0.0}, "temperature must be positive"),
    ],
)
def test_wrong_arguments_are_named(hidden: Tensor, ids: Tensor, options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=f"linear_logprob_at: .*{message}"):
        linear_logprob_at(hidden, torch.zeros(5, 4), ids, **options)
