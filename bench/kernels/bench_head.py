"""Benchmarks of scoring, losses and sampling over a linear head against eager torch, torch.compile and other libraries.

Run: `make bench` (small shapes on a CPU, those of real models on a GPU). Every implementation is
checked against float64 on a few rows before it is timed; the cache is flushed before every round. extra_info has the
fraction that was reached of the device's measured limits: the rate of a matrix product and the rate of a copy. A
library that is not installed is skipped.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from bench.support.device_limits import DeviceLimits
from bench.support.measuring import DEVICE, DTYPE, GPU, assert_close, measure
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from genssd.kernels.cross_entropy import linear_cross_entropy
from genssd.kernels.divergence import linear_divergence
from genssd.kernels.logprob import linear_logprob
from genssd.kernels.sampling import linear_sample, sample


@dataclass(frozen=True, slots=True)
class Shape:
    """Shape of a head and its batch: rows x vocabulary x width, and the teacher's width (0: no teacher)."""

    rows: int
    vocabulary: int
    width: int
    teacher: int = 0

    def __str__(self) -> str:
        return f"{self.rows}x{self.vocabulary}x{self.width}" + (f"-{self.teacher}" if self.teacher else "")


SCORING = (
    [Shape(64, 151936, 1024), Shape(64, 151936, 4096), Shape(8192, 151936, 1024), Shape(8192, 151936, 4096)]
    if GPU
    else [Shape(16, 32000, 256), Shape(512, 32000, 256)]
)
TRAINING = [Shape(8192, 151936, 1024), Shape(8192, 151936, 4096)] if GPU else [Shape(512, 32000, 256)]
DISTILLING = [Shape(8192, 151936, 1024, 4096)] if GPU else [Shape(256, 32000, 256, 512)]
DRAWING = [Shape(64, 151936, 1024), Shape(256, 151936, 4096)] if GPU else [Shape(64, 32000, 256)]


