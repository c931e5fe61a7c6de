"""The Triton kernels on a real device: values against float64, bits against themselves, memory against the promise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from support.head_memory import BUDGETS, MIB, ROWS, VOCABULARY, WIDTH
from torch import Tensor

from genssd.kernels.cross_entropy import linear_cross_entropy
from genssd.kernels.divergence import linear_divergence
from genssd.kernels.divergence_terms import DivergenceKind
from genssd.kernels.logprob import STATISTICS, NonFiniteLogits, TokenStats, linear_logprob
from genssd.kernels.sampling import gumbel_reference, keep_likely, linear_sample, sample
from genssd.kernels.topk_divergence import topk_divergence

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

HALVES = [torch.bfloat16, torch.float16]
DTYPES = [torch.float32, *HALVES]
SHAPES = [(1, 1, 1), (65, 1025, 100), (300, 151936, 1024)]


def tensors(rows: int, vocabulary: int, width: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator("cuda").manual_seed(seed)
    hidden = torch.randn(rows, width, device="cuda", generator=generator).to(dtype)
    weight = (3 * torch.randn(vocabulary, width, device="cuda", generator=generator) / width**0.5).to(dtype)
    target = torch.randint(0, vocabulary, (rows,), device="cuda", generator=generator)
    target[-1] = vocabulary - 1
    return hidden, weight, target


def assert_twice_as_good(ours: Tensor, plain: Tensor, exact: Tensor) -> None:
    """Against float64, at most twice the error of torch at the same precision."""
    budget = (plain.double() - exact.double()).abs().max()
    floor = 1e-5 * exact.abs().max().clamp_min(1.0)
    assert (ours.double() - exact.double()).abs().max() <= 2 * budget + floor


def plain_stats(hidden: Tensor, weight: Tensor, target: Tensor) -> TokenStats:
    z = hidden @ weight.T
    z = z if z.dtype == torch.float64 else z.float()
    logp = z.log_softmax(1)
    chosen = logp.gather(1, target[:, None])
    entropy, sum_p2 = -(logp.exp() * logp).sum(1), (logp.exp() ** 2).sum(1)
    return TokenStats.from_values([chosen[:, 0], z.logsumexp(1), entropy, sum_p2, (1 + (logp > chosen).sum(1)).int()])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "vocabulary", "width"), SHAPES)
def test_scores(dtype: torch.dtype, rows: int, vocabulary: int, width: int) -> None:
    arguments = tensors(rows, vocabulary, width, dtype)
    ours, plain = linear_logprob(*arguments), plain_stats(*arguments)
    exact = plain_stats(arguments[0].double(), arguments[1].double(), arguments[2])
    for name in STATISTICS[:-1]:
        assert_twice_as_good(getattr(ours, name), getattr(plain, name), getattr(exact, name))
    if dtype == torch.float32:
        assert (ours.rank - exact.rank).abs().max() <= 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_logits_tie_in_any_tile(dtype: torch.dtype) -> None:
    """The target's logit has the bits of the tiles' logits, or repeated weights would not tie."""
    hidden, weight, _ = tensors(257, 100, 512, dtype)
    repeated = weight.repeat(11, 1)
    base = linear_logprob(hidden, weight, torch.arange(257, device="cuda") % 100)
    for copy in range(11):
        stats = linear_logprob(hidden, repeated, torch.arange(257, device="cuda") % 100 + 100 * copy)
        assert torch.equal(stats.rank, 11 * (base.rank - 1) + 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_has_the_same_bits_in_any_batch(dtype: torch.dtype) -> None:
    hidden, weight, target = tensors(513, 5000, 512, dtype)
    whole = linear_logprob(hidden, weight, target)
    order = torch.randperm(513, device="cuda")
    permuted, alone = (
        linear_logprob(hidden[order], weight, target[order]),
        linear_logprob(hidden[7:8], weight, target[7:8]),
    )
    for name in STATISTICS:
        values = getattr(whole, name)
        assert torch.equal(values[order], getattr(permuted, name)), name
        assert torch.equal(values[7:8], getattr(alone, name)), name
    keys = torch.arange(513, device="cuda")
    drawn = linear_sample(hidden, weight, keys)
    assert torch.equal(drawn.tokens[order], linear_sample(hidden[order], weight, keys[order]).tokens)


def test_bad_rows_are_named() -> None:
    hidden, weight, target = tensors(70, 300, 64, torch.bfloat16)
    keys = torch.arange(70, device="cuda")
    hidden[66, 3] = torch.nan
    for run in (lambda: linear_logprob(hidden, weight, target), lambda: linear_sample(hidden, weight, keys)):
        with pytest.raises(NonFiniteLogits, match="row 66"):
            run()
    with pytest.raises(NonFiniteLogits, match="row 66"):
        sample((hidden @ weight.T).float(), keys, top_p=0.9)
    target[5] = 300
    with pytest.raises(ValueError, match="300 of row 5"):
        linear_logprob(hidden, weight, target)


Loss = Callable[..., Tensor]


def losses() -> dict[str, Loss]:
    teacher, teacher_weight, target = tensors(130, 5000, 96, torch.float32, seed=1)
    ids = torch.randperm(5000, device="cuda")[: 130 * 16].reshape(130, 16)
    logprob = torch.randn(130, 17, device="cuda").log_softmax(1)[:, :16]
    weights = torch.rand(130, device="cuda")
    weights[3] = 0.0

    def divergence(kind: Any) -> Loss:
        return lambda h, w: (
            linear_divergence(
                h, w, teacher.to(h.dtype), teacher_weight.to(h.dtype), kind=kind, row_weight=weights, temperature=0.9
            ).total
        )

    def topk(kind: Any) -> Loss:
        return lambda h, w: (
            topk_divergence(h, w, ids, logprob, kind=kind, row_weight=weights, student_softcap=20.0).total
        )

    return {
        "cross-entropy": lambda h, w: linear_cross_entropy(h, w, target, row_weight=weights, softcap=15.0).total,
        "logprob": lambda h, w: (linear_logprob(h, w, target).logprob * weights).sum(),
        "entropy": lambda h, w: (linear_logprob(h, w, target).entropy * weights).sum(),
        **{f"divergence-{kind}": divergence(kind) for kind in get_args(DivergenceKind)},
        **{f"topk-{kind}": topk(kind) for kind in get_args(DivergenceKind)},
    }


NAMES = [
    "cross-entropy",
    "logprob",
    "entropy",
    *(f"{family}-{kind}" for family in ("divergence", "topk") for kind in get_args(DivergenceKind)),
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_losses(name: str, dtype: torch.dtype) -> None:
    """Against the reference in float64, on the same inputs: rounding of the products' dtype alone."""
    loss = losses()[name]
    hidden, weight, _ = tensors(130, 5000, 96, dtype)

    def gradients(as_type: torch.dtype) -> list[Tensor]:
        h, w = hidden.detach().to(as_type).requires_grad_(), weight.detach().to(as_type).requires_grad_()
        total = loss(h, w)
        return [total.detach(), *torch.autograd.grad(total, (h, w))]

    ours, again, exact = gradients(dtype), gradients(dtype), gradients(torch.float64)
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    for a, b, c in zip(ours, again, exact, strict=True):
        assert torch.equal(a, b), "the same bits in every run"
        assert (a.double() - c).norm() <= tolerance * c.norm().clamp_min(1e-3)


