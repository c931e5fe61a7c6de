"""Cross-entropy under a head and the gradients of token statistics, against float64 and torch's own."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.head_problems import (
    HIDDEN,
    OPTIONS,
    TARGET,
    WEIGHT,
    assert_close,
    assert_equal,
    evaluate,
    exact,
    log_softmax,
    naive,
    problem,
)
from support.operations import Operations
from torch import Tensor

from genssd.kernels import head
from genssd.kernels.cross_entropy import _linear_cross_entropy, linear_cross_entropy


@pytest.mark.parametrize("vocabulary", [1, 2, 255, 256, 257, 1025])
@pytest.mark.parametrize("rows", [1, 7])
def test_equals_float64_and_torch(vocabulary: int, rows: int) -> None:
    hidden, weight, target = problem(rows, vocabulary)
    if rows > 1:
        target[2] = -100
    truth = exact(hidden, weight, target)
    ours = evaluate(linear_cross_entropy, hidden, weight, target)
    assert all(value.dtype == torch.float32 for value in ours)
    assert_close(ours, truth, 2e-5)
    wide = evaluate(linear_cross_entropy, hidden.double(), weight.double(), target)
    assert all(value.dtype == torch.float64 for value in wide)
    assert_close(wide, truth, 1e-12)

    def torchs(h: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        losses = F.cross_entropy(h @ w.T, target, reduction="none")
        return losses.sum(), losses

    assert_close(wide, evaluate(torchs, hidden.double(), weight.double()), 1e-12)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_temperature_and_softcap(options: dict[str, float]) -> None:
    hidden, weight, target = problem(9, 257)
    truth = exact(hidden, weight, target, **options)
    assert_close(evaluate(linear_cross_entropy, hidden, weight, target, **options), truth, 2e-5)
    wide = evaluate(linear_cross_entropy, hidden.double(), weight.double(), target, **options)
    assert_close(wide, truth, 1e-12)


@pytest.mark.parametrize("options", [{}, {"softcap": 5.0, "temperature": 0.6}], ids=str)
def test_row_weights_scale_losses_and_gradients(options: dict[str, float]) -> None:
    hidden, weight, target = problem(6, 31)
    row_weight = torch.tensor([1.0, 0.0, 0.25, -2.0, 1e-3, 3.0])
    ours = evaluate(linear_cross_entropy, hidden, weight, target, row_weight=row_weight, **options)
    truth = exact(hidden, weight, target, row_weight=row_weight, **options)
    truth[1][1] = 0.0  # a row that counts nothing has no loss
    assert_close(ours, truth, 2e-5)
    doubled = evaluate(linear_cross_entropy, hidden, weight, target, row_weight=2 * row_weight, **options)
    assert_equal((doubled[0] / 2, doubled[1], doubled[2] / 2, doubled[3] / 2), ours)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 3e38])
def test_values_of_masked_rows_have_no_effect(bad: float) -> None:
    hidden, weight, target = problem(8, 65)
    target[1] = -100
    row_weight = torch.ones(8)
    row_weight[4] = 0.0
    clean = evaluate(linear_cross_entropy, hidden, weight, target, row_weight=row_weight)
    hidden[[1, 4]] = bad
    row_weight[1] = bad
    ours = evaluate(linear_cross_entropy, hidden, weight, target, row_weight=row_weight)
    assert_equal(ours, clean)
    assert ours[1][[1, 4]].tolist() == [0.0, 0.0]
    assert bool((ours[2][[1, 4]] == 0).all())
    kept = [0, 2, 3, 5, 6, 7]
    assert_close((ours[0], ours[1][kept], ours[2][kept], ours[3]), exact(hidden[kept], weight, target[kept]), 2e-5)


def test_rows_of_weight_zero_may_hold_any_target() -> None:
    hidden, weight, target = problem(4, 5)
    row_weight = torch.tensor([1.0, 0.0, 1.0, 0.0])
    clean = evaluate(linear_cross_entropy, hidden, weight, target, row_weight=row_weight)
    target[1], target[3] = 5, -1
    assert_equal(evaluate(linear_cross_entropy, hidden, weight, target, row_weight=row_weight), clean)


def test_all_rows_masked_give_zero() -> None:
    hidden, weight, _ = problem(4, 5)
    ours = evaluate(linear_cross_entropy, hidden * math.nan, weight, torch.full((4,), -100))
    assert all(bool((value == 0).all()) for value in ours)


def test_the_ignored_index_may_be_a_token() -> None:
    hidden, weight, _ = problem(6, 9)
    target = torch.tensor([3, 0, 3, 8, 2, 3])
    ours = evaluate(linear_cross_entropy, hidden, weight, target, ignore_index=3)
    assert_close(ours, exact(hidden, weight, target, ignore_index=3), 2e-5)
    assert ours[1][[0, 2, 5]].tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("shift", [-200.0, 200.0])
def test_a_shift_of_all_logits_changes_nothing(shift: float) -> None:
    hidden, weight, target = problem(9, 257)
    plain = evaluate(linear_cross_entropy, hidden, weight, target)
    constant_hidden, constant_weight = torch.full((9, 1), shift), torch.ones(257, 1)
    total, rows, d_hidden, d_weight = evaluate(
        linear_cross_entropy, torch.cat((hidden, constant_hidden), 1), torch.cat((weight, constant_weight), 1), target
    )
    # float32 has steps of 1.5e-5 near 200
    assert_close((total, rows, d_hidden[:, :-1], d_weight[:, :-1]), plain, 2e-4)
    torch.testing.assert_close(d_hidden[:, -1], torch.zeros(9), atol=1e-4, rtol=0)  # p sums to one


def test_all_logits_far_below_zero() -> None:
    hidden, weight, target = torch.ones(2, 1), torch.full((1000, 1), -1e4), torch.tensor([0, 999])
    total, rows, d_hidden, d_weight = evaluate(linear_cross_entropy, hidden, weight, target)
    torch.testing.assert_close(rows, torch.full((2,), math.log(1000)), atol=2e-3, rtol=0)  # one ulp of 1e4
    torch.testing.assert_close(total, rows.sum())
    expected = torch.full((1000, 1), 2 / 1000)
    expected[target] -= 1.0
    torch.testing.assert_close(d_weight, expected, atol=2e-3, rtol=2e-3)
    assert bool(d_hidden.isfinite().all())


def test_huge_logits() -> None:
    hidden, weight = torch.ones(2, 1), torch.zeros(50, 1)
    weight[7] = 1e4
    total, rows, d_hidden, d_weight = evaluate(linear_cross_entropy, hidden, weight, torch.tensor([7, 8]))
    assert rows.tolist() == [0.0, 1e4]
    assert float(total) == 1e4
    assert d_hidden[:, 0].tolist() == [0.0, 1e4]
    expected = torch.zeros(50)
    expected[7], expected[8] = 1.0, -1.0
    assert torch.equal(d_weight[:, 0], expected)


@pytest.mark.parametrize("top", [0.0, 18.0])
def test_a_nearly_certain_target(top: float) -> None:
    """The other tokens keep their tiny gradients; the target's gradient is off by at most one rounding of 1."""
    weight = torch.tensor([[top], [top - 14.0], [top - 15.0]])
    ours = evaluate(linear_cross_entropy, torch.ones(1, 1), weight, torch.tensor([0]))[3].double()
    truth = exact(torch.ones(1, 1), weight, torch.tensor([0]))[3]
    torch.testing.assert_close(ours[1:], truth[1:], atol=0, rtol=1e-5)
    torch.testing.assert_close(ours[0], truth[0], atol=2e-7 if top == 0.0 else 4e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", [{}, {"softcap": 5.0, "temperature": 0.7}], ids=str)
def test_halves_are_no_worse_than_their_rounded_product(dtype: torch.dtype, options: dict[str, float]) -> None:
    hidden, weight, target = problem(16, 257)
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    truth = exact(hidden, weight, target, **options)
    rounded = -log_softmax((hidden.double() @ weight.double().T).to(dtype).double(), **options)
    budget = (rounded.gather(1, target[:, None])[:, 0] - truth[1]).abs().max()
    ours = evaluate(linear_cross_entropy, hidden, weight, target, **options)
    assert [value.dtype for value in ours] == [torch.float32, torch.float32, dtype, dtype]
    assert (ours[1] - truth[1]).abs().max() <= 2 * budget + 1e-5
    eps = torch.finfo(dtype).eps
    for value in (2, 3):
        scale = truth[value].abs().max()
        assert (ours[value] - truth[value]).abs().max() <= 8 * eps * scale


def test_a_float32_weight_under_bfloat16_hidden_states() -> None:
    hidden, weight, target = problem(300, 17)
    hidden, weight = hidden.bfloat16(), weight.bfloat16().float()
    ours = evaluate(linear_cross_entropy, hidden, weight, target)
    assert [value.dtype for value in ours] == [torch.float32, torch.float32, torch.bfloat16, torch.float32]
    halves = evaluate(linear_cross_entropy, hidden, weight.bfloat16(), target)
    assert_equal((*ours[:3], ours[3].bfloat16()), halves)
    assert not torch.equal(ours[3], ours[3].bfloat16().float()) or torch.equal(ours[3], halves[3].float())


def test_the_weights_gradient_is_summed_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """4,000 equal rows, one at a time: a bfloat16 sum would stop growing at 256 times a row's share."""
    monkeypatch.setitem(head.CHUNK_BYTES, "cpu", 1)
    hidden, weight = torch.ones(4000, 1, dtype=torch.bfloat16), torch.zeros(2, 1, dtype=torch.bfloat16)
    ours = evaluate(linear_cross_entropy, hidden, weight, torch.zeros(4000, dtype=torch.int64))
    assert ours[3][:, 0].tolist() == [-2000.0, 2000.0]


def test_autocast_takes_the_product_in_its_dtype() -> None:
    hidden, weight, target = problem(9, 65)

    def under_autocast(*arguments: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            return linear_cross_entropy(*arguments)

    def by_hand(h: Tensor, w: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return linear_cross_entropy(h.bfloat16(), w, t)

    ours = evaluate(under_autocast, hidden, weight, target)
    assert all(value.dtype == torch.float32 for value in ours)
    assert_equal(ours, evaluate(by_hand, hidden, weight, target))
    assert_close(ours, exact(hidden, weight, target), 0.1)
    assert not torch.equal(ours[1], evaluate(linear_cross_entropy, hidden, weight, target)[1])


def test_autocast_leaves_float64_alone() -> None:
    """Torch's own products do the same."""
    hidden, weight, target = problem(4, 9)
    with torch.autocast("cpu", torch.bfloat16):
        assert F.linear(hidden.double(), weight.double()).dtype == torch.float64
        loss = linear_cross_entropy(hidden.double(), weight.double(), target)
    assert loss.total.dtype == loss.rows.dtype == torch.float64


inside: Callable[..., tuple[Tensor, ...]] = _linear_cross_entropy._init_fn
"""The function that the operator calls, because a dispatch mode sees the operator as one call."""


def test_a_frozen_head_gets_no_gradient_and_costs_no_product(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, target = problem(5, 33)
    expected = evaluate(linear_cross_entropy, hidden, weight, target)[2]

    def refuse(*_: Tensor) -> None:
        raise AssertionError("the weight's gradient was computed")

    monkeypatch.setattr(head, "add_product", refuse)
    hidden.requires_grad_()
    linear_cross_entropy(hidden, weight, target).total.backward()
    assert weight.grad is None
    assert hidden.grad is not None
    assert torch.equal(hidden.grad, expected)


def test_products_are_taken_only_for_gradients_that_are_wanted() -> None:
    hidden, weight, target = problem(5, 33)
    ones = torch.ones(5)
    for want_hidden, want_weight in itertools.product([False, True], repeat=2):
        with Operations() as seen:
            _, _, d_hidden, d_weight = inside(hidden, weight, target, ones, 1.0, None, want_hidden, want_weight)
        assert seen.products == 1 + want_hidden + want_weight
        assert d_hidden.numel() == 5 * 6 * want_hidden
        assert d_weight.numel() == 33 * 6 * want_weight


def test_only_the_weight_may_be_trained() -> None:
    hidden, weight, target = problem(5, 33)
    expected = evaluate(linear_cross_entropy, hidden, weight, target)[3]
    weight.requires_grad_()
    linear_cross_entropy(hidden, weight, target).total.backward()
    assert hidden.grad is None
    assert weight.grad is not None
    assert torch.equal(weight.grad, expected)


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_without_gradients_only_the_loss_is_computed(guard: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, target = problem(5, 33)
    expected = evaluate(linear_cross_entropy, hidden, weight, target)
    monkeypatch.setattr("genssd.kernels.cross_entropy.softmax_gradient", None)
    with guard():
        loss = linear_cross_entropy(hidden.clone().requires_grad_(), weight.clone().requires_grad_(), target)
    assert not loss.total.requires_grad
    assert torch.equal(loss.total, expected[0])
    assert torch.equal(loss.rows, expected[1])


def test_rows_have_no_gradient() -> None:
    hidden, weight, target = problem(5, 33)
    loss = linear_cross_entropy(hidden.requires_grad_(), weight, target)
    assert loss.total.requires_grad
    assert not loss.rows.requires_grad


def test_chunks_do_not_change_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, target = problem(23, 257)
    target[5] = -100
    options = {"row_weight": torch.linspace(0, 1, 23), "softcap": 9.0, "temperature": 0.8}
    whole = evaluate(linear_cross_entropy, hidden, weight, target, **options)
    for rows in (1, 2, 7, 22, 23):
        monkeypatch.setitem(head.CHUNK_BYTES, "cpu", 4 * 257 * rows)
        assert head.rows_per_chunk(1 << 20, 257, torch.device("cpu")) == rows
        assert_close(evaluate(linear_cross_entropy, hidden, weight, target, **options), whole, 5e-6)
    monkeypatch.setitem(head.CHUNK_BYTES, "cpu", 1)  # less than a row still does a row at a time
    assert_close(evaluate(linear_cross_entropy, hidden, weight, target, **options), whole, 5e-6)
    monkeypatch.undo()
    for entries in (1, 257 * 5):
        monkeypatch.setattr(head, "SLICE", entries)
        assert_close(evaluate(linear_cross_entropy, hidden, weight, target, **options), whole, 5e-6)


@pytest.mark.parametrize("num_rows", [1, 127, 4096, 4097, 8192, 9000, 100_000])
@pytest.mark.parametrize("vocabulary", [1000, 151936, 303872, 1 << 30])
def test_chunks_on_cuda_are_even_and_fit(num_rows: int, vocabulary: int) -> None:
    fitting = max(1, head.CHUNK_BYTES["cuda"] // (4 * vocabulary))
    rows = head.rows_per_chunk(num_rows, vocabulary, torch.device("cuda"))
    assert 1 <= rows <= fitting
    assert -(-num_rows // rows) == -(-num_rows // fitting), "no more chunks than needed"
    last = num_rows - (-(-num_rows // rows) - 1) * rows
    assert rows >= num_rows or rows == fitting or rows - last <= 128 * -(-num_rows // rows)
    assert head.rows_per_chunk(8192, 151936, torch.device("cuda")) == 4096
    assert head.rows_per_chunk(8192, 151936, torch.device("cuda"), most=1024) == 1024
    assert head.rows_per_chunk(8192, 151936, torch.device("cuda"), most=3000) == 2816, "three chunks of the same size"
    assert head.rows_per_chunk(8192, 151936, torch.device("cuda"), most=1 << 30) == 4096


def test_a_batch_is_the_sum_of_its_parts() -> None:
    hidden, weight, target = problem(12, 33)
    whole = evaluate(linear_cross_entropy, hidden, weight, target)
    a = evaluate(linear_cross_entropy, hidden[:5], weight, target[:5])
    b = evaluate(linear_cross_entropy, hidden[5:], weight, target[5:])
    joined = (a[0] + b[0], torch.cat((a[1], b[1])), torch.cat((a[2], b[2])), a[3] + b[3])
    assert_close(joined, whole, 5e-6)


def test_no_tensor_of_tokens_times_vocabulary_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(head.CHUNK_BYTES, "cpu", 4 * 1025 * 8)
    hidden, weight, target = problem(200, 1025, width=3)
    with Operations() as seen:
        _, losses, _, _ = inside(hidden, weight, target, torch.ones(200), 0.9, 20.0, True, True)
    assert len(losses) == 200
    assert 3 * 1025 <= seen.elements <= 8 * 1025


def test_two_runs_have_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(head.CHUNK_BYTES, "cpu", 4 * 257 * 9)
    hidden, weight, target = problem(40, 257, width=32)
    first = evaluate(linear_cross_entropy, hidden, weight, target, softcap=9.0)
    assert_equal(evaluate(linear_cross_entropy, hidden, weight, target, softcap=9.0), first)


def test_inputs_are_left_as_they_were() -> None:
    hidden, weight, target = problem(5, 33)
    target[2] = -100
    row_weight = torch.tensor([1.0, 2.0, 3.0, 0.0, 1.0])
    before = [x.clone() for x in (hidden, weight, target, row_weight)]
    evaluate(linear_cross_entropy, hidden, weight, target, row_weight=row_weight)
    for after, copy in zip((hidden, weight, target, row_weight), before, strict=True):
        assert torch.equal(after, copy)


def test_strides_do_not_matter() -> None:
    hidden, weight, target = problem(6, 33)
    row_weight = torch.linspace(0.5, 2, 6)
    plain = evaluate(linear_cross_entropy, hidden, weight, target, row_weight=row_weight)

    def strided(h: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        wide_target, wide_weight = target.repeat_interleave(2)[::2], row_weight.repeat_interleave(3)[::3]
        h, w = h.T.contiguous().T, w.repeat_interleave(2, 1)[:, ::2]
        assert not h.is_contiguous()
        assert not w.is_contiguous()
        return linear_cross_entropy(h, w, wide_target, row_weight=wide_weight)

    assert_close(evaluate(strided, hidden, weight), plain, 2e-6)


def test_a_gradient_from_above_scales_both() -> None:
    hidden, weight, target = problem(6, 33)
    plain = evaluate(linear_cross_entropy, hidden, weight, target)

    def scaled(*arguments: Tensor) -> tuple[Tensor, Tensor]:
        total, rows = linear_cross_entropy(*arguments)
        return total * total.detach() * -0.5, rows

    ours = evaluate(scaled, hidden, weight, target)
    for value in (2, 3):
        torch.testing.assert_close(ours[value], plain[value] * plain[0] * -0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale", [1 / 3, 2.0**16, 1e6], ids=str)
def test_a_gradient_from_above_is_not_rounded(dtype: torch.dtype, scale: float) -> None:
    """Loss scaling begins at 65536, which float16 does not have; bfloat16 has 1/3 only to 0.2%."""
    hidden, weight, target = problem(24, 129)
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    row_weight = torch.full((24,), 1e-3)
    plain = evaluate(linear_cross_entropy, hidden, weight, target, row_weight=row_weight)

    def scaled(*arguments: Tensor) -> tuple[Tensor, Tensor]:
        total, rows = linear_cross_entropy(*arguments, row_weight=row_weight)
        return total * scale, rows

    ours = evaluate(scaled, hidden, weight, target)
    for value in (2, 3):
        expected = plain[value].float() * scale
        fits = (expected.abs() <= torch.finfo(dtype).max) & (expected != 0)
        torch.testing.assert_close(ours[value][fits], expected[fits].to(dtype), atol=0, rtol=torch.finfo(dtype).eps)
        normal = fits & (expected.abs() >= torch.finfo(dtype).tiny)  # below, digits are fewer
        bias = (ours[value].double() / expected - 1)[normal].mean()
        assert abs(float(bias)) < torch.finfo(dtype).eps / 8


def test_gradients_accumulate() -> None:
    hidden, weight, target = problem(6, 33)
    other, _, other_target = problem(4, 33, seed=1)
    a = evaluate(linear_cross_entropy, hidden, weight, target)
    b = evaluate(linear_cross_entropy, other, weight, other_target)
    weight.requires_grad_()
    linear_cross_entropy(hidden, weight, target).total.backward()
    linear_cross_entropy(other, weight, other_target).total.backward()
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, a[3] + b[3])


def test_backward_may_run_twice() -> None:
    hidden, weight, target = problem(6, 33)
    once = evaluate(linear_cross_entropy, hidden, weight, target)
    hidden.requires_grad_(), weight.requires_grad_()
    total = linear_cross_entropy(hidden, weight, target).total
    total.backward(retain_graph=True)
    assert hidden.grad is not None
    hidden.grad.zero_()  # what is kept for the second call is not what was handed out
    total.backward()
    assert weight.grad is not None
    assert torch.equal(hidden.grad, once[2])
    assert torch.equal(weight.grad, 2 * once[3])


def test_no_rows() -> None:
    _, weight, _ = problem(1, 9)
    total, rows, d_hidden, d_weight = evaluate(
        linear_cross_entropy, torch.empty(0, 6), weight, torch.empty(0, dtype=torch.int64)
    )
    assert float(total) == 0.0
    assert rows.shape == (0,)
    assert d_hidden.shape == (0, 6)
    assert torch.equal(d_weight, torch.zeros(9, 6))


@pytest.mark.parametrize("options", [{}, {"softcap": 2.0, "temperature": 0.8}], ids=str)
def test_gradcheck(options: dict[str, float]) -> None:
    hidden, weight, target = problem(4, 5, width=3)
    row_weight = torch.tensor([1.0, 0.5, 0.0, 2.0])

    def total(h: Tensor, w: Tensor) -> Tensor:
        return linear_cross_entropy(h, w, target, row_weight=row_weight, **options).total

    assert torch.autograd.gradcheck(total, (hidden.double().requires_grad_(), weight.double().requires_grad_()))


def test_second_derivatives_are_right_or_refused() -> None:
    hidden, weight, target = problem(3, 5, width=2)
    hidden = hidden.double().requires_grad_()

    def second(loss: Callable[..., tuple[Tensor, Tensor]]) -> Tensor:
        (first,) = torch.autograd.grad(loss(hidden, weight.double(), target)[0] ** 2, hidden, create_graph=True)
        return torch.autograd.grad(first.square().sum(), hidden)[0]

    try:
        ours = second(linear_cross_entropy)
    except RuntimeError:
        return
    torch.testing.assert_close(ours, second(naive))


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize(("want_hidden", "want_weight"), [(True, True), (False, False)])
def test_torch_sees_one_operator(softcap: float | None, want_hidden: bool, want_weight: bool) -> None:
    """Schema, fake tensors, autograd and dispatch, by torch's own checker."""
    hidden, weight, target = problem(5, 7)
    arguments = (
        hidden.requires_grad_(want_hidden), weight.requires_grad_(want_weight), target, torch.ones(5), 0.9, softcap,
        want_hidden, want_weight,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.genssd.linear_cross_entropy.default, arguments)


@pytest.mark.parametrize("transposed", ["hidden", "weight"])
def test_fake_tensors_have_the_strides_of_real_ones(transposed: str) -> None:
    """Inductor asserts them: a head that is kept as [D, V] could not be compiled."""
    hidden, weight, target = problem(5, 7)
    if transposed == "hidden":
        hidden = hidden.T.contiguous().T
    else:
        weight = weight.T.contiguous().T
    arguments = (hidden.requires_grad_(), weight.requires_grad_(), target, torch.ones(5), 1.0, None, True, True)
    torch.library.opcheck(
        torch.ops.genssd.linear_cross_entropy.default, arguments, test_utils=("test_schema", "test_faketensor")
    )


def test_compiles_as_a_whole() -> None:
    hidden, weight, target = problem(5, 33)
    target[1] = -100
    row_weight = torch.linspace(0, 1, 5)

    def loss(h: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        out = linear_cross_entropy(h * 1.5, w, target, row_weight=row_weight, temperature=0.9, softcap=9.0)
        return out.total / 3, out.rows

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert_close(evaluate(compiled, hidden, weight), evaluate(loss, hidden, weight), 1e-6)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((torch.zeros(3, 5), WEIGHT, TARGET), {}, r"hidden \(3, 5\).*weight \(5, 4\)"),
        ((torch.zeros(4), WEIGHT, TARGET), {}, r"hidden \(4,\)"),
        ((HIDDEN[None], WEIGHT, TARGET), {}, r"hidden \(1, 3, 4\)"),
        ((HIDDEN, torch.ones(0, 4), TARGET), {}, r"weight \(0, 4\)"),
        ((HIDDEN, WEIGHT, TARGET[:2]), {}, r"target must be int64 \[3\]"),
        ((HIDDEN, WEIGHT, TARGET[None]), {}, r"target must be int64 \[3\]"),
        ((HIDDEN, WEIGHT, TARGET.int()), {}, r"target.*int32"),
        ((HIDDEN, WEIGHT, TARGET), {"row_weight": torch.ones(2)}, r"row_weight must be \[3\]"),
        ((HIDDEN, WEIGHT, TARGET), {"row_weight": torch.ones(3, 1)}, r"row_weight must be \[3\]"),
        ((HIDDEN, WEIGHT, TARGET), {"row_weight": torch.ones(3, requires_grad=True)}, r"row_weight.*detach"),
        ((HIDDEN, WEIGHT, TARGET), {"temperature": 0.0}, r"temperature must be positive"),
        ((HIDDEN, WEIGHT, TARGET), {"temperature": -1.0}, r"temperature must be positive"),
        ((HIDDEN, WEIGHT, TARGET), {"temperature": math.nan}, r"temperature must be positive"),
        ((HIDDEN, WEIGHT, TARGET), {"temperature": math.inf}, r"temperature must be positive"),
        ((HIDDEN, WEIGHT, TARGET), {"softcap": 0.0}, r"softcap must be positive"),
        ((HIDDEN, WEIGHT, TARGET), {"softcap": math.nan}, r"softcap must be positive"),
        ((HIDDEN, WEIGHT, torch.tensor([0, 1, 5])), {}, r"target 5 of row 2.*vocabulary of 5"),
        ((HIDDEN, WEIGHT, torch.tensor([-100, -1, 4])), {}, r"target -1 of row 1.*vocabulary of 5"),
        ((HIDDEN, WEIGHT, torch.tensor([0, -100, 4])), {"ignore_index": -1}, r"target -100 of row 1"),
    ],
)
def test_wrong_arguments_are_named(arguments: tuple[Tensor, ...], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"linear_cross_entropy.*{message}"):
        linear_cross_entropy(*arguments, **options)


def test_a_target_outside_the_vocabulary_is_named_in_any_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(head.CHUNK_BYTES, "cpu", 4 * 9 * 4)
    hidden, weight, target = problem(20, 9)
    target[13] = 9
    with pytest.raises(ValueError, match=r"row 13"):
        linear_cross_entropy(hidden, weight, target)
