"""Divergences from a teacher against their formulas in float64, against torch's autograd, and against TRL's."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from support.head_problems import Result, assert_close, assert_equal
from support.operations import Operations
from torch import Tensor

from genssd.kernels import head
from genssd.kernels.divergence import _linear_divergence, linear_divergence
from genssd.kernels.divergence_terms import DivergenceKind
from genssd.kernels.options import TailRule
from genssd.kernels.topk_divergence import _topk_divergence, topk_divergence

KINDS: tuple[DivergenceKind, ...] = get_args(DivergenceKind)
TAILS: tuple[TailRule, ...] = ("bucket", "renormalize")  # test_student_topk.py has those of reverse_kl alone
VARIANTS: list[dict[str, Any]] = [
    *({"kind": kind} for kind in KINDS),
    {"kind": "jsd", "beta": 0.1},
    {"kind": "jsd", "beta": 0.8},
    {"kind": "skew_forward_kl", "alpha": 0.5},
    {"kind": "skew_reverse_kl", "alpha": 0.5},
    {"kind": "skew_forward_kl", "alpha": 0.0},
    {"kind": "skew_reverse_kl", "alpha": 0.0},
]


def kl(a: Tensor, b: Tensor) -> Tensor:
    """sum a log(a / b) of every row; 0 log 0 is 0."""
    there = a > 0
    ratio = torch.where(there, a, 1.0).log() - torch.where(there, b, 1.0).log()
    return (torch.where(there, a, 0.0) * ratio).sum(1)


def divergence(q: Tensor, p: Tensor, kind: str, beta: float = 0.5, alpha: float = 0.1) -> Tensor:
    """Compute a divergence by its formula from the teacher's and the student's probabilities."""
    if kind == "forward_kl":
        return kl(q, p)
    if kind == "reverse_kl":
        return kl(p, q)
    if kind == "jsd":
        m = beta * q + (1 - beta) * p
        return beta * kl(q, m) + (1 - beta) * kl(p, m)
    if kind == "skew_forward_kl":
        return kl(q, alpha * q + (1 - alpha) * p)
    return kl(p, (1 - alpha) * q + alpha * p)


def probabilities(hidden: Tensor, weight: Tensor, temperature: float = 1.0, softcap: float | None = None) -> Tensor:
    x = hidden @ weight.T
    if softcap is not None:
        x = softcap * (x / softcap).tanh()
    z = x / temperature
    z = z - z.detach().max(1, keepdim=True).values
    return z.exp() / z.exp().sum(1, keepdim=True)


def naive(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    temperature: float = 1.0,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    row_weight: Tensor | None = None,
    vocabulary: str = "restrict",
    **kind: Any,
) -> tuple[Tensor, Tensor]:
    shared = min(len(weight), len(teacher_weight))
    if vocabulary == "restrict":
        weight, teacher_weight = weight[:shared], teacher_weight[:shared]
    p = probabilities(hidden, weight, temperature, student_softcap)
    q = probabilities(teacher_hidden.double(), teacher_weight.double(), temperature, teacher_softcap)
    losses = divergence(q[:, :shared], p[:, :shared], **kind)
    return (losses if row_weight is None else losses * row_weight.double()).sum(), losses


def naive_topk(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    logprob: Tensor,
    *,
    tail: str = "bucket",
    temperature: float = 1.0,
    student_softcap: float | None = None,
    row_weight: Tensor | None = None,
    **kind: Any,
) -> tuple[Tensor, Tensor]:
    """Row by row, over a list of outcomes: the used tokens and, as a bucket, all other tokens."""
    losses = []
    for row in range(len(hidden)):
        p_all = probabilities(hidden[row : row + 1], weight, temperature, student_softcap)[0]
        q_all = [math.exp(value) if token >= 0 else 0.0 for token, value in zip(ids[row], logprob[row], strict=True)]
        used = [k for k, token in enumerate(ids[row].tolist()) if 0 <= token < len(weight)]
        tokens = [int(ids[row, k]) for k in used]
        others = [v for v in range(len(weight)) if v not in tokens]
        p, q = p_all[tokens], torch.tensor([q_all[k] for k in used], dtype=torch.float64)
        if tail == "bucket":
            p = torch.cat((p, p_all[others].sum(0, keepdim=True)))
            q = torch.cat((q, torch.tensor([1.0 - sum(q_all) if others else 0.0], dtype=torch.float64)))
        if len(p):
            losses.append(divergence((q / q.sum())[None], (p / p.sum())[None], **kind)[0])
        else:
            losses.append(0.0 * hidden[row].sum())
    rows = torch.stack(losses)
    return (rows if row_weight is None else rows * row_weight.double()).sum(), rows


def evaluate(
    loss: Callable[..., tuple[Tensor, Tensor]], hidden: Tensor, weight: Tensor, *rest: Tensor, **options: Any
) -> Result:
    """total, rows, and the gradients of total in the student's hidden states and weight."""
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    total, rows = loss(hidden, weight, *rest, **options)
    return total.detach(), rows.detach(), *torch.autograd.grad(total, (hidden, weight))


def exact(hidden: Tensor, weight: Tensor, *teacher: Tensor, **options: Any) -> Result:
    return evaluate(naive, hidden.double(), weight.double(), *teacher, **options)


def exact_topk(hidden: Tensor, weight: Tensor, ids: Tensor, logprob: Tensor, **options: Any) -> Result:
    return evaluate(naive_topk, hidden.double(), weight.double(), ids, logprob.double(), **options)