FILTERS = [
    {},
    {"temperature": 0.0},
    {"top_k": 7},
    {"top_p": 0.8},
    {"min_p": 0.05},
    {"temperature": 1.4, "top_k": 50, "top_p": 0.9, "min_p": 0.01},
]


@pytest.mark.parametrize("options", FILTERS, ids=str)
def test_draws_equal_the_cpus(options: dict[str, Any]) -> None:
    logits = 3 * torch.randn(200, 5003)
    keys = torch.arange(200) * 7919
    ours, theirs = sample(logits.cuda(), keys.cuda(), **options).cpu(), sample(logits, keys, **options)
    assert (ours != theirs).sum() <= 1  # two candidates within a rounding of each other


@pytest.mark.parametrize("scale", [0.0, 1e-3, 0.5, 3.0, 30.0])
@pytest.mark.parametrize("options", FILTERS, ids=str)
def test_draws_from_a_large_vocabulary_equal_the_references(options: dict[str, Any], scale: float) -> None:
    """Flat rows, whose kept tokens fill no list, and peaked ones, alone and in a batch of strided rows."""
    generator = torch.Generator("cuda").manual_seed(0)
    logits = scale * torch.randn(24, 151936, device="cuda", generator=generator)
    logits[3, ::2] = -torch.inf
    logits[4] = logits[4].round()
    keys = torch.arange(24, device="cuda") * 7919
    drawn = sample(logits, keys, **options)
    z = logits / options.get("temperature", 1.0) if options.get("temperature", 1.0) else logits
    kept = keep_likely(z.double(), options.get("top_k", 0), options.get("top_p", 1.0), options.get("min_p", 0.0))
    noisy = kept if options.get("temperature") == 0.0 else kept + gumbel_reference(keys, 151936)
    # of two equal ones torch may take any, and two candidates may lie within a rounding of each other
    assert (noisy.gather(1, drawn[:, None])[:, 0] < noisy.amax(1)).sum() <= 1
    padded = torch.zeros(24, 152064, device="cuda")[:, :151936].copy_(logits)
    assert torch.equal(sample(padded, keys, **options), drawn)
    assert torch.equal(sample(logits[7:8], keys[7:8], **options), drawn[7:8])


def test_a_draw_does_not_wait_for_the_device() -> None:
    logits, keys = torch.randn(8, 5003, device="cuda"), torch.arange(8, device="cuda")
    sample(logits, keys, top_k=50, top_p=0.9, min_p=0.01, checked=False)
    torch.cuda.set_sync_debug_mode("error")
    try:
        sample(logits, keys, top_k=50, top_p=0.9, min_p=0.01, checked=False)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_drawing_in_the_vocabulary_pass_follows_the_softmax() -> None:
    hidden, weight, _ = tensors(1, 40, 64, torch.bfloat16)
    draws = 20_000
    tokens = linear_sample(hidden.expand(draws, -1), weight, torch.arange(draws, device="cuda")).tokens
    p = (hidden.double() @ weight.double().T).softmax(1)[0]
    expected = p * draws
    statistic = ((torch.bincount(tokens, minlength=40) - expected) ** 2 / expected)[expected >= 5].sum()
    freedom = int((expected >= 5).sum()) - 1
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("name", BUDGETS)
def test_memory_beyond_inputs_and_outputs(name: str) -> None:
    """tests/kernels/test_cuda_memory.py adds up the same on a fake device."""
    inputs = tensors(ROWS, VOCABULARY, WIDTH, torch.bfloat16)
    run, budget = BUDGETS[name]
    run(*inputs)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(*inputs)
    assert torch.cuda.max_memory_allocated() - before < budget * MIB