def make_tensors(shape: Shape, requires_grad: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Return random hidden states [rows, width], a weight [vocabulary, width] and targets int64 [rows]."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    options: Any = {"generator": generator, "device": DEVICE}
    hidden = torch.randn(shape.rows, shape.width, **options).to(DTYPE)
    weight = (3 * torch.randn(shape.vocabulary, shape.width, **options) / shape.width**0.5).to(DTYPE)
    target = torch.randint(0, shape.vocabulary, (shape.rows,), **options)
    return hidden.requires_grad_(requires_grad), weight.requires_grad_(requires_grad), target


def import_or_skip(module: str, name: str) -> Any:
    """Return a function or class of another library, or skip the benchmark where it is not installed."""
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        pytest.skip(f"{module}: {error}")


def eager_scores(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return log-probability, entropy and rank of the targets, each [rows], from full logits."""
    logp = (hidden @ weight.T).float().log_softmax(1)
    chosen = logp.gather(1, target[:, None])
    return chosen[:, 0], -(logp.exp() * logp).sum(1), 1 + (logp > chosen).sum(1)


def genssd_scores(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    stats = linear_logprob(hidden, weight, target)
    return stats.logprob, stats.entropy, stats.rank


@pytest.mark.parametrize("shape", SCORING, ids=str)
@pytest.mark.parametrize("implementation", ["genssd", "eager", "compile"])
def test_scoring(benchmark: BenchmarkFixture, limits: DeviceLimits, implementation: str, shape: Shape) -> None:
    hidden, weight, target = make_tensors(shape)
    scores = {"genssd": genssd_scores, "eager": eager_scores, "compile": torch.compile(eager_scores)}[implementation]
    logprob, entropy, _ = scores(hidden[:16], weight, target[:16])
    exact = eager_scores(hidden[:16].double(), weight.double(), target[:16])
    assert_close(logprob, exact[0], 1e-4 if torch.float32 == DTYPE else 5e-2)
    assert_close(entropy, exact[1], 1e-4 if torch.float32 == DTYPE else 5e-2)
    measure(
        benchmark, limits, lambda: scores(hidden, weight, target), group=f"scoring {shape}",
        flops=2 * shape.rows * shape.vocabulary * shape.width,
        num_bytes=weight.nbytes + hidden.nbytes,
    )  # fmt: skip


def eager_cross_entropy(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy((hidden @ weight.T).float(), target, reduction="sum")


def cross_entropy_of(implementation: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Return an implementation as a function of hidden states, weight and targets; skip one that is not installed."""
    if implementation == "liger":
        loss = import_or_skip("liger_kernel.transformers", "LigerFusedLinearCrossEntropyLoss")(reduction="sum")
        return lambda hidden, weight, target: loss(weight, hidden, target)
    if implementation == "cce":
        cce = import_or_skip("cut_cross_entropy", "linear_cross_entropy")
        return lambda hidden, weight, target: cce(hidden, weight, target, reduction="sum")
    return {
        "genssd": lambda hidden, weight, target: linear_cross_entropy(hidden, weight, target).total,
        "eager": eager_cross_entropy,
        "compile": torch.compile(eager_cross_entropy),
    }[implementation]


@pytest.mark.parametrize("shape", TRAINING, ids=str)
@pytest.mark.parametrize("implementation", ["genssd", "eager", "compile", "liger", "cce"])
def test_cross_entropy(benchmark: BenchmarkFixture, limits: DeviceLimits, implementation: str, shape: Shape) -> None:
    """Time forward and backward pass, with the gradients of hidden and weight: 6 N V D operations."""
    if implementation in ("liger", "cce") and not GPU:
        pytest.skip("runs on GPUs alone")
    loss = cross_entropy_of(implementation)
    hidden, weight, target = make_tensors(shape, requires_grad=True)
    few = hidden[:64].detach().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(few, weight, target[:64]), few)
    wide = few.detach().double().requires_grad_()
    exact = torch.nn.functional.cross_entropy(wide @ weight.detach().double().T, target[:64], reduction="sum")
    assert_close(gradient, torch.autograd.grad(exact, wide)[0], 1e-4 if torch.float32 == DTYPE else 5e-2)

    def step() -> None:
        hidden.grad = weight.grad = None
        loss(hidden, weight, target).backward()

    measure(
        benchmark, limits, step, group=f"cross-entropy {shape}", flops=6 * shape.rows * shape.vocabulary * shape.width,
        num_bytes=3 * weight.nbytes,
    )  # fmt: skip


def eager_divergence(kind: str, student: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor) -> Tensor:
    log_p, log_q = (student @ weight.T).float().log_softmax(1), (teacher @ teacher_weight.T).float().log_softmax(1)
    if kind == "forward_kl":
        return (log_q.exp() * (log_q - log_p)).sum()
    log_m = torch.logaddexp(log_p, log_q) - 0.6931471805599453
    return 0.5 * ((log_q.exp() * (log_q - log_m)).sum() + (log_p.exp() * (log_p - log_m)).sum())


def trl_divergence(kind: str, student: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor) -> Tensor:
    loss = import_or_skip("trl.experimental.gkd", "GKDTrainer").generalized_jsd_loss
    beta = {"forward_kl": 0.0, "jsd": 0.5}[kind]
    logits = (student @ weight.T)[None], (teacher @ teacher_weight.T)[None]
    value: Tensor = loss(*logits, beta=beta, reduction="sum")
    return value


@pytest.mark.parametrize("shape", DISTILLING, ids=str)
@pytest.mark.parametrize("kind", ["forward_kl", "jsd"])
@pytest.mark.parametrize("implementation", ["genssd", "eager", "compile", "trl"])
def test_divergence(
    benchmark: BenchmarkFixture, limits: DeviceLimits, implementation: str, kind: Any, shape: Shape
) -> None:
    """Time forward and backward pass, with the student's gradients: 2 N V (D + E) + 4 N V D operations."""
    student, weight, _ = make_tensors(shape, requires_grad=True)
    teacher, teacher_weight, _ = make_tensors(Shape(shape.rows, shape.vocabulary, shape.teacher))
    losses: dict[str, Callable[..., Tensor]] = {
        "genssd": lambda kind, *heads: linear_divergence(*heads, kind=kind).total,
        "eager": eager_divergence,
        "compile": torch.compile(eager_divergence),
        "trl": trl_divergence,
    }
    loss = losses[implementation]
    few = student[:32].detach().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(kind, few, weight, teacher[:32], teacher_weight), few)
    wide = few.detach().double().requires_grad_()
    exact = eager_divergence(kind, wide, weight.detach().double(), teacher[:32].double(), teacher_weight.double())
    assert_close(gradient, torch.autograd.grad(exact, wide)[0], 1e-4 if torch.float32 == DTYPE else 5e-2)

    def step() -> None:
        student.grad = weight.grad = None
        loss(kind, student, weight, teacher, teacher_weight).backward()

    product = shape.rows * shape.vocabulary
    measure(
        benchmark, limits, step, group=f"{kind} {shape}",
        flops=2 * product * (shape.width + shape.teacher) + 4 * product * shape.width,
        num_bytes=3 * weight.nbytes + teacher_weight.nbytes,
    )  # fmt: skip


