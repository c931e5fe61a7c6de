"""DistiLLM-2's alpha for each completion, against its formula in Python."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from genssd.distill.train.adaptive_alpha import adapt_alpha
from genssd.distill.train.config import TrainConfig
from genssd.distill.train.loss_options import LossOptions
from genssd.distill.train.losses import CompletionTokens, Head, compute_loss
from genssd.engine.common.errors import InputError

LENGTHS = [3, 4, 2, 5]
MEMORY: dict[str, Any] = {"kd_ratio": 1.0, "teacher_model_name_or_path": "t", "adaptive_alpha": True}


def expected_alphas(
    alpha: float, log_p: list[float], log_q: list[float], counted: list[bool], *, reverse: bool
) -> list[float]:
    gaps: list[float | None] = []
    start = 0
    for length in LENGTHS:
        used = [t for t in range(start, start + length) if counted[t]]
        start += length
        if not used:
            gaps.append(None)
            continue
        q, p = (math.exp(sum(values[t] for t in used) / len(used)) for values in (log_q, log_p))
        gaps.append(p - q if reverse else q - p)
    known = [gap for gap in gaps if gap is not None]
    mean = sum(known) / len(known)
    return [alpha if gap is None else min(alpha, max(0.01, 1 - (1 - alpha) * mean / (gap + 1e-5))) for gap in gaps]


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("alpha", [0.1, 0.6])
def test_alpha_is_that_of_the_formula(alpha: float, reverse: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    log_p = -2 - torch.rand(14, generator=generator, dtype=torch.float64)
    log_q = -1 - torch.rand(14, generator=generator, dtype=torch.float64)
    counted = torch.ones(14, dtype=torch.bool)
    counted[[1, 7, 8]] = False  # the third completion has no token that counts
    if reverse:
        log_p, log_q = log_q, log_p
    truth = expected_alphas(alpha, log_p.tolist(), log_q.tolist(), counted.tolist(), reverse=reverse)
    result = adapt_alpha(alpha, log_p, log_q, counted, LENGTHS, reverse=reverse)
    assert [length for length, _ in result] == LENGTHS
    assert [value for _, value in result] == pytest.approx(truth, rel=1e-9)
    assert len(set(truth)) >= 2


def test_a_completion_alone_and_equal_models_have_alpha_itself() -> None:
    log_p, counted = torch.tensor([-1.0, -2.0]), torch.ones(2, dtype=torch.bool)
    ((_, alone),) = adapt_alpha(0.2, log_p, log_p + 0.5, counted, [2], reverse=False)
    assert alone == pytest.approx(0.2, abs=1e-4)
    equal = adapt_alpha(0.2, log_p, log_p, counted, [1, 1], reverse=False)
    assert [value for _, value in equal] == [0.2, 0.2]


@pytest.mark.parametrize("kind", ["skew_forward_kl", "skew_reverse_kl", "distillm2"])
def test_the_loss_has_the_alpha_of_each_completion(kind: Any) -> None:
    generator = torch.Generator().manual_seed(3)
    hidden, weight, *teacher = (
        torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((14, 4), (9, 4), (14, 5), (9, 5))
    )
    target = torch.randint(0, 9, (14,), generator=generator)
    rejected = torch.tensor([False] * 3 + [True] * 4 + [False] * 2 + [True] * 5)
    options = LossOptions(kd_loss=kind, alpha=0.5, **MEMORY, **({"beta": 0.7} if kind == "distillm2" else {}))
    tokens = CompletionTokens(
        target_M=target, weight_M=torch.ones(14, dtype=torch.float64), lengths=LENGTHS,
        rejected_M=rejected if kind == "distillm2" else None,
    )  # fmt: skip
    log_p, log_q = (hidden @ weight.T).log_softmax(1), (teacher[0] @ teacher[1].T).log_softmax(1)
    p, q = log_p.exp(), log_q.exp()
    a, b = (x.gather(1, target[:, None])[:, 0].tolist() for x in (log_p, log_q))
    terms = {"skew_forward_kl": ((~rejected).tolist(), 2 - 0.7), "skew_reverse_kl": (rejected.tolist(), 0.7)}
    total = torch.zeros((), dtype=torch.float64)
    for name, (counted, factor) in terms.items():
        if kind not in (name, "distillm2"):
            continue
        used, scale = (counted, factor) if kind == "distillm2" else ([True] * 14, 1.0)
        alphas = expected_alphas(0.5, a, b, used, reverse=name == "skew_reverse_kl")
        alpha = torch.tensor([v for v, n in zip(alphas, LENGTHS, strict=True) for _ in range(n)])[:, None]
        if name == "skew_forward_kl":
            rows = (q * (log_q - (alpha * q + (1 - alpha) * p).log())).sum(1)
        else:
            rows = (p * (log_p - ((1 - alpha) * q + alpha * p).log())).sum(1)
        total = total + scale * (rows * torch.tensor(used)).sum()
    loss = compute_loss(options, Head(hidden, weight), tokens, Head(*teacher))
    assert float(loss.total) == pytest.approx(float(total), rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kd_ratio": 1.0, "adaptive_alpha": True}, "needs a teacher in memory, no kd_topk"),
        ({**MEMORY, "kd_topk": 3}, "needs a teacher in memory, no kd_topk"),
        ({**MEMORY, "alpha": 0.001}, "alpha is the largest value, and must be at least 0.01"),
        ({**MEMORY, "per_device_train_batch_size": 1}, "per_device_train_batch_size must be at least 2"),
    ],
)
def test_what_it_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=f"adaptive_alpha.*{message}"):
        TrainConfig(model_name_or_path="m", data=("d",), kd_loss="skew_forward_kl", **options)
