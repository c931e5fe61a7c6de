"""Token statistics against brute force in float64, and the promise that no [tokens, vocabulary] tensor is built."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support.operations import Operations
from torch import Tensor

from genssd.kernels.logprob import TokenStats, _score_in_blocks, linear_logprob

NAMES = ("logprob", "logsumexp", "entropy", "sum_p2", "rank")


def brute_force(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> dict[str, list[float]]:
    """Compute every statistic by its definition, row by row, in float64."""
    rows: dict[str, list[float]] = {name: [] for name in NAMES}
    for h, t in zip(hidden.double(), target.tolist(), strict=True):
        z = weight.double() @ h + (0.0 if bias is None else bias.double())
        if softcap is not None:
            z = softcap * (z / softcap).tanh()
        z = z / temperature
        peak = z.max()
        p = (z - peak).exp() / (z - peak).exp().sum()
        logsumexp = float(peak + (z - peak).exp().sum().log())
        rows["logprob"].append(float(z[t]) - logsumexp)
        rows["logsumexp"].append(logsumexp)
        rows["entropy"].append(-sum(x * math.log(x) for x in p.tolist() if x > 0))
        rows["sum_p2"].append(float((p * p).sum()))
        rows["rank"].append(1 + sum(x > float(z[t]) for x in z.tolist()))
    return rows


def assert_stats(stats: TokenStats, expected: dict[str, list[float]], tolerance: float) -> None:
    for name in NAMES:
        torch.testing.assert_close(
            getattr(stats, name).double(),
            torch.tensor(expected[name], dtype=torch.float64),
            atol=tolerance,
            rtol=tolerance,
            msg=name,
        )


def problem(rows: int, vocabulary: int, width: int = 24, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=generator)
    weight = torch.randn(vocabulary, width, generator=generator) * 0.6
    target = torch.randint(0, vocabulary, (rows,), generator=generator)
    target[-1] = vocabulary - 1
    return hidden, weight, target


@pytest.mark.parametrize("vocabulary", [1, 2, 255, 256, 257, 1023, 4099])
@pytest.mark.parametrize("rows", [1, 7])
def test_equals_brute_force(vocabulary: int, rows: int) -> None:
    hidden, weight, target = problem(rows, vocabulary)
    stats = linear_logprob(hidden, weight, target)
    assert_stats(stats, brute_force(hidden, weight, target), 2e-5)
    assert stats.rank.dtype == torch.int32
    assert all(getattr(stats, name).dtype == torch.float32 for name in NAMES[:-1])
    exact = linear_logprob(hidden.double(), weight.double(), target)
    assert_stats(exact, brute_force(hidden, weight, target), 1e-12)


@pytest.mark.parametrize(
    "options",
    [{"temperature": 0.5}, {"temperature": 2.5}, {"softcap": 3.0}, {"softcap": 30.0, "temperature": 0.7}],
    ids=str,
)
def test_temperature_and_softcap(options: dict[str, float]) -> None:
    hidden, weight, target = problem(9, 257)
    bias = torch.linspace(-2, 2, 257)
    expected = brute_force(hidden, weight, target, bias, **options)
    assert_stats(linear_logprob(hidden, weight, target, bias=bias, **options), expected, 2e-5)


def test_only_strictly_larger_logits_count_in_the_rank() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0, 3.0, 1.0]])
    hidden, weight = torch.ones(6, 1), logits.T
    stats = linear_logprob(hidden, weight, torch.arange(6))
    assert stats.rank.tolist() == [5, 1, 1, 4, 1, 5]
    flat = linear_logprob(torch.zeros(3, 4), torch.randn(1023, 4), torch.tensor([0, 500, 1022]))
    assert flat.rank.tolist() == [1, 1, 1]
    torch.testing.assert_close(flat.entropy, torch.full((3,), math.log(1023)), atol=1e-5, rtol=0)
    torch.testing.assert_close(flat.sum_p2, torch.full((3,), 1 / 1023), atol=1e-9, rtol=1e-5)


@pytest.mark.parametrize("shift", [-200.0, 200.0])
def test_a_shift_of_all_logits_changes_only_the_logsumexp(shift: float) -> None:
    hidden, weight, target = problem(11, 257)
    plain = linear_logprob(hidden, weight, target)
    moved = linear_logprob(hidden, weight, target, bias=torch.full((257,), shift))
    # float32 has steps of 1.5e-5 near 200
    for name in ("logprob", "entropy", "sum_p2"):
        torch.testing.assert_close(getattr(moved, name), getattr(plain, name), atol=1e-4, rtol=0)
    assert torch.equal(moved.rank, plain.rank)
    torch.testing.assert_close(moved.logsumexp, plain.logsumexp + shift, atol=1e-4, rtol=0)


@pytest.mark.parametrize("level", [-1e4, 1e4])
def test_very_large_logits_of_either_sign(level: float) -> None:
    stats = linear_logprob(torch.ones(2, 1), torch.full((1000, 1), level), torch.tensor([0, 999]))
    torch.testing.assert_close(stats.logprob, torch.full((2,), -math.log(1000)), atol=2e-3, rtol=0)  # one ulp of 1e4
    torch.testing.assert_close(stats.entropy, torch.full((2,), math.log(1000)), atol=2e-3, rtol=0)
    assert stats.rank.tolist() == [1, 1]


def test_banned_tokens_do_not_count() -> None:
    hidden, weight, target = problem(5, 300)
    allowed = torch.arange(0, 300, 3)
    bias = torch.full((300,), -torch.inf)
    bias[allowed] = 0.0
    target = allowed[target % 100]
    stats = linear_logprob(hidden, weight, target, bias=bias)
    assert_stats(stats, brute_force(hidden, weight[allowed], target // 3), 2e-5)
    banned = linear_logprob(hidden, weight, torch.ones_like(target), bias=bias)
    assert banned.logprob.tolist() == [-math.inf] * 5
    assert banned.rank.tolist() == [101] * 5
    assert bool(banned.entropy.isfinite().all())


def test_one_certain_token_has_no_entropy() -> None:
    weight = torch.zeros(50, 1)
    weight[7] = 1e4
    stats = linear_logprob(torch.ones(2, 1), weight, torch.tensor([7, 8]))
    assert stats.entropy.tolist() == [0.0, 0.0]
    assert stats.sum_p2.tolist() == [1.0, 1.0]
    assert stats.logprob.tolist() == [0.0, -1e4]
    assert stats.rank.tolist() == [1, 2]


def test_blocks_of_rows_do_not_change_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, target = problem(23, 257)
    whole = linear_logprob(hidden, weight, target)
    for rows in (1, 2, 7, 22, 23):
        monkeypatch.setattr("genssd.kernels.logprob.LOGITS_BYTES", 4 * 257 * rows)
        blocked = linear_logprob(hidden, weight, target)
        assert len(blocked) == 23
        for name in NAMES:
            torch.testing.assert_close(getattr(blocked, name), getattr(whole, name), atol=1e-5, rtol=1e-5)
    monkeypatch.setattr("genssd.kernels.logprob.LOGITS_BYTES", 1)  # less than a row still does a row at a time
    assert_stats(linear_logprob(hidden, weight, target), brute_force(hidden, weight, target), 2e-5)


def test_permuting_rows_permutes_the_statistics() -> None:
    hidden, weight, target = problem(50, 513)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(1))
    plain, permuted = linear_logprob(hidden, weight, target), linear_logprob(hidden[order], weight, target[order])
    for name in NAMES:
        torch.testing.assert_close(getattr(permuted, name), getattr(plain, name)[order], atol=1e-6, rtol=1e-6)


def test_bfloat16_is_no_worse_than_its_rounded_product() -> None:
    hidden, weight, target = (x.bfloat16() if x.is_floating_point() else x for x in problem(16, 1023))
    truth = torch.tensor(brute_force(hidden, weight, target)["logprob"], dtype=torch.float64)
    rounded = (hidden.double() @ weight.double().T).bfloat16().double().log_softmax(1)
    budget = (rounded.gather(1, target[:, None])[:, 0] - truth).abs().max()
    stats = linear_logprob(hidden, weight, target)
    assert stats.logprob.dtype == torch.float32
    assert (stats.logprob - truth).abs().max() <= 2 * budget + 1e-5


def test_no_tensor_of_tokens_times_vocabulary_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("genssd.kernels.logprob.LOGITS_BYTES", 4 * 4099 * 8)
    hidden, weight, target = problem(200, 4099, width=16)
    with Operations() as seen:
        # the function behind the operator: a mode sees operators from outside
        logprob, *_ = _score_in_blocks(hidden, weight, target, None, 0.9, 20.0, 0, True)
    assert len(logprob) == 200
    assert 4099 <= seen.elements <= 16 * 4099  # the weight itself, or two blocks


def test_no_rows_give_empty_statistics() -> None:
    stats = linear_logprob(torch.empty(0, 4), torch.ones(9, 4), torch.empty(0, dtype=torch.int64))
    assert len(stats) == 0
    assert stats.rank.dtype == torch.int32


def test_slices_and_concatenation_are_inverse() -> None:
    stats = linear_logprob(*problem(13, 31))
    pieces = [stats[0:1], stats[1:1], stats[1:9], stats[9:13]]
    assert [len(piece) for piece in pieces] == [1, 0, 8, 4]
    joined = TokenStats.concatenate(pieces)
    for name in NAMES:
        assert torch.equal(getattr(joined, name), getattr(stats, name))
    assert len(TokenStats.concatenate([TokenStats.empty(), stats])) == 13


HIDDEN, WEIGHT, TARGET = torch.zeros(3, 4), torch.ones(5, 4), torch.tensor([0, 1, 4])


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((torch.zeros(3, 5), WEIGHT, TARGET), {}, r"hidden \(3, 5\).*weight \(5, 4\)"),
        ((torch.zeros(4), WEIGHT, TARGET), {}, r"hidden \(4,\)"),
        ((HIDDEN, WEIGHT, TARGET[:2]), {}, r"target must be int64 \[3\]"),
        ((HIDDEN, WEIGHT, TARGET.int()), {}, r"int32"),
        ((HIDDEN, WEIGHT, torch.tensor([0, 1, 5])), {}, r"outside the vocabulary of 5"),
        ((HIDDEN, WEIGHT, torch.tensor([0, -1, 4])), {}, r"outside the vocabulary of 5"),
        ((HIDDEN, WEIGHT, TARGET), {"bias": torch.zeros(4)}, r"bias must be \[5\]"),
        ((HIDDEN, WEIGHT, TARGET), {"temperature": 0.0}, r"temperature must be positive"),
        ((HIDDEN, WEIGHT, TARGET), {"temperature": math.nan}, r"temperature must be positive"),
    ],
)
def test_wrong_arguments_are_named(arguments: tuple[Tensor, ...], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear_logprob(*arguments, **options)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_with_nan_is_named_in_any_block(bad: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("genssd.kernels.logprob.LOGITS_BYTES", 4 * 257 * 4)
    hidden, weight, target = problem(20, 257)
    hidden[13, 0] = bad
    with pytest.raises(ValueError, match=r"row 13"):
        linear_logprob(hidden, weight, target)


@pytest.mark.parametrize("bias", [None, torch.ones(7)], ids=["plain", "bias"])
def test_torch_sees_one_operator(bias: torch.Tensor | None) -> None:
    """Schema, fake tensors and dispatch, by torch's own checker."""
    arguments = (torch.randn(5, 4), torch.randn(7, 4), torch.tensor([0, 1, 2, 3, 6]), bias, 1.0, None, 2, True)
    torch.library.opcheck(torch.ops.genssd.linear_logprob.default, arguments)
