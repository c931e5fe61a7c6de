"""Operations over a linear head for the GPU probe: scores, draws and losses, at the sizes of Qwen3 models.

Shapes:  N rows   V vocabulary   D model width   E teacher's width
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from bench.gpu.operations import Build, NotInstalled, Operation, load
from bench.gpu.rows import OURS
from bench.gpu.timing import Implementation, Method
from torch import Tensor

from genssd.kernels.cross_entropy import compute_cross_entropy, linear_cross_entropy
from genssd.kernels.divergence import compute_divergence, linear_divergence
from genssd.kernels.logprob import linear_logprob
from genssd.kernels.sampling import linear_sample, sample

V = 151936
HALF = 2  # bytes of a bfloat16 number
L2_BYTES = 128 << 20  # buffers of this size together are larger than the L2 cache

SCORED = [(64, 1024), (64, 4096), (512, 1024), (8192, 1024), (8192, 4096)]
DRAWN = [(64, 4096), (256, 4096)]
FILTERED = [64, 256]
TRAINED = [(8192, 1024), (8192, 4096)]
DISTILLED = [(8192, 1024, 4096)]


def normal(*shape: int, scale: float = 1.0, seed: int = 0) -> Tensor:
    """Return random bfloat16 numbers on the GPU."""
    generator = torch.Generator("cuda").manual_seed(seed)
    return (scale * torch.randn(*shape, device="cuda", generator=generator)).bfloat16()


def make_head(rows: int, width: int, *, grad: bool = False, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return hidden states [N, D] and a weight [V, D], whose logits have a standard deviation of 3."""
    hidden, weight = normal(rows, width, seed=seed), normal(V, width, scale=3 / width**0.5, seed=seed + 1)
    return hidden.requires_grad_(grad), weight.requires_grad_(grad)


def make_targets(rows: int) -> Tensor:
    """Return random token ids, int64 [N]."""
    return torch.randint(0, V, (rows,), device="cuda", generator=torch.Generator("cuda").manual_seed(2))


