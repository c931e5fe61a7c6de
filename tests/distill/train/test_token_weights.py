"""Weights of tokens by entropy and position, against a loop in Python and over whole trainings."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_pair import TinyPair
from support.training_runs import ROWS, config_for, metrics, weights

from genssd.distill.train.loss_options import LossOptions
from genssd.distill.train.losses import CompletionTokens, Head, compute_loss
from genssd.distill.train.token_weight_options import TokenWeightOptions
from genssd.distill.train.token_weights import compute_entropy, weigh_tokens
from genssd.distill.train.trainer import run_train
from genssd.engine.common.errors import InputError

Write = Callable[..., Path]


def expected_weights(options: TokenWeightOptions, weight: list[float], entropy: list[float] | None) -> list[float]:
    """The weights of one completion, token by token."""
    counted = [t for t in range(len(weight)) if weight[t] > 0]
    chosen = set(counted)
    if entropy is not None:
        chosen = set(sorted(counted, key=lambda t: (-entropy[t], t))[: math.ceil(options.fraction * len(counted))])
    fade = [1.0 if options.half_life is None else 0.5 ** (t / options.half_life) for t in range(len(weight))]
    scale = [fade[t] if t in chosen else 0.0 for t in range(len(weight))]
    mean = sum(scale) / max(1, len(counted))
    return [weight[t] * scale[t] / mean if mean else 0.0 for t in range(len(weight))]


@pytest.mark.parametrize("half_life", [None, 0.5, 3.0])
@pytest.mark.parametrize("fraction", [None, 0.01, 0.2, 0.5, 0.99])
def test_weights_are_those_of_the_formula(half_life: float | None, fraction: float | None) -> None:
    options = TokenWeightOptions(
        entropy_of="none" if fraction is None else "student", fraction=fraction or 0.2, half_life=half_life
    )
    generator = torch.Generator().manual_seed(0)
    lengths = [7, 1, 12, 3]
    weight = torch.rand(23, generator=generator, dtype=torch.float64) + 0.1
    weight[[0, 3, 9, 20, 21, 22]] = 0.0  # the last completion counts as nothing at all
    entropy = torch.randint(0, 5, (23,), generator=generator).double()  # with ties
    result = weigh_tokens(options, weight, lengths, None if fraction is None else entropy)
    start = 0
    for length in lengths:
        part = slice(start, start + length)
        truth = expected_weights(options, weight[part].tolist(), None if fraction is None else entropy[part].tolist())
        torch.testing.assert_close(result[part], torch.tensor(truth, dtype=torch.float64), rtol=1e-12, atol=0.0)
        start += length


def test_entropy_is_that_of_the_logits() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(6, 4, generator=generator, requires_grad=True)
    weight = torch.randn(11, 4, generator=generator)
    log_p = (hidden.double() @ weight.double().T).log_softmax(1)
    entropy = compute_entropy(hidden, weight, None)
    torch.testing.assert_close(entropy.double(), -(log_p.exp() * log_p).sum(1), rtol=1e-5, atol=1e-6)
    assert not entropy.requires_grad


@pytest.mark.parametrize("judge", ["student", "teacher"])
def test_the_loss_runs_over_the_tokens_that_the_judge_is_least_sure_of(judge: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    heads = [
        Head(*(torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((10, 4), (9, 4)))) for _ in "st"
    ]
    tokens = CompletionTokens(
        target_M=torch.randint(0, 9, (10,), generator=generator), weight_M=torch.ones(10, dtype=torch.float64),
        lengths=[10],
    )  # fmt: skip
    options = LossOptions(
        kd_ratio=0.4, kd_loss="reverse_kl", teacher_model_name_or_path="t",
        token_weights=TokenWeightOptions(entropy_of=judge, fraction=0.3),
    )  # fmt: skip
    log_p, log_q = ((h.hidden_MD @ h.weight_VD.T).log_softmax(1) for h in heads)
    log_judge = log_p if judge == "student" else log_q
    chosen = (-(log_judge.exp() * log_judge).sum(1)).topk(3).indices
    ce = -log_p.gather(1, tokens.target_M[:, None])[:, 0]
    kl = (log_p.exp() * (log_p - log_q)).sum(1)
    loss = compute_loss(options, heads[0], tokens, heads[1])
    assert float(loss.total) == pytest.approx(float((0.6 * ce + 0.4 * kl)[chosen].sum() * 10 / 3), rel=1e-6)


@pytest.mark.parametrize("layout", ["pad", "tree"])
def test_no_split_of_a_step_changes_it(tiny_pair: TinyPair, write_rows: Write, tmp_path: Path, layout: Any) -> None:
    """The choice runs over each completion, so forward passes of one or of four examples give the same weights."""
    options = TokenWeightOptions(entropy_of="student", fraction=0.4, half_life=2.0)
    data, trained, losses = write_rows(ROWS[:4]), [], []
    for name, size in (("one", 1), ("four", 4)):
        config = config_for(
            tiny_pair, data, tmp_path / name, max_steps=1, per_device_train_batch_size=size,
            gradient_accumulation_steps=4 // size, token_weights=options, layout=layout,
        )  # fmt: skip
        run_train(config)
        trained.append(weights(tmp_path / name))
        losses.append(metrics(tmp_path / name)[0])
    assert losses[0]["loss"] == pytest.approx(losses[1]["loss"], rel=1e-5)
    assert losses[0]["grad_norm"] == pytest.approx(losses[1]["grad_norm"], rel=1e-4)
    run_train(dataclasses.replace(config, output_dir=str(tmp_path / "all"), token_weights=TokenWeightOptions()))
    assert metrics(tmp_path / "all")[0]["loss"] != pytest.approx(losses[0]["loss"], rel=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fraction": 0.0}, r"token_weights\.fraction must lie in \(0, 1\), not 0\.0"),
        ({"fraction": 1.0}, r"token_weights\.fraction must lie"),
        ({"half_life": 0.0}, r"token_weights\.half_life must be positive, not 0\.0"),
        ({"half_life": math.inf}, "half_life must be a finite number"),
        ({"entropy_of": "both"}, "entropy_of"),
    ],
)
def test_wrong_values_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        TokenWeightOptions(**options)


def test_the_teachers_entropy_needs_a_teacher_in_memory() -> None:
    with pytest.raises(InputError, match="entropy_of teacher needs the whole distribution of a teacher in memory"):
        LossOptions(kd_ratio=0.5, token_weights=TokenWeightOptions(entropy_of="teacher"))