@pytest.mark.parametrize("shape", DRAWING, ids=str)
@pytest.mark.parametrize("implementation", ["genssd", "eager"])
def test_drawing(benchmark: BenchmarkFixture, limits: DeviceLimits, implementation: str, shape: Shape) -> None:
    """Time drawing tokens at temperature 1 from hidden states, with their log-probabilities."""
    hidden, weight, _ = make_tensors(shape)
    keys = torch.arange(shape.rows, device=DEVICE)

    def eager() -> tuple[Tensor, Tensor]:
        logp = (hidden @ weight.T).float().log_softmax(1)
        tokens = torch.multinomial(logp.exp(), 1)
        return tokens[:, 0], logp.gather(1, tokens)[:, 0]

    run = {"genssd": lambda: linear_sample(hidden, weight, keys), "eager": eager}[implementation]
    tokens, logprob = run()
    exact = (hidden.double() @ weight.double().T).log_softmax(1).gather(1, tokens[:, None])[:, 0]
    assert_close(logprob, exact, 1e-4 if torch.float32 == DTYPE else 5e-2)
    measure(
        benchmark, limits, run, group=f"drawing {shape}", flops=2 * shape.rows * shape.vocabulary * shape.width,
        num_bytes=weight.nbytes,
    )  # fmt: skip


def eager_filtered(logits: Tensor) -> Tensor:
    """Draw a token per row with top-p 0.95 by sorting the probabilities, as transformers does."""
    ordered, ids = logits.softmax(1).sort(dim=1, descending=True)
    kept = ordered.masked_fill(ordered.cumsum(1) - ordered >= 0.95, 0.0)
    return ids.gather(1, torch.multinomial(kept, 1))[:, 0]


@pytest.mark.parametrize("shape", DRAWING, ids=str)
@pytest.mark.parametrize("implementation", ["genssd", "eager"])
def test_filtered_sampling(
    benchmark: BenchmarkFixture, limits: DeviceLimits, implementation: str, shape: Shape
) -> None:
    """Time drawing with top-p 0.95 from stored logits."""
    logits = 3 * torch.randn(shape.rows, shape.vocabulary, device=DEVICE)
    keys = torch.arange(shape.rows, device=DEVICE)
    run = {"genssd": lambda: sample(logits, keys, top_p=0.95), "eager": lambda: eager_filtered(logits)}[implementation]
    drawn = logits.softmax(1).gather(1, run()[:, None])
    assert bool((drawn > 0).all())
    measure(
        benchmark, limits, run, group=f"top-p {shape.rows}x{shape.vocabulary}", flops=0.0, num_bytes=logits.nbytes
    )  # fmt: skip