def eager_scores(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return log-probability, entropy and rank of the targets from full logits."""
    logp = (hidden @ weight.T).float().log_softmax(1)
    chosen = logp.gather(1, target[:, None])
    return chosen[:, 0], -(logp.exp() * logp).sum(1), 1 + (logp > chosen).sum(1)


def iter_scores() -> Iterator[Operation]:
    """Yield the scoring of targets."""
    for rows, width in SCORED:

        def build(
            function: Callable[..., object], method: Method, rows: int = rows, width: int = width
        ) -> Implementation:
            inputs = *make_head(rows, width), make_targets(rows)
            return Implementation(calls=[lambda: function(*inputs)], method=method)

        yield Operation(
            name="score",
            shape=f"{rows} x {width}",
            flops=2 * rows * V * width,
            num_bytes=HALF * (V + rows) * width,
            implementations={
                OURS: functools.partial(build, functools.partial(linear_logprob, checked=False), "graph"),
                "eager": functools.partial(build, eager_scores, "graph"),
            },
        )


def eager_draw(hidden: Tensor, weight: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
    """Draw a token per row from full logits, with its log-probability."""
    logp = (hidden @ weight.T).float().log_softmax(1)
    tokens = torch.multinomial(logp.exp(), 1)
    return tokens, logp.gather(1, tokens)


def iter_draws() -> Iterator[Operation]:
    """Yield drawing at temperature 1, from hidden states."""
    for rows, width in DRAWN:

        def build(function: Callable[..., object], rows: int = rows, width: int = width) -> Implementation:
            inputs = *make_head(rows, width), torch.arange(rows, device="cuda")
            return Implementation(calls=[lambda: function(*inputs)], method="graph")

        yield Operation(
            name="draw",
            shape=f"{rows} x {width}",
            flops=2 * rows * V * width,
            num_bytes=HALF * V * width,
            implementations={
                OURS: functools.partial(build, functools.partial(linear_sample, checked=False)),
                "eager": functools.partial(build, eager_draw),
            },
        )


def eager_top_p(logits: Tensor, _: Tensor) -> Tensor:
    """Draw a token per row with top-p 0.95 by sorting the probabilities, as transformers does."""
    ordered, ids = logits.softmax(1).sort(dim=1, descending=True)
    kept = ordered.masked_fill(ordered.cumsum(1) - ordered >= 0.95, 0.0)
    return ids.gather(1, torch.multinomial(kept, 1))


def flashinfer_top_p() -> Callable[[Tensor, Tensor], object]:
    """Return flashinfer's sampling with top-p 0.95, the softmax included."""
    draw = load("flashinfer.sampling", "top_p_sampling_from_probs")
    return lambda logits, _: draw(logits.softmax(1), 0.95)


def iter_filtered_draws() -> Iterator[Operation]:
    """Yield drawing with top-p 0.95 from logits, float32 [N, V]."""
    for rows in FILTERED:

        def build(make: Callable[[], Callable[..., object]], rows: int = rows) -> Implementation:
            function, keys = make(), torch.arange(rows, device="cuda")
            buffers = 1 + L2_BYTES // (4 * rows * V)
            logits = [3 * normal(rows, V, seed=seed).float() for seed in range(buffers)]
            return Implementation(calls=[functools.partial(function, z, keys) for z in logits], method="graph")

        yield Operation(
            name="top-p",
            shape=f"{rows}",
            flops=0.0,
            num_bytes=4 * rows * V,
            implementations={
                OURS: functools.partial(build, lambda: functools.partial(sample, top_p=0.95, checked=False)),
                "eager": functools.partial(build, lambda: eager_top_p),
                "flashinfer": functools.partial(build, flashinfer_top_p),
            },
        )


Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Function from hidden states, weight and targets to the sum of the negative log-likelihoods."""


def liger_cross_entropy() -> Loss:
    """Return Liger-Kernel's fused loss."""
    loss = load("liger_kernel.transformers", "LigerFusedLinearCrossEntropyLoss")(reduction="sum")
    return lambda hidden, weight, target: loss(weight, hidden, target)


def cut_cross_entropy() -> Loss:
    """Return the loss of cut-cross-entropy."""
    return functools.partial(load("cut_cross_entropy", "linear_cross_entropy"), reduction="sum")


def eager_cross_entropy(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Compute the loss from full logits."""
    return torch.nn.functional.cross_entropy((hidden @ weight.T).float(), target, reduction="sum")


CROSS_ENTROPIES: dict[str, Callable[[], Loss]] = {
    OURS: lambda: lambda hidden, weight, target: linear_cross_entropy(hidden, weight, target).total,
    "eager": lambda: eager_cross_entropy,
    "Liger": liger_cross_entropy,
    "cut-cross-entropy": cut_cross_entropy,
}


NORMALIZED = "genssd with normalized logits"
"""Name of the first candidate of a loss that is not timed yet; bench.tuning.new_candidates times all of them."""


def compute_normalized(operator: Literal["cross_entropy", "divergence"], compute: Callable[..., Any]) -> Implementation:
    """Return what a loss and its backward pass compute with the first candidate whose product takes normalizers.

    compute: function of a configuration to the total, the losses and the gradients of hidden and weight. Raises
    NotInstalled where the card has no such candidate.
    """
    from genssd.kernels.candidates_triton import Device
    from genssd.kernels.loss_candidates_triton import loss_candidates
    from genssd.kernels.scale_triton import scale

    candidates = loss_candidates(operator, Device.of(torch.device("cuda", 0)), torch.bfloat16)
    configuration = next((candidate for candidate in candidates if candidate.fused), None)
    if configuration is None:
        raise NotInstalled("no candidate of this card takes normalizers from the product")
    one = torch.ones((), device="cuda")

    def run() -> list[Tensor]:
        return [scale(gradient, one, torch.bfloat16) for gradient in compute(configuration)[2:] if gradient.numel()]

    return Implementation(calls=[run], method="events")


def differentiate(loss: Callable[..., Tensor], trained: tuple[Tensor, ...], *inputs: Tensor) -> Implementation:
    """Return forward and backward pass of a loss of inputs. trained: the inputs whose gradients are computed."""
    return Implementation(calls=[lambda: torch.autograd.grad(loss(*inputs), trained)], method="events")


def iter_cross_entropies() -> Iterator[Operation]:
    """Yield the loss with its gradients in the hidden states and, unless the head is frozen, in the weight."""
    for rows, width in TRAINED:
        for frozen in (False, True):

            def build(
                make: Callable[[], Loss], rows: int = rows, width: int = width, frozen: bool = frozen
            ) -> Implementation:
                loss, (hidden, weight) = make(), make_head(rows, width, grad=True)
                weight.requires_grad_(not frozen)
                trained = (hidden,) if frozen else (hidden, weight)
                return differentiate(loss, trained, hidden, weight, make_targets(rows))

            yield Operation(
                name="cross-entropy, frozen head" if frozen else "cross-entropy",
                shape=f"{rows} x {width}",
                flops=(4 if frozen else 6) * rows * V * width,
                num_bytes=0.0,
                implementations={
                    **{name: functools.partial(build, make) for name, make in CROSS_ENTROPIES.items()},
                    NORMALIZED: functools.partial(build_normalized_cross_entropy, rows, width, frozen),
                },
            )


def build_normalized_cross_entropy(rows: int, width: int, frozen: bool) -> Implementation:
    """Return the candidate of cross-entropy, with the gradients of `iter_cross_entropies`."""
    inputs = *make_head(rows, width), make_targets(rows), torch.ones(rows, device="cuda")
    return compute_normalized(
        "cross_entropy",
        lambda configuration: compute_cross_entropy(*inputs, 1.0, None, True, not frozen, configuration=configuration),
    )


def build_normalized_divergence(kind: str, rows: int, width: int, teacher_width: int) -> Implementation:
    """Return the candidate of a divergence, with the gradients of `iter_divergences`."""
    student, teacher, ones = (
        make_head(rows, width),
        make_head(rows, teacher_width, seed=5),
        torch.ones(rows, device="cuda"),
    )
    return compute_normalized(
        "divergence",
        lambda configuration: compute_divergence(
            *student, *teacher, ones, kind, [0.5], [rows], 1.0, None, None, True, True, configuration=configuration
        ),
    )


def eager_divergence(kind: str, student: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor) -> Tensor:
    """Compute the sum of a divergence over the rows from full logits."""
    log_p, log_q = (student @ weight.T).float().log_softmax(1), (teacher @ teacher_weight.T).float().log_softmax(1)
    if kind == "forward_kl":
        return (log_q.exp() * (log_q - log_p)).sum()
    log_m = torch.logaddexp(log_p, log_q) - 0.6931471805599453
    return 0.5 * ((log_q.exp() * (log_q - log_m)).sum() + (log_p.exp() * (log_p - log_m)).sum())


def iter_divergences() -> Iterator[Operation]:
    """Yield divergences from a teacher's head, with the gradients of the student's hidden states and weight."""
    kinds: tuple[Literal["forward_kl", "jsd"], ...] = ("forward_kl", "jsd")
    for rows, width, teacher_width in DISTILLED:
        for kind in kinds:

            def build(
                loss: Callable[..., Tensor], rows: int = rows, width: int = width, teacher_width: int = teacher_width
            ) -> Implementation:
                student, teacher = make_head(rows, width, grad=True), make_head(rows, teacher_width, seed=5)
                return differentiate(loss, student, *student, *teacher)

            def compute_loss(*inputs: Tensor, kind: Literal["forward_kl", "jsd"] = kind) -> Tensor:
                return linear_divergence(*inputs, kind=kind).total

            implementations: dict[str, Build] = {
                OURS: functools.partial(build, compute_loss),
                "eager": functools.partial(build, functools.partial(eager_divergence, kind)),
                NORMALIZED: functools.partial(build_normalized_divergence, kind, rows, width, teacher_width),
            }
            yield Operation(
                name=kind,
                shape=f"{rows} x {width}, {teacher_width}",
                flops=rows * V * (6 * width + 2 * teacher_width),
                num_bytes=0.0,
                implementations=implementations,
            )