def problem(
    rows: int, student: int, teacher: int | None = None, width: int = 6, teacher_width: int = 4, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The student's hidden states and weight, then the teacher's."""
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(rows, width, generator=generator),
        torch.randn(student, width, generator=generator),
        torch.randn(rows, teacher_width, generator=generator),
        torch.randn(teacher or student, teacher_width, generator=generator),
    )


def of_logits(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states and weights with these logits, [N, V] each."""
    return torch.eye(len(student)), student.T.contiguous(), torch.eye(len(teacher)), teacher.T.contiguous()


def doubles(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.double() for x in tensors)


def topk_problem(rows: int, vocabulary: int, k: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The student's hidden states and weight, and the teacher's k most likely tokens."""
    hidden, weight, teacher_hidden, teacher_weight = problem(rows, vocabulary, seed=seed)
    logprob, ids = probabilities(teacher_hidden.double(), teacher_weight.double()).log().topk(k, dim=1)
    return hidden, weight, ids, logprob.float()


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("vocabulary", [1, 2, 257])
def test_equals_the_formulas(variant: dict[str, Any], vocabulary: int) -> None:
    inputs = problem(7, vocabulary)
    truth = exact(*inputs, **variant)
    ours = evaluate(linear_divergence, *inputs, **variant)
    assert all(value.dtype == torch.float32 for value in ours)
    assert_close(ours, truth, 5e-5)
    wide = evaluate(linear_divergence, *doubles(inputs), **variant)
    assert all(value.dtype == torch.float64 for value in wide)
    assert_close(wide, truth, 1e-11)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.6},
        {"temperature": 3.0},
        {"student_softcap": 2.0},
        {"teacher_softcap": 2.0},
        {"student_softcap": 4.0, "teacher_softcap": 2.5, "temperature": 0.7},
    ],
    ids=str,
)
def test_temperature_and_softcaps(kind: DivergenceKind, options: dict[str, float]) -> None:
    """Both models' logits are divided by the temperature, and nothing is multiplied by its square."""
    inputs = problem(7, 65)
    truth = exact(*inputs, kind=kind, **options)
    assert_close(evaluate(linear_divergence, *inputs, kind=kind, **options), truth, 5e-5)
    assert_close(evaluate(linear_divergence, *doubles(inputs), kind=kind, **options), truth, 1e-11)


@pytest.mark.parametrize("kind", KINDS)
def test_a_temperature_is_a_smaller_weight(kind: DivergenceKind) -> None:
    hidden, weight, teacher_hidden, teacher_weight = doubles(problem(7, 65))
    ours = evaluate(linear_divergence, hidden, weight, teacher_hidden, teacher_weight, kind=kind, temperature=4.0)
    other = evaluate(linear_divergence, hidden, weight / 4, teacher_hidden, teacher_weight / 4, kind=kind)
    assert_close(ours, (*other[:3], other[3] / 4), 1e-11)


@pytest.mark.parametrize("kind", ["skew_forward_kl", "skew_reverse_kl"])
@pytest.mark.parametrize("rows", [1, 3, 100])
def test_runs_of_rows_have_an_alpha_of_their_own(
    kind: DivergenceKind, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks of `rows` rows end within runs, between them, or after all of them."""
    hidden, weight, *teacher = problem(9, 17)
    monkeypatch.setitem(head.CHUNK_BYTES, "cpu", 4 * rows * 34)
    runs, row_weight = [(2, 0.1), (0, 0.3), (4, 0.5), (3, 0.05)], torch.linspace(0.5, 1.5, 9)
    ours = evaluate(linear_divergence, hidden, weight, *teacher, kind=kind, alpha=runs, row_weight=row_weight)
    start, total, losses, d_hidden, d_weight = 0, 0.0, [], [], 0.0
    for count, alpha in runs:
        part = slice(start, start + count)
        start += count
        if count:
            truth = exact(
                hidden[part], weight, teacher[0][part], teacher[1], kind=kind, alpha=alpha, row_weight=row_weight[part]
            )
            total, d_weight = total + truth[0], d_weight + truth[3]
            losses.append(truth[1])
            d_hidden.append(truth[2])
    assert_close(ours, (total, torch.cat(losses), torch.cat(d_hidden), d_weight), 2e-5)  # type: ignore[arg-type]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("shift", [0.0, -200.0, 200.0])
def test_equal_models_have_no_divergence_and_no_gradient(variant: dict[str, Any], shift: float) -> None:
    hidden, weight, _, _ = problem(7, 65)
    teacher_hidden = torch.cat((hidden, torch.full((7, 1), shift)), 1)
    teacher_weight = torch.cat((weight, torch.ones(65, 1)), 1)
    ours = evaluate(linear_divergence, hidden, weight, teacher_hidden, teacher_weight, **variant)
    for value in ours:
        # float32 has steps of 1.5e-5 near 200
        torch.testing.assert_close(value, torch.zeros_like(value), atol=2e-4 if shift else 3e-6, rtol=0)
    for value in evaluate(linear_divergence, *doubles((hidden, weight, teacher_hidden, teacher_weight)), **variant):
        torch.testing.assert_close(value, torch.zeros_like(value), atol=1e-12, rtol=0)


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.7])
def test_jsd_is_symmetric_under_exchange_of_its_sides_and_bounded(beta: float) -> None:
    hidden, weight, teacher_hidden, teacher_weight = doubles(problem(9, 65, teacher_width=6))
    weight, teacher_weight = 3 * weight, 3 * teacher_weight
    a = linear_divergence(hidden, weight, teacher_hidden, teacher_weight, kind="jsd", beta=beta).rows
    b = linear_divergence(teacher_hidden, teacher_weight, hidden, weight, kind="jsd", beta=1 - beta).rows
    torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)
    bound = -beta * math.log(beta) - (1 - beta) * math.log(1 - beta)
    assert bound <= math.log(2)
    assert bool(((a > 0) & (a <= bound)).all())


def test_jsd_of_disjoint_models_is_the_entropy_of_its_weights() -> None:
    inputs = of_logits(torch.tensor([[0.0, 300.0]]), torch.tensor([[300.0, 0.0]]))
    for beta in (0.1, 0.5, 0.9):
        total, _, d_hidden, d_weight = evaluate(linear_divergence, *inputs, kind="jsd", beta=beta)
        expected = -beta * math.log(beta) - (1 - beta) * math.log(1 - beta)
        assert float(total) == pytest.approx(expected, rel=1e-5)
        assert bool(d_hidden.isfinite().all() & d_weight.isfinite().all())


def test_limits_of_the_mixtures() -> None:
    hidden, *rest = doubles(problem(9, 65))
    inputs = (0.3 * hidden, *rest)
    forward, reverse = (evaluate(linear_divergence, *inputs, kind=kind) for kind in ("forward_kl", "reverse_kl"))
    small = 1e-9
    for kind, limit in (("skew_forward_kl", forward), ("skew_reverse_kl", reverse)):
        assert_close(evaluate(linear_divergence, *inputs, kind=kind, alpha=0.0), limit, 1e-11)
        assert_close(evaluate(linear_divergence, *inputs, kind=kind, alpha=small), limit, 1e-4)
    for beta, limit in ((small, forward), (1 - small, reverse)):
        jsd = evaluate(linear_divergence, *inputs, kind="jsd", beta=beta)
        assert_close(tuple(value / small for value in jsd), limit, 1e-4)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["skew_forward_kl", "skew_reverse_kl"])
def test_skew_divergences_are_bounded(kind: DivergenceKind) -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (50 * torch.randn(9, 65, generator=generator) for _ in range(2))
    for alpha in (0.01, 0.1, 0.9):
        rows = linear_divergence(*of_logits(student, teacher), kind=kind, alpha=alpha).rows
        assert bool(((rows >= 0) & (rows <= -math.log(alpha) + 1e-5)).all())


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_certain_and_opposite_models_stay_finite(variant: dict[str, Any]) -> None:
    student, teacher = torch.zeros(3, 5), torch.zeros(3, 5)
    student[0, 1], teacher[0, 2] = 200.0, 200.0
    student[1, 1], teacher[1, 1] = 1e4, 1e4
    student[2], teacher[2, 0] = -1e4, -1e4
    inputs = of_logits(student, teacher)
    total, rows, d_hidden, d_weight = evaluate(linear_divergence, *inputs, **variant)
    exact_total, exact_rows, _, exact_weight = evaluate(linear_divergence, *doubles(inputs), **variant)
    torch.testing.assert_close(total.double(), exact_total, atol=1e-3, rtol=1e-5)
    torch.testing.assert_close(rows.double(), exact_rows, atol=1e-3, rtol=1e-5)
    torch.testing.assert_close(d_weight.double(), exact_weight, atol=1e-3, rtol=1e-5)
    assert bool(d_hidden.isfinite().all())  # dx times logits of 1e4: its digits are lost


@pytest.mark.parametrize("kind", KINDS)
def test_huge_logits(kind: DivergenceKind) -> None:
    student, teacher = torch.zeros(2, 50), torch.zeros(2, 50)
    student[0, 7], teacher[0, 8] = 1e4, 1e4
    student[1], teacher[1] = 1e4, -1e4
    total, rows, d_hidden, d_weight = evaluate(linear_divergence, *of_logits(student, teacher), kind=kind)
    expected = {"jsd": math.log(2), "skew_forward_kl": -math.log(0.1), "skew_reverse_kl": -math.log(0.1)}
    assert float(rows[0]) == pytest.approx(expected.get(kind, 1e4), rel=1e-4)
    assert abs(float(rows[1])) < 1e-4
    assert float(total) == pytest.approx(float(rows.sum()))
    assert bool(d_hidden.isfinite().all() & d_weight.isfinite().all())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("policy", ["restrict", "drop"])
@pytest.mark.parametrize(("student", "teacher"), [(40, 43), (43, 40), (1, 5), (5, 1)])
def test_vocabularies_of_different_widths(kind: DivergenceKind, policy: str, student: int, teacher: int) -> None:
    inputs = problem(7, student, teacher)
    truth = exact(*inputs, kind=kind, vocabulary=policy, temperature=0.8, student_softcap=6.0)
    options = {"kind": kind, "vocabulary": policy, "temperature": 0.8, "student_softcap": 6.0}
    assert_close(evaluate(linear_divergence, *inputs, **options), truth, 5e-5)
    assert_close(evaluate(linear_divergence, *doubles(inputs), **options), truth, 1e-11)
    if policy == "restrict":
        beyond = evaluate(linear_divergence, *inputs, **options)[3][min(student, teacher) :]
        assert bool((beyond == 0).all())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("student", "teacher"), [(40, 43), (43, 40)])
def test_heads_that_agree_on_what_they_share_do_not_diverge(kind: DivergenceKind, student: int, teacher: int) -> None:
    hidden, weight, _, _ = problem(7, 43)
    ours = evaluate(linear_divergence, hidden, weight[:student], hidden, weight[:teacher], kind=kind)
    for value in ours:
        torch.testing.assert_close(value, torch.zeros_like(value), atol=3e-6, rtol=0)


def test_the_teacher_may_have_another_width_and_dtype() -> None:
    hidden, weight, teacher_hidden, teacher_weight = problem(7, 65, teacher_width=9)
    half = (teacher_hidden.bfloat16(), teacher_weight)  # the product is taken in the dtype of the hidden states
    for kind in KINDS:
        ours = evaluate(linear_divergence, hidden, weight, *half, kind=kind)
        assert all(value.dtype == torch.float32 for value in ours)
        assert_equal(ours, evaluate(linear_divergence, hidden, weight, half[0], teacher_weight.bfloat16(), kind=kind))
        assert_close(ours, exact(hidden, weight, half[0], teacher_weight, kind=kind), 0.05)
        wide = evaluate(linear_divergence, hidden, weight, *doubles((teacher_hidden, teacher_weight)), kind=kind)
        assert_close(wide, exact(hidden, weight, teacher_hidden, teacher_weight, kind=kind), 5e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_students(dtype: torch.dtype) -> None:
    hidden, weight, *teacher = problem(7, 65)
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    eps = torch.finfo(dtype).eps
    for kind in KINDS:
        ours = evaluate(linear_divergence, hidden, weight, *teacher, kind=kind)
        assert [value.dtype for value in ours] == [torch.float32, torch.float32, dtype, dtype]
        for value, truth in zip(ours, exact(hidden, weight, *teacher, kind=kind), strict=True):
            assert (value - truth).abs().max() <= 8 * eps * truth.abs().max().clamp_min(1.0)
        mixed = evaluate(linear_divergence, hidden, weight.float(), *teacher, kind=kind)
        assert mixed[3].dtype == torch.float32


def test_autocast_takes_both_products_in_its_dtype() -> None:
    inputs = problem(7, 65)

    def under_autocast(*arguments: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            return linear_divergence(*arguments, kind="jsd")

    def by_hand(h: Tensor, w: Tensor, th: Tensor, tw: Tensor) -> tuple[Tensor, Tensor]:
        return linear_divergence(h.bfloat16(), w, th.bfloat16(), tw, kind="jsd")

    ours = evaluate(under_autocast, *inputs)
    assert all(value.dtype == torch.float32 for value in ours)
    assert_equal(ours, evaluate(by_hand, *inputs))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_row_weights(kind: DivergenceKind, bad: float) -> None:
    hidden, weight, teacher_hidden, teacher_weight = problem(6, 31)
    row_weight = torch.tensor([1.0, 0.0, 0.25, -2.0, 0.0, 3.0])
    clean = evaluate(
        linear_divergence, hidden, weight, teacher_hidden, teacher_weight, kind=kind, row_weight=row_weight
    )
    truth = exact(hidden, weight, teacher_hidden, teacher_weight, kind=kind, row_weight=row_weight)
    truth[1][[1, 4]] = 0.0  # a row that counts nothing has no loss
    assert_close(clean, truth, 5e-5)
    hidden[1] = bad
    teacher_hidden[[1, 4]] = bad
    ours = evaluate(linear_divergence, hidden, weight, teacher_hidden, teacher_weight, kind=kind, row_weight=row_weight)
    assert_equal(ours, clean)
    assert bool((ours[2][[1, 4]] == 0).all())


def test_the_teacher_gets_no_gradient() -> None:
    hidden, weight, teacher_hidden, teacher_weight = (x.requires_grad_() for x in problem(7, 65))
    linear_divergence(hidden, weight, teacher_hidden, teacher_weight, kind="jsd").total.backward()
    assert teacher_hidden.grad is None
    assert teacher_weight.grad is None
    assert hidden.grad is not None
    assert weight.grad is not None
    logprob = torch.full((7, 2), math.log(0.3), requires_grad=True)
    topk_divergence(hidden, weight, torch.tensor([[0, 1]] * 7), logprob, kind="jsd").total.backward()
    assert logprob.grad is None
    alone = linear_divergence(hidden.detach(), weight.detach(), teacher_hidden, teacher_weight, kind="jsd").total
    assert not alone.requires_grad


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("beta", [None, 0.3])
def test_gradcheck(kind: DivergenceKind, beta: float | None) -> None:
    hidden, weight, teacher_hidden, teacher_weight = doubles(problem(3, 4, 5, width=2, teacher_width=3))
    options = {"kind": kind, "temperature": 0.8, "student_softcap": 3.0, "teacher_softcap": 5.0}
    options |= {} if beta is None else {"beta": beta, "alpha": beta, "vocabulary": "drop"}
    row_weight = torch.tensor([1.0, 0.0, 2.0])

    def total(h: Tensor, w: Tensor) -> Tensor:
        return linear_divergence(h, w, teacher_hidden, teacher_weight, row_weight=row_weight, **options).total

    assert torch.autograd.gradcheck(total, (hidden.requires_grad_(), weight.requires_grad_()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tail", TAILS)
def test_gradcheck_of_topk(kind: DivergenceKind, tail: TailRule) -> None:
    hidden, weight, ids, logprob = topk_problem(3, 5, 3)
    ids[0, 1] = -1
    options = {"kind": kind, "tail": tail, "temperature": 0.8, "student_softcap": 3.0}

    def total(h: Tensor, w: Tensor) -> Tensor:
        return topk_divergence(h, w, ids, logprob, row_weight=torch.tensor([1.0, 0.0, 2.0]), **options).total

    assert torch.autograd.gradcheck(total, (hidden.double().requires_grad_(), weight.double().requires_grad_()))


def test_chunks_do_not_change_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = problem(23, 65, 70)
    hidden, weight, ids, logprob = topk_problem(23, 65, 5)
    row_weight = torch.linspace(0, 1, 23)

    def both(kind: DivergenceKind) -> list[Result]:
        return [
            evaluate(linear_divergence, *inputs, kind=kind, row_weight=row_weight, temperature=0.8),
            evaluate(linear_divergence, *inputs, kind=kind, row_weight=row_weight, vocabulary="drop"),
            *(
                evaluate(topk_divergence, hidden, weight, ids, logprob, kind=kind, tail=tail, row_weight=row_weight)
                for tail in TAILS
            ),
        ]

    whole = {kind: both(kind) for kind in KINDS}
    for size in (1, 4 * 130 * 2, 4 * 130 * 7, 4 * 135 * 22):
        monkeypatch.setitem(head.CHUNK_BYTES, "cpu", size)
        for kind in KINDS:
            for ours, expected in zip(both(kind), whole[kind], strict=True):
                assert_close(ours, expected, 5e-6)
    monkeypatch.undo()
    for entries in (1, 300):
        monkeypatch.setattr(head, "SLICE", entries)
        for kind in KINDS:
            for ours, expected in zip(both(kind), whole[kind], strict=True):
                assert_close(ours, expected, 5e-6)


inside: Callable[..., tuple[Tensor, ...]] = _linear_divergence._init_fn
inside_topk: Callable[..., tuple[Tensor, ...]] = _topk_divergence._init_fn
"""The functions that the operators call, because a dispatch mode sees an operator as one call."""


@pytest.mark.parametrize("kind", KINDS)
def test_no_tensor_of_tokens_times_vocabulary_is_built(kind: DivergenceKind, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(head.CHUNK_BYTES, "cpu", 4 * 1025 * 16)
    hidden, weight, teacher_hidden, teacher_weight = problem(200, 1025, width=3, teacher_width=3)
    ones = torch.ones(200)
    with Operations() as seen:
        inside(hidden, weight, teacher_hidden, teacher_weight, ones, kind, [0.1], [200], 0.9, 20.0, None, True, True)
    assert 3 * 1025 <= seen.elements <= 16 * 1025
    _, _, ids, logprob = topk_problem(200, 1025, 7)
    for tail in TAILS:
        with Operations() as seen:
            inside_topk(hidden, weight, ids, logprob, ones, kind, 0.1, tail, 0.9, 20.0, True, True)
        assert 3 * 1025 <= seen.elements <= 16 * 1025


def test_products_are_taken_only_for_gradients_that_are_wanted() -> None:
    hidden, weight, teacher_hidden, teacher_weight = problem(5, 33)
    _, _, ids, logprob = topk_problem(5, 33, 4)
    ones = torch.ones(5)
    for want_hidden, want_weight in itertools.product([False, True], repeat=2):
        wanted = (want_hidden, want_weight)
        with Operations() as seen:
            _, _, d_hidden, d_weight = inside(
                hidden, weight, teacher_hidden, teacher_weight, ones, "jsd", [0.5], [5], 1.0, None, None, *wanted
            )
        assert seen.products == 2 + sum(wanted)
        assert (d_hidden.numel(), d_weight.numel()) == (5 * 6 * want_hidden, 33 * 6 * want_weight)
        for tail in TAILS:
            with Operations() as seen:
                inside_topk(hidden, weight, ids, logprob, ones, "jsd", 0.5, tail, 1.0, None, *wanted)
            assert seen.products == 1 + sum(wanted)


def test_a_frozen_head_gets_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, *teacher = problem(5, 33)
    _, _, ids, logprob = topk_problem(5, 33, 4)
    monkeypatch.setattr(head, "add_product", None)
    hidden.requires_grad_()
    linear_divergence(hidden, weight, *teacher, kind="jsd").total.backward()
    topk_divergence(hidden, weight, ids, logprob, kind="jsd").total.backward()
    assert weight.grad is None
    assert hidden.grad is not None


def test_without_gradients_only_the_loss_is_computed() -> None:
    inputs = problem(5, 33)
    hidden, weight, ids, logprob = topk_problem(5, 33, 4)
    for loss, arguments in ((linear_divergence, inputs), (topk_divergence, (hidden, weight, ids, logprob))):
        expected = evaluate(loss, *arguments, kind="jsd")
        with torch.no_grad():
            out = loss(*(x.requires_grad_(x.is_floating_point()) for x in arguments), kind="jsd")
        assert not out.total.requires_grad
        assert torch.equal(out.total, expected[0])
        assert torch.equal(out.rows, expected[1])
        assert not loss(*arguments, kind="jsd").rows.requires_grad


def test_a_gradient_from_above_scales_and_backward_may_run_twice() -> None:
    hidden, weight, *teacher = problem(5, 33)
    _, _, ids, logprob = topk_problem(5, 33, 4)
    for loss, rest in ((linear_divergence, teacher), (topk_divergence, (ids, logprob))):
        once = evaluate(loss, hidden, weight, *rest, kind="skew_reverse_kl")
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        total = -3.0 * loss(h, w, *rest, kind="skew_reverse_kl").total
        total.backward(retain_graph=True)
        total.backward()
        assert h.grad is not None
        assert w.grad is not None
        torch.testing.assert_close(h.grad, -6.0 * once[2])
        torch.testing.assert_close(w.grad, -6.0 * once[3])


def test_two_runs_have_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(head.CHUNK_BYTES, "cpu", 4 * 514 * 9)
    inputs = problem(40, 257, width=32)
    topk = topk_problem(40, 257, 8)
    topk[2][:, 3] = -1
    for kind in KINDS:
        assert_equal(*(evaluate(linear_divergence, *inputs, kind=kind) for _ in range(2)))
        assert_equal(*(evaluate(topk_divergence, *topk, kind=kind) for _ in range(2)))


def test_inputs_are_left_as_they_were() -> None:
    inputs, topk = problem(5, 33, 30), topk_problem(5, 33, 4)
    topk[2][:, 3] = -1
    before = [x.clone() for x in (*inputs, *topk)]
    for kind in KINDS:
        evaluate(linear_divergence, *inputs, kind=kind)
        for tail in TAILS:
            evaluate(topk_divergence, *topk, kind=kind, tail=tail)
    for after, copy in zip((*inputs, *topk), before, strict=True):
        assert torch.equal(after, copy)


def test_strides_do_not_matter() -> None:
    inputs, topk = problem(6, 33), topk_problem(6, 33, 4)
    for loss, arguments in ((linear_divergence, inputs), (topk_divergence, topk)):

        def strided(*tensors: Tensor, loss: Callable[..., tuple[Tensor, Tensor]] = loss) -> tuple[Tensor, Tensor]:
            views = [x.repeat_interleave(2, 1)[:, ::2] for x in tensors]
            assert not any(view.is_contiguous() for view in views)
            return loss(*views, kind="jsd")

        assert_close(evaluate(strided, *arguments), evaluate(loss, *arguments, kind="jsd"), 2e-6)


def test_no_rows() -> None:
    inputs = problem(3, 9)
    none = (torch.empty(0, 6), inputs[1], torch.empty(0, 4), inputs[3])
    no_topk = (torch.empty(0, 6), inputs[1], torch.empty(0, 2, dtype=torch.int64), torch.empty(0, 2))
    for loss, arguments in ((linear_divergence, none), (topk_divergence, no_topk)):
        total, rows, d_hidden, d_weight = evaluate(loss, *arguments, kind="jsd")
        assert float(total) == 0.0
        assert rows.shape == (0,)
        assert d_hidden.shape == (0, 6)
        assert torch.equal(d_weight, torch.zeros(9, 6))


@pytest.mark.filterwarnings("ignore:You are importing from 'trl.experimental'")
@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
def test_equals_trls_generalized_jsd(beta: float) -> None:
    gkd = pytest.importorskip("trl.experimental.gkd", exc_type=ImportError)
    hidden, weight, *teacher = doubles(problem(7, 65))

    def theirs(h: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        logits = (h @ w.T)[None], (teacher[0] @ teacher[1].T)[None]
        total = gkd.GKDTrainer.generalized_jsd_loss(*logits, beta=beta, temperature=1.7, reduction="sum")
        return total, total

    kind: dict[str, Any] = {"kind": "jsd", "beta": beta}
    kind = {0.0: {"kind": "forward_kl"}, 1.0: {"kind": "reverse_kl"}}.get(beta, kind)
    ours = evaluate(linear_divergence, hidden, weight, *teacher, temperature=1.7, **kind)
    expected = evaluate(theirs, hidden, weight)
    assert_close((ours[0], ours[0], *ours[2:]), expected, 1e-7)


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
def test_equals_trls_chunked_divergence(beta: float) -> None:
    kernels = pytest.importorskip("trl.kernels.chunked_divergence", exc_type=ImportError)
    hidden, weight, *teacher = problem(7, 65)

    def theirs(h: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        rows, _ = kernels.ChunkedDivergenceFunction.apply(
            h, w, None, *teacher, None, beta, 0.8, 1.0, 3.0, 1.0, 5.0
        )  # fmt: skip
        return rows.sum(), rows

    kind: dict[str, Any] = {"kind": "jsd", "beta": beta}
    kind = {0.0: {"kind": "forward_kl"}, 1.0: {"kind": "reverse_kl"}}.get(beta, kind)
    options = {"temperature": 0.8, "student_softcap": 3.0, "teacher_softcap": 5.0, **kind}
    assert_close(
        evaluate(linear_divergence, hidden, weight, *teacher, **options), evaluate(theirs, hidden, weight), 1e-5
    )


# the teacher's top k


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("k", [1, 5])
def test_topk_equals_the_formulas_on_its_outcomes(variant: dict[str, Any], tail: TailRule, k: int) -> None:
    inputs = topk_problem(7, 33, k)
    truth = exact_topk(*inputs, tail=tail, **variant)
    assert_close(evaluate(topk_divergence, *inputs, tail=tail, **variant), truth, 5e-5)
    hidden, weight, ids, logprob = inputs
    wide = evaluate(topk_divergence, hidden.double(), weight.double(), ids, logprob.double(), tail=tail, **variant)
    assert all(value.dtype == torch.float64 for value in wide)
    assert_close(wide, truth, 1e-11)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.6},
        {"temperature": 3.0},
        {"student_softcap": 2.0},
        {"student_softcap": 4.0, "temperature": 0.7},
    ],
    ids=str,
)
def test_temperature_and_softcap_of_topk(kind: DivergenceKind, tail: TailRule, options: dict[str, float]) -> None:
    inputs = topk_problem(7, 33, 5)
    truth = exact_topk(*inputs, kind=kind, tail=tail, **options)
    assert_close(evaluate(topk_divergence, *inputs, kind=kind, tail=tail, **options), truth, 5e-5)
    hidden, weight, ids, logprob = inputs
    wide = evaluate(
        topk_divergence, hidden.double(), weight.double(), ids, logprob.double(), kind=kind, tail=tail, **options
    )
    assert_close(wide, truth, 1e-11)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("tail", TAILS)
def test_all_tokens_as_topk_are_the_full_divergence(variant: dict[str, Any], tail: TailRule) -> None:
    hidden, weight, *teacher = problem(7, 33)
    full = evaluate(linear_divergence, hidden, weight, *teacher, student_softcap=5.0, **variant)
    logprob, ids = probabilities(*doubles(tuple(teacher))).log().topk(33, dim=1)
    ours = evaluate(topk_divergence, hidden, weight, ids, logprob, tail=tail, student_softcap=5.0, **variant)
    assert_close(ours, full, 2e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tail", TAILS)
def test_topk_of_the_student_itself_has_no_gradient(kind: DivergenceKind, tail: TailRule) -> None:
    hidden, weight, _, _ = problem(7, 33)
    logprob, ids = probabilities(hidden.double(), weight.double()).log().topk(5, dim=1)
    ours = evaluate(topk_divergence, hidden, weight, ids, logprob, kind=kind, tail=tail)
    for value in ours:
        torch.testing.assert_close(value, torch.zeros_like(value), atol=5e-6, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tail", TAILS)
def test_unused_and_unknown_ids(kind: DivergenceKind, tail: TailRule) -> None:
    hidden, weight, ids, logprob = topk_problem(7, 33, 5)
    ids[0, 0], ids[1, 4], ids[2, 2] = -1, -1, 40  # the student's head has 33
    ids[3], ids[4, 1:] = -1, -7
    ids[5, :2] = torch.tensor([33, 2**40])
    ids[6] = torch.tensor([40, 0, -1, 32, 41])
    logprob[0, 0], logprob[1, 4], logprob[3, 0] = math.nan, math.inf, 0.0
    truth = exact_topk(hidden, weight, ids, logprob, kind=kind, tail=tail)
    ours = evaluate(topk_divergence, hidden, weight, ids, logprob, kind=kind, tail=tail)
    assert_close(ours, truth, 5e-5)
    assert bool((ours[2][3] == 0).all())  # nothing used, nothing learnt
    assert abs(float(ours[1][3])) < 1e-6
    wide = evaluate(topk_divergence, hidden.double(), weight.double(), ids, logprob.double(), kind=kind, tail=tail)
    assert_close(wide, truth, 1e-11)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tail", TAILS)
def test_a_row_with_no_known_id_counts_nothing(kind: DivergenceKind, tail: TailRule) -> None:
    """The teacher is certain of a token that the student's head does not have."""
    hidden, weight, _, _ = problem(2, 33)
    hidden[1] = math.nan
    ids, logprob = torch.tensor([[33, -1], [-1, -1]]), torch.tensor([[0.0, -1.0], [-0.5, -0.5]])
    total, rows, d_hidden, d_weight = evaluate(topk_divergence, hidden, weight, ids, logprob, kind=kind, tail=tail)
    for value in (total, rows, d_hidden, d_weight):
        assert bool((value == 0).all())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tail", TAILS)
def test_row_weights_of_topk(kind: DivergenceKind, tail: TailRule) -> None:
    hidden, weight, ids, logprob = topk_problem(6, 33, 5)
    row_weight = torch.tensor([1.0, 0.0, 0.25, -2.0, 0.0, 3.0])
    options = {"kind": kind, "tail": tail, "row_weight": row_weight}
    clean = evaluate(topk_divergence, hidden, weight, ids, logprob, **options)
    truth = exact_topk(hidden, weight, ids, logprob, **options)
    truth[1][[1, 4]] = 0.0  # a row that counts nothing has no loss
    assert_close(clean, truth, 5e-5)
    hidden[1], logprob[1], ids[4] = math.nan, math.nan, 2**40
    assert_equal(evaluate(topk_divergence, hidden, weight, ids, logprob, **options), clean)


def test_rows_of_weight_zero_may_hold_any_logprob() -> None:
    """Zeros, say, as a padded batch does."""
    hidden, weight, ids, logprob = topk_problem(4, 33, 5)
    options = {"kind": "forward_kl", "row_weight": torch.tensor([1.0, 0.0, 1.0, 0.0])}
    clean = evaluate(topk_divergence, hidden, weight, ids, logprob, **options)
    ids[1], logprob[1], logprob[3] = 0, 0.0, math.inf
    assert_equal(evaluate(topk_divergence, hidden, weight, ids, logprob, **options), clean)


@pytest.mark.parametrize("kind", KINDS)
def test_a_student_so_confident_that_the_tail_has_almost_no_mass(kind: DivergenceKind) -> None:
    """1e-12, which 1 - sum of the others would round to 0 in float32."""
    student = torch.full((1, 33), -27.631 - math.log(31.0))
    student[0, :2] = torch.tensor([-0.05, -3.0])
    hidden, weight = torch.ones(1, 1), student.T.contiguous()
    ids, logprob = torch.tensor([[0, 1]]), torch.tensor([[0.6, 0.3]]).log()
    tail = probabilities(hidden.double(), weight.double())[0, 2:].sum()
    assert 9e-13 < float(tail) < 1.1e-12
    ours = evaluate(topk_divergence, hidden, weight, ids, logprob, kind=kind)
    truth = exact_topk(hidden, weight, ids, logprob, kind=kind)
    for value, expected in zip(ours, truth, strict=True):
        torch.testing.assert_close(value.double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours[3][2:].double(), truth[3][2:], atol=0, rtol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_a_teacher_so_confident_that_its_tail_is_lost(variant: dict[str, Any]) -> None:
    """The teacher's probabilities sum to 1 in float32, but the rounded tail is not 0: no loss becomes infinite."""
    teacher = torch.full((2, 33), -23.0)
    teacher[:, 3], teacher[:, 5] = 0.0, -18.0
    logprob, ids = teacher.log_softmax(1).topk(4, dim=1)
    assert float(logprob[0].exp().sum()) == 1.0
    hidden, weight, _, _ = problem(2, 33)
    ours = evaluate(topk_divergence, hidden, weight, ids, logprob, **variant)
    assert all(bool(value.isfinite().all()) for value in ours)


@pytest.mark.parametrize("kind", KINDS)
def test_the_teachers_tail_is_as_exact_as_its_log_probabilities(kind: DivergenceKind) -> None:
    """float64 log-probabilities resolve a tail of 1e-9 for any dtype of the student."""
    hidden, weight, _, _ = problem(2, 33)
    ids = torch.tensor([[3, 5], [0, 32]])
    logprob = torch.tensor([[0.7, 0.3 - 1e-9], [0.9, 0.1 - 1e-9]], dtype=torch.float64).log()
    ours = evaluate(topk_divergence, hidden, weight, ids, logprob, kind=kind)
    assert_close(ours, exact_topk(hidden, weight, ids, logprob, kind=kind), 5e-5)


def test_half_students_of_topk() -> None:
    hidden, weight, ids, logprob = topk_problem(7, 33, 5)
    hidden, weight = hidden.bfloat16(), weight.bfloat16()
    for kind, tail in itertools.product(KINDS, TAILS):
        ours = evaluate(topk_divergence, hidden, weight, ids, logprob, kind=kind, tail=tail, temperature=0.7)
        assert [value.dtype for value in ours] == [torch.float32, torch.float32, torch.bfloat16, torch.bfloat16]
        truth = exact_topk(hidden, weight, ids, logprob, kind=kind, tail=tail, temperature=0.7)
        for value, expected in zip(ours, truth, strict=True):
            assert (value - expected).abs().max() <= 0.04 * expected.abs().max().clamp_min(1.0)
        mixed = evaluate(topk_divergence, hidden, weight.float(), ids, logprob, kind=kind, tail=tail)
        assert mixed[3].dtype == torch.float32


# what torch makes of the operators


@pytest.mark.parametrize("kind", KINDS)
def test_torch_sees_one_operator(kind: DivergenceKind) -> None:
    """Schema, fake tensors, autograd and dispatch, by torch's own checker."""
    hidden, weight, *teacher = problem(5, 7, 9)
    hidden.requires_grad_(), weight.requires_grad_()
    everything = kind == "jsd"
    utils = ("test_schema", "test_autograd_registration", "test_faketensor")
    utils += ("test_aot_dispatch_dynamic",) if everything else ()
    arguments = (hidden, weight, *teacher, torch.ones(5), kind, [0.3, 0.5], [2, 3], 0.9, None, 8.0, True, True)
    torch.library.opcheck(torch.ops.genssd.linear_divergence.default, arguments, test_utils=utils)
    _, _, ids, logprob = topk_problem(5, 7, 3)
    ids[1, 1] = -1
    for tail in (*TAILS, *(("drop", "policy_gradient") if kind == "reverse_kl" else ())):
        topk = (hidden, weight, ids, logprob, torch.ones(5), kind, 0.3, tail, 0.9, None, True, True)
        torch.library.opcheck(torch.ops.genssd.topk_divergence.default, topk, test_utils=utils)


@pytest.mark.parametrize("kind", ["forward_kl", "skew_reverse_kl"])
def test_compiles_as_a_whole(kind: DivergenceKind) -> None:
    hidden, weight, *teacher = problem(5, 33, 30)
    _, _, ids, logprob = topk_problem(5, 33, 4)
    row_weight = torch.linspace(0, 1, 5)
    options = {"kind": kind, "temperature": 0.9, "row_weight": row_weight, "student_softcap": 9.0}

    def loss(h: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        full = linear_divergence(h * 1.5, w, *teacher, **options)
        topk = topk_divergence(h * 1.5, w, ids, logprob, **options)
        return full.total / 3 + topk.total, full.rows + topk.rows

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert_close(evaluate(compiled, hidden, weight), evaluate(loss, hidden, weight), 1e-6)


S_HIDDEN, S_WEIGHT, T_HIDDEN, T_WEIGHT = torch.zeros(3, 4), torch.ones(5, 4), torch.zeros(3, 2), torch.ones(6, 2)
INPUTS = (S_HIDDEN, S_WEIGHT, T_HIDDEN, T_WEIGHT)
IDS, LOGPROB = torch.tensor([[0, 1]] * 3), torch.full((3, 2), -2.0)
TOPK = (S_HIDDEN, S_WEIGHT, IDS, LOGPROB)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((torch.zeros(3, 5), *INPUTS[1:]), {}, r"student hidden \(3, 5\).*student weight \(5, 4\)"),
        ((*INPUTS[:2], torch.zeros(3, 3), T_WEIGHT), {}, r"teacher hidden \(3, 3\).*teacher weight \(6, 2\)"),
        ((*INPUTS[:2], torch.zeros(2, 2), T_WEIGHT), {}, r"3 rows of the student, 2 of the teacher"),
        (INPUTS, {"kind": "kl"}, r"kind must be one of forward_kl.*'kl'"),
        (INPUTS, {"vocabulary": "pad"}, r"vocabulary must be one of restrict, drop, not 'pad'"),
        (INPUTS, {"kind": "jsd", "beta": 0.0}, r"beta must lie in \(0, 1\)"),
        (INPUTS, {"kind": "jsd", "beta": 1.0}, r"beta must lie in \(0, 1\)"),
        (INPUTS, {"kind": "jsd", "beta": math.nan}, r"beta must lie in \(0, 1\)"),
        (INPUTS, {"kind": "skew_forward_kl", "alpha": 1.0}, r"alpha must lie in \[0, 1\)"),
        (INPUTS, {"kind": "skew_reverse_kl", "alpha": -0.1}, r"alpha must lie in \[0, 1\)"),
        (
            INPUTS,
            {"kind": "skew_forward_kl", "alpha": [(1, 0.1), (1, 0.2)]},
            r"runs of alpha must have 3 rows together",
        ),
        (INPUTS, {"kind": "skew_forward_kl", "alpha": [(1, 0.1), (2, 0.0)]}, r"runs of alpha are for the skew kinds"),
        (INPUTS, {"alpha": [(3, 0.1)]}, r"runs of alpha are for the skew kinds"),
        (INPUTS, {"temperature": 0.0}, r"temperature must be positive"),
        (INPUTS, {"student_softcap": -1.0}, r"student_softcap must be positive"),
        (INPUTS, {"teacher_softcap": math.inf}, r"teacher_softcap must be positive"),
        (INPUTS, {"row_weight": torch.ones(4)}, r"row_weight must be \[3\]"),
        (INPUTS, {"row_weight": torch.ones(3, requires_grad=True)}, r"row_weight.*detach"),
    ],
)
def test_wrong_arguments_are_named(arguments: tuple[Tensor, ...], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"linear_divergence.*{message}"):
        linear_divergence(*arguments, **{"kind": "forward_kl", **options})


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((torch.zeros(3, 5), *TOPK[1:]), {}, r"student hidden \(3, 5\).*student weight \(5, 4\)"),
        ((*TOPK[:2], IDS[:2], LOGPROB), {}, r"teacher_ids must be int64 \[3, K\]"),
        ((*TOPK[:2], IDS[:, 0], LOGPROB), {}, r"teacher_ids must be int64 \[3, K\]"),
        ((*TOPK[:2], IDS.int(), LOGPROB), {}, r"teacher_ids.*int32"),
        ((*TOPK[:3], LOGPROB[:, :1]), {}, r"teacher_logprob \(3, 1\) and teacher_ids \(3, 2\)"),
        ((*TOPK[:3], LOGPROB.clone().index_fill_(0, torch.tensor(1), 0.0)), {}, r"probabilities in row 1 sum to 2"),
        (TOPK, {"kind": "kl"}, r"kind must be one of"),
        (TOPK, {"tail": "keep"}, r"tail must be one of bucket, renormalize, drop, policy_gradient, not 'keep'"),
        (TOPK, {"tail": "drop"}, r"tail drop is defined for the kind reverse_kl, not forward_kl"),
        (TOPK, {"tail": "policy_gradient", "kind": "jsd"}, r"tail policy_gradient is .* reverse_kl, not jsd"),
        (TOPK, {"kind": "jsd", "beta": 1.5}, r"beta must lie in \(0, 1\)"),
        (TOPK, {"kind": "skew_reverse_kl", "alpha": 1.0}, r"alpha must lie in \[0, 1\)"),
        (TOPK, {"temperature": -1.0}, r"temperature must be positive"),
        (TOPK, {"student_softcap": 0.0}, r"student_softcap must be positive"),
        (TOPK, {"row_weight": torch.ones(3, 1)}, r"row_weight must be \[3\]"),
        ((*TOPK[:2], IDS[:, :0], LOGPROB[:, :0]), {}, r"teacher_ids"),
    ],
)
def test_wrong_arguments_of_topk_are_named(
    arguments: tuple[Tensor, ...], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=rf"topk_divergence.*{message}"):
        topk_divergence(*arguments, **{"kind": "forward_kl", **options})
