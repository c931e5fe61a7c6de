"""Gradients of the statistics of `linear_logprob` and its top k, against their definitions in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support.head_problems import (
    HIDDEN,
    OPTIONS,
    TARGET,
    WEIGHT,
    assert_close,
    evaluate,
    exact,
    log_softmax,
    problem,
)
from torch import Tensor

from genssd.kernels import head
from genssd.kernels.cross_entropy import linear_cross_entropy
from genssd.kernels.logprob import NonFiniteLogits, TokenStats, linear_logprob


def statistics(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> dict[str, Tensor]:
    """Compute every statistic by its definition, so that torch can differentiate it."""
    x = hidden @ weight.T + (0.0 if bias is None else bias)
    if softcap is not None:
        x = softcap * (x / softcap).tanh()
    z = x / temperature
    logp = log_softmax(z)
    p = logp.exp()
    return {
        "logprob": logp.gather(1, target[:, None])[:, 0],
        "logsumexp": z.logsumexp(1),
        "entropy": -(p * logp.clamp_min(-1e9)).sum(1),
        "sum_p2": (p * p).sum(1),
    }


STATISTICS = ("logprob", "logsumexp", "entropy", "sum_p2")


def ours_and_exact(
    names: tuple[str, ...], hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, **options: Any
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Gradients of a random combination of every row's statistics, in float32 and in float64."""
    generator = torch.Generator().manual_seed(5)
    upstream = {name: torch.randn(len(target), generator=generator) for name in names}
    gradients = []
    for dtype in (torch.float32, torch.float64):
        h, w = hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
        b = None if bias is None else bias.to(dtype)
        if dtype == torch.float32:
            stats = linear_logprob(h, w, target, bias=b, **options)
            values = {name: getattr(stats, name) for name in names}
        else:
            values = statistics(h, w, target, b, **options)
        mixed = sum((upstream[name].to(dtype) * values[name]).sum() for name in names)
        assert isinstance(mixed, Tensor)
        gradients.append(torch.autograd.grad(mixed, (h, w)))
    return gradients[0], gradients[1]


@pytest.mark.parametrize("names", [(name,) for name in STATISTICS] + [STATISTICS, STATISTICS[2:]], ids="+".join)
@pytest.mark.parametrize("options", [{}, *OPTIONS], ids=str)
def test_gradients_of_the_statistics(names: tuple[str, ...], options: dict[str, float]) -> None:
    hidden, weight, target = problem(9, 65)
    for bias in (None, torch.linspace(-2, 2, 65)):
        ours, truth = ours_and_exact(names, hidden, weight, target, bias, **options)
        for value, expected in zip(ours, truth, strict=True):
            torch.testing.assert_close(value.double(), expected, atol=3e-5, rtol=3e-5)


@pytest.mark.parametrize("name", STATISTICS)
def test_gradcheck_of_the_statistics(name: str) -> None:
    hidden, weight, target = problem(3, 5, width=2)
    bias = torch.linspace(-1, 1, 5, dtype=torch.float64)

    def value(h: Tensor, w: Tensor) -> Tensor:
        stats = linear_logprob(h, w, target, bias=bias, temperature=0.8, softcap=3.0)
        assert isinstance(stats, TokenStats)
        return getattr(stats, name)

    assert torch.autograd.gradcheck(value, (hidden.double().requires_grad_(), weight.double().requires_grad_()))


