"""The memory that each operator over a head may take beyond its inputs, for tests on a real and on a fake device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from genssd.kernels.cross_entropy import linear_cross_entropy
from genssd.kernels.divergence import linear_divergence
from genssd.kernels.logprob import linear_logprob
from genssd.kernels.logprob_at import linear_logprob_at
from genssd.kernels.sampling import linear_sample
from genssd.kernels.sorted_distance import linear_sorted_distance
from genssd.kernels.topk_divergence import topk_divergence

MIB = 1 << 20
ROWS, VOCABULARY, WIDTH = 8192, 151936, 256
"""Sizes of the problem; its logits would take 4748 MiB in float32."""

Run = Callable[[Tensor, Tensor, Tensor], object]
"""Function of hidden states, weight and targets."""


def _differentiate(loss: Callable[[Tensor, Tensor], Tensor], *, frozen: bool = False) -> Run:
    """Return the function that computes a loss and its gradients. frozen: in the hidden states alone."""

    def run(hidden: Tensor, weight: Tensor, _: Tensor) -> object:
        inputs = hidden.detach().requires_grad_(), weight.detach().requires_grad_(not frozen)
        return torch.autograd.grad(loss(*inputs), inputs[:1] if frozen else inputs)

    return run


def _cross_entropy(*, frozen: bool) -> Run:
    def run(hidden: Tensor, weight: Tensor, target: Tensor) -> object:
        return _differentiate(lambda h, w: linear_cross_entropy(h, w, target).total, frozen=frozen)(
            hidden, weight, target
        )

    return run


def _logprob_gradient(hidden: Tensor, weight: Tensor, target: Tensor) -> object:
    return _differentiate(lambda h, w: linear_logprob(h, w, target).logprob.sum(), frozen=True)(hidden, weight, target)


def _divergence(hidden: Tensor, weight: Tensor, target: Tensor) -> object:
    return _differentiate(lambda h, w: linear_divergence(h, w, hidden, weight, kind="jsd").total)(
        hidden, weight, target
    )


def _topk_divergence(hidden: Tensor, weight: Tensor, target: Tensor) -> object:
    ids = torch.arange(64, device=hidden.device).expand(len(target), -1).contiguous()
    logprob = torch.full((len(target), 64), 1 / 65, device=hidden.device).log()
    return _differentiate(lambda h, w: topk_divergence(h, w, ids, logprob, kind="forward_kl").total)(
        hidden, weight, target
    )


def _student_topk(hidden: Tensor, weight: Tensor, target: Tensor) -> object:
    ids = torch.arange(64, device=hidden.device).expand(len(target), -1).contiguous()
    logprob = linear_logprob_at(hidden, weight, ids)
    return _differentiate(lambda h, w: topk_divergence(h, w, ids, logprob, kind="reverse_kl", tail="drop").total)(
        hidden, weight, target
    )


def _sorted_distance(hidden: Tensor, weight: Tensor, _: Tensor) -> object:
    return _differentiate(lambda h, w: linear_sorted_distance(h, w, hidden, weight).total)(hidden, weight, _)


BUDGETS: dict[str, tuple[Run, int]] = {
    "score": (linear_logprob, 64),
    "draw": (linear_sample, 320),  # 256 of logits
    "score with top k": (lambda h, w, t: linear_logprob(h, w, t, topk=64), 128),
    "gradient of the score": (_logprob_gradient, 2400),
    "cross-entropy": (_cross_entropy(frozen=False), 2600),
    "cross-entropy, frozen head": (_cross_entropy(frozen=True), 2400),
    "divergence": (_divergence, 2600),
    "divergence from top k": (_topk_divergence, 1600),
    "reverse KL over the student's top k": (_student_topk, 1650),
    "sorted distance": (_sorted_distance, 3600),
}
"""Each operator and the largest number of MiB that it allocates at once, its results and gradients included."""
