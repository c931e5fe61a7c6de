"""Losses over spans of bytes against their definitions, span after span in float64."""

from __future__ import annotations

import random

import pytest
import torch

from genssd.distill.train.span_losses import SMALLEST_REST, SpanHead, SpanLoss, align_spans, sum_span_losses

V, U, D = 13, 19, 5
STUDENT_ENDS, TEACHER_ENDS = [3, 5, 9, 10, 10], [5, 6, 8, 9, 10, 10]
SPANS = ([0, 0, 1, 2, 3], [0, 1, 1, 1, 2, 3])


def test_spans_of_a_known_pair() -> None:
    assert align_spans(STUDENT_ENDS, TEACHER_ENDS) == (*SPANS, 4)
    assert align_spans([2, 4, 7], [1, 4, 6]) == ([0, 0, -1], [0, 0, -1], 1)
    assert align_spans([3, 3], [3]) == ([0, -1], [0], 1)
    assert align_spans([3, 3, 5], [3, 5]) == ([0, 1, 1], [0, 1], 2)
    assert align_spans([], [1]) == ([], [-1], 0)


def test_spans_are_the_finest_common_cut() -> None:
    generator = random.Random(0)
    for _ in range(200):
        length = generator.randint(1, 30)
        cuts = [sorted({*generator.sample(range(1, length + 1), generator.randint(1, length)), length}) for _ in "st"]
        student, teacher, count = align_spans(*cuts)
        common = sorted(set(cuts[0]) & set(cuts[1]))
        assert count == len(common)
        for ends, spans in zip(cuts, (student, teacher), strict=True):
            assert spans == [next(i for i, end in enumerate(common) if position <= end) for position in ends]


def make_heads(seed: int = 0) -> tuple[SpanHead, SpanHead]:
    generator = torch.Generator().manual_seed(seed)

    def head(spans: list[int], vocabulary: int, softcap: float | None) -> SpanHead:
        n = len(spans)
        return SpanHead(
            torch.randn(n, D, generator=generator, dtype=torch.float64),
            torch.randn(vocabulary, D, generator=generator, dtype=torch.float64),
            softcap,
            torch.randint(vocabulary, (n,), generator=generator),
            torch.tensor(spans),
        )

    return head(SPANS[0], V, None), head(SPANS[1], U, 4.0)


def distributions(head: SpanHead, temperature: float) -> torch.Tensor:
    x = head.hidden_ND @ head.weight_VD.T
    x = x if head.softcap is None else head.softcap * torch.tanh(x / head.softcap)
    return (x / temperature).softmax(1)


def by_definition(
    kind: SpanLoss, student: SpanHead, teacher: SpanHead, weight: torch.Tensor, temperature: float
) -> torch.Tensor:
    total = torch.zeros((), dtype=torch.float64)
    sides = [(head, distributions(head, temperature)) for head in (student, teacher)]
    for span in range(4):
        rows = [[i for i, s in enumerate(head.span_N.tolist()) if s == span] for head, _ in sides]
        w = weight[rows[0]].mean()
        tokens = [torch.stack([p[i, head.target_N[i]] for i in r]) for (head, p), r in zip(sides, rows, strict=True)]
        p, q = tokens[0].prod(), tokens[1].prod().detach()
        if kind == "span_kl":
            rest = (1 - q) * ((1 - q + SMALLEST_REST) / (1 - p + SMALLEST_REST)).log()
            total = total + w * (q * (q / p).log() + rest)
        elif kind == "sampled_reverse_kl":
            total = total + w * ((p / q).log().detach() * (p.log() - p.log().detach()) + (p / q).log().detach())
        else:
            sorted_rows = [
                (t[:-1].prod() * side[r[-1]]).sort(descending=True).values
                for t, (_, side), r in zip(tokens, sides, rows, strict=True)
            ]
            padded = torch.nn.functional.pad(sorted_rows[0], (0, U - V))
            total = total + w * (padded - sorted_rows[1].detach()).abs().sum()
    return total


@pytest.mark.parametrize("temperature", [1.0, 1.7])
@pytest.mark.parametrize("kind", ["span_kl", "uld", "sampled_reverse_kl"])
def test_value_and_gradient(kind: SpanLoss, temperature: float) -> None:
    student, teacher = make_heads()
    weight = torch.tensor([1.0, 0.5, 2.0, 0.0, 1.0], dtype=torch.float64)
    inputs = [student.hidden_ND.requires_grad_(), student.weight_VD.requires_grad_()]
    total = sum_span_losses(kind, student, teacher, weight, temperature=temperature)
    expected = by_definition(kind, student, teacher, weight, temperature)
    torch.testing.assert_close(total, expected, atol=1e-10, rtol=1e-8)
    gradients = torch.autograd.grad(expected, inputs)
    for a, b in zip(torch.autograd.grad(total, inputs), gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-7)


def test_equal_models_have_no_loss() -> None:
    student, _ = make_heads()
    weight = torch.ones(5, dtype=torch.float64)
    for kind in ("span_kl", "uld", "sampled_reverse_kl"):
        assert float(sum_span_losses(kind, student, student, weight)) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("kind", ["span_kl", "uld", "sampled_reverse_kl"])
def test_tokens_of_weight_zero_and_without_a_span_have_no_effect(kind: SpanLoss) -> None:
    student, teacher = make_heads()
    student.hidden_ND[3] = float("nan")  # span 2, of weight 0
    teacher.hidden_ND[4] = float("inf")
    student.span_N[4] = teacher.span_N[5] = -1
    weight = torch.tensor([1.0, 1.0, 1.0, 0.0, 7.0])
    hidden = student.hidden_ND.float().requires_grad_()
    total = sum_span_losses(
        kind,
        student._replace(hidden_ND=hidden, weight_VD=student.weight_VD.float()),
        teacher._replace(hidden_ND=teacher.hidden_ND.float(), weight_VD=teacher.weight_VD.float()),
        weight,
    )
    (gradient,) = torch.autograd.grad(total, [hidden])
    assert bool(torch.isfinite(gradient).all())
    assert bool((gradient[3:] == 0).all())
    assert float(total.detach()) != 0.0


def test_a_certain_student_has_a_finite_loss() -> None:
    certain = SpanHead(
        torch.tensor([[200.0]]), torch.tensor([[1.0], [0.0]]), None, torch.tensor([0]), torch.tensor([0])
    )
    unsure = certain._replace(hidden_ND=torch.tensor([[0.0]]))
    hidden = certain.hidden_ND.requires_grad_()
    total = sum_span_losses("span_kl", certain, unsure, torch.ones(1))
    (gradient,) = torch.autograd.grad(total, [hidden])
    assert bool(torch.isfinite(torch.cat((total.detach()[None], gradient.flatten()))).all())


def test_without_a_common_end_there_is_no_loss() -> None:
    student, teacher = make_heads()
    student.span_N[:] = teacher.span_N[:] = -1
    total = sum_span_losses(
        "uld", student._replace(hidden_ND=student.hidden_ND.requires_grad_()), teacher, torch.ones(5)
    )
    assert float(total.detach()) == 0.0
    total.backward()  # type: ignore[no-untyped-call]