def test_logprob_and_cross_entropy_agree() -> None:
    hidden, weight, target = problem(9, 65)

    def negative(h: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        losses = -linear_logprob(h, w, target, temperature=0.7, softcap=6.0).logprob
        return losses.sum(), losses

    other = evaluate(linear_cross_entropy, hidden, weight, target, temperature=0.7, softcap=6.0)
    assert_close(evaluate(negative, hidden, weight), other, 5e-6)


def test_chunks_do_not_change_the_gradients_of_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    problem_and_bias = (*problem(23, 65), torch.linspace(-2, 2, 65))
    whole, _ = ours_and_exact(STATISTICS, *problem_and_bias)
    for rows in (1, 2, 7, 22):
        monkeypatch.setitem(head.CHUNK_BYTES, "cpu", 4 * 65 * rows)
        monkeypatch.setattr(head, "SLICE", 65 * rows // 2)
        ours, _ = ours_and_exact(STATISTICS, *problem_and_bias)
        for value, expected in zip(ours, whole, strict=True):
            torch.testing.assert_close(value, expected, atol=5e-6, rtol=5e-6)


def test_banned_tokens_have_no_gradient() -> None:
    hidden, weight, target = problem(5, 30)
    bias = torch.zeros(30)
    bias[::3] = -torch.inf
    target = torch.tensor([1, 2, 4, 5, 7])
    ours, truth = ours_and_exact(STATISTICS, hidden, weight, target, bias)
    assert bool((ours[1][::3] == 0).all())
    allowed = bias == 0
    compact, _ = ours_and_exact(STATISTICS, hidden, weight[allowed], torch.tensor([0, 1, 2, 3, 4]), None)
    torch.testing.assert_close(ours[0], compact[0], atol=5e-6, rtol=5e-6)
    torch.testing.assert_close(ours[1][allowed], compact[1], atol=5e-6, rtol=5e-6)
    torch.testing.assert_close(ours[0].double(), truth[0], atol=3e-5, rtol=3e-5)


def test_the_gradient_of_a_nearly_certain_tokens_logprob() -> None:
    weight = torch.tensor([[18.0], [0.1], [0.0]], requires_grad=True)
    linear_logprob(torch.ones(1, 1), weight, torch.tensor([0])).logprob.sum().backward()
    truth = exact(torch.ones(1, 1), weight.detach(), torch.tensor([0]))[3]
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad[1:].double(), -truth[1:], atol=0, rtol=1e-5)
    assert abs(float(weight.grad.sum())) < 1e-7


def test_a_frozen_head_gets_no_gradient_of_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "add_product", None)
    hidden, weight, target = problem(5, 33)
    linear_logprob(hidden.requires_grad_(), weight, target).entropy.sum().backward()
    assert weight.grad is None
    assert hidden.grad is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_probabilities_in_a_gradient_sum_to_one_in_halves(dtype: torch.dtype) -> None:
    """The backward pass rounds like the forward pass: it computes p from x and the forward's logsumexp."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(30, 16, generator=generator).to(dtype)
    hidden[:, -1] = 1.0
    weight = torch.randn(500, 16, generator=generator).to(dtype).float().requires_grad_()
    for bias in (None, 8 * torch.randn(500, generator=generator)):
        for n in range(30):
            stats = linear_logprob(hidden[n : n + 1], weight, torch.tensor([0]), bias=bias)
            (d_weight,) = torch.autograd.grad(stats.logsumexp.sum(), weight)
            assert abs(float(d_weight[:, -1].sum()) - 1.0) < 0.02


def test_statistics_of_half_inputs_have_gradients_of_their_dtypes() -> None:
    hidden, weight, target = problem(9, 65)
    hidden, weight = hidden.bfloat16().requires_grad_(), weight.requires_grad_()
    linear_logprob(hidden, weight, target).logprob.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.dtype == torch.bfloat16
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        stats = linear_logprob(hidden.detach().float(), weight, target)
    assert torch.equal(stats.logprob, linear_logprob(hidden, weight, target).logprob)


def test_an_unsound_bias_or_topk_is_named() -> None:
    with pytest.raises(ValueError, match=r"bias is not differentiated"):
        linear_logprob(HIDDEN, WEIGHT, TARGET, bias=torch.zeros(5, requires_grad=True))
    for topk in (-1, 6):
        with pytest.raises(ValueError, match=r"topk must be in 0\.\.5"):
            linear_logprob(HIDDEN, WEIGHT, TARGET, topk=topk)


@pytest.mark.parametrize("k", [1, 3, 64, 65])
def test_topk_is_the_start_of_the_sorted_vocabulary(k: int) -> None:
    hidden, weight, target = problem(9, 65)
    stats = linear_logprob(hidden.double(), weight.double(), target, topk=k, temperature=0.7, softcap=9.0)
    assert stats.topk is not None
    values, ids = log_softmax(hidden.double() @ weight.double().T, 0.7, 9.0).sort(dim=1, descending=True)
    assert torch.equal(stats.topk.ids, ids[:, :k])
    torch.testing.assert_close(stats.topk.logprob, values[:, :k], atol=1e-12, rtol=1e-12)
    assert stats.topk.ids.dtype == torch.int64
    narrow = linear_logprob(hidden, weight, target, topk=k).topk
    assert narrow is not None
    assert narrow.logprob.dtype == torch.float32
    assert linear_logprob(hidden, weight, target).topk is None


def test_of_equal_tokens_the_topk_has_the_lower_ids_first() -> None:
    logits = [[1.0, 3.0, 3.0, 2.0, 3.0, 1.0], [0.0] * 6, [5.0, 4.0, 3.0, 2.0, 1.0, 0.0], [1.0, 1.0, 2.0, 2.0, 1.0, 2.0]]
    hidden, weight = torch.eye(4), torch.tensor(logits).T
    order = [sorted(range(6), key=lambda v, row=row: (-row[v], v)) for row in logits]
    assert order[0] == [1, 2, 4, 3, 0, 5]
    for k in range(1, 7):
        topk = linear_logprob(hidden, weight, torch.zeros(4, dtype=torch.int64), topk=k).topk
        assert topk is not None
        assert topk.ids.tolist() == [row[:k] for row in order]
        assert bool((topk.logprob.diff(dim=1) <= 0).all())


def test_ties_in_a_large_vocabulary_at_the_edge_of_the_topk() -> None:
    weight = (torch.arange(3000) % 7).float()[:, None]
    topk = linear_logprob(torch.ones(3, 1), weight, torch.zeros(3, dtype=torch.int64), topk=500).topk
    assert topk is not None
    expected = sorted(range(3000), key=lambda v: (-(v % 7), v))[:500]
    assert topk.ids.tolist() == [expected] * 3


def test_banned_tokens_come_last_in_the_topk() -> None:
    bias = torch.full((9,), -torch.inf)
    bias[[2, 6]] = torch.tensor([0.0, 1.0])
    topk = linear_logprob(torch.zeros(1, 4), torch.ones(9, 4), torch.tensor([2]), bias=bias, topk=4).topk
    assert topk is not None
    assert topk.ids.tolist() == [[6, 2, 0, 1]]
    assert topk.logprob[0, 2:].tolist() == [-math.inf, -math.inf]


def test_the_first_of_the_topk_has_rank_one() -> None:
    """The two logits differ by less than one rounding step of their log-probabilities."""
    weight = torch.zeros(3000, 1)
    weight[5], weight[9] = 0.1, 0.1 + 3e-8
    stats = linear_logprob(torch.ones(2, 1), weight, torch.tensor([5, 9]), topk=2)
    assert stats.rank.tolist() == [2, 1]
    assert stats.topk is not None
    assert stats.topk.ids[0].tolist() == [9, 5]


def test_topk_has_no_gradient_and_changes_no_other() -> None:
    hidden, weight, target = problem(9, 65)
    hidden.requires_grad_(), weight.requires_grad_()
    stats, plain = (linear_logprob(hidden, weight, target, topk=k) for k in (4, 0))
    assert stats.topk is not None
    assert not stats.topk.logprob.requires_grad
    assert not stats.rank.requires_grad
    with pytest.raises(RuntimeError, match="does not require grad"):
        stats.topk.logprob.sum().backward()
    ours, without = (torch.autograd.grad(s.logprob.sum(), (hidden, weight)) for s in (stats, plain))
    for value, expected in zip(ours, without, strict=True):
        assert torch.equal(value, expected)


def test_a_row_with_nan_is_named_for_any_topk() -> None:
    hidden, weight = torch.tensor([[0.0], [math.inf], [0.0]]), torch.tensor([[0.0], [0.0], [1.0], [-1.0]])
    for k in range(5):
        with pytest.raises(NonFiniteLogits, match="row 1"):
            linear_logprob(hidden, weight, torch.zeros(3, dtype=torch.int64), topk=k)


def test_topk_and_gradients_of_no_rows() -> None:
    hidden, weight = torch.empty(0, 6, requires_grad=True), torch.ones(9, 6, requires_grad=True)
    stats = linear_logprob(hidden, weight, torch.empty(0, dtype=torch.int64), topk=3)
    assert stats.topk is not None
    assert stats.topk.ids.shape == stats.topk.logprob.shape == (0, 3)
    d_hidden, d_weight = torch.autograd.grad(stats.logprob.sum(), (hidden, weight))
    assert d_hidden.shape == (0, 6)
    assert torch.equal(d_weight, torch.zeros(9, 6))


def test_topk_is_sliced_and_joined_with_the_rest() -> None:
    stats = linear_logprob(*problem(13, 31), topk=4)
    joined = TokenStats.concatenate([stats[0:1], stats[1:9], stats[9:13]])
    assert stats.topk is not None
    assert joined.topk is not None
    assert torch.equal(joined.topk.ids, stats.topk.ids)
    assert torch.equal(joined.topk.logprob, stats.topk.logprob)
    assert TokenStats.concatenate([stats, linear_logprob(*problem(2, 31))]).topk is None


@pytest.mark.parametrize("bias", [None, torch.ones(7)], ids=["plain", "bias"])
def test_torch_sees_the_operators_of_the_statistics(bias: Tensor | None) -> None:
    hidden, weight, target = problem(5, 7)
    forward = (hidden.requires_grad_(), weight.requires_grad_(), target, bias, 0.9, 8.0, 2, True)
    torch.library.opcheck(torch.ops.genssd.linear_logprob.default, forward)
    stats, upstream = torch.randn(4, 5), torch.randn(4, 5)
    backward = (hidden.detach(), weight.detach(), target, bias, stats, upstream, 0.9, 8.0, True, True)
    torch.library.opcheck(torch.ops.genssd.linear_logprob_backward.default, backward)


def test_statistics_compile_as_a_whole() -> None:
    hidden, weight, target = problem(5, 33)

    def loss(h: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        stats = linear_logprob(h * 1.5, w, target, temperature=0.9, softcap=9.0, topk=2)
        return stats.logprob.sum() + 0.3 * stats.entropy.sum(), stats.sum_p2

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert_close(evaluate(compiled, hidden, weight), evaluate(loss, hidden, weight), 1e-6)
