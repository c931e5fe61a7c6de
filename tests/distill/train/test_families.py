"""Students and teachers of every family in training: the losses, and completions by the student's current weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.families import FAMILY_CASES, save_family
from support.toys import VOCAB, save_checkpoint, save_tokenizer

from genssd.distill.data.examples import Example
from genssd.distill.train.batches import ExampleBatch
from genssd.distill.train.forward import ForwardPass
from genssd.distill.train.loss_options import LossOptions
from genssd.distill.train.models import check_layout, load_teacher
from genssd.distill.train.on_policy import RolloutPlan, Rollouts
from genssd.distill.train.rollout_options import RolloutOptions
from genssd.engine.common.errors import InputError
from genssd.engine.models.transformers_loading import load_model
from genssd.engine.texts.text import Tokenizer

CASES = {case.id: case.values for case in FAMILY_CASES}
IDS = (5, 80, 9, 120, 33, 7, 61, 18, 200, 42, 77, 3)
CPU = torch.device("cpu")


def save(directory: Path, name: str, **options: Any) -> Tokenizer:
    directory.mkdir()
    kind, own = CASES[name]
    if name == "gemma2":
        own = {**own, "final_logit_softcapping": 2.0}
    save_family(directory, kind, {**own, **options})
    save_tokenizer(directory)
    return Tokenizer(directory)


@pytest.mark.parametrize(
    ("student", "teacher", "kd_topk"),
    [("gemma2", "granite", 0), ("granite", "gemma2", 7), ("granite", "gemma2", 0), ("gemma2", None, 0)],
)
def test_the_loss_is_that_of_the_models_own_logits(
    tmp_path: Path, student: str, teacher: str | None, kd_topk: int
) -> None:
    """Softcaps and divisors of the logits included, and its gradient."""
    tokenizer = save(tmp_path / "student", student)
    model = load_model(tmp_path / "student", tokenizer, CPU)
    options, other = LossOptions(), None
    if teacher is not None:
        save(tmp_path / "teacher", teacher, seed=5)
        other = load_teacher(tmp_path / "teacher", tokenizer, CPU, torch.float32)
        options = LossOptions(
            kd_ratio=1.0, kd_loss="forward_kl", teacher_model_name_or_path="t", temperature=1.5, kd_topk=kd_topk,
            kd_tail="renormalize",
        )  # fmt: skip
    forward = ForwardPass.build(model, other, tokenizer, options, layout="pad", bf16=False)
    example = Example(input_ids=IDS, num_prompt=3)
    sums = forward.compute_loss(ExampleBatch(examples=[example], on_policy=False), counted=True, when="now")
    sums.total.backward()  # type: ignore[no-untyped-call]
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}

    model.zero_grad()
    ids = torch.tensor([IDS])
    logits = model(ids).logits[0, 2:-1]
    if other is None:
        expected = torch.nn.functional.cross_entropy(logits, ids[0, 3:], reduction="sum")
    else:
        q = (other.model(ids).logits[0, 2:-1] / 1.5).softmax(1)
        log_p = (logits / 1.5).log_softmax(1)
        if kd_topk:
            top = q.topk(kd_topk, dim=1)
            q, log_p = top.values / top.values.sum(1, keepdim=True), log_p.gather(1, top.indices)
            log_p = log_p - log_p.logsumexp(1, keepdim=True)
        expected = (q * (q.log() - log_p)).sum()
    expected.backward()
    torch.testing.assert_close(sums.total, expected, atol=1e-3, rtol=1e-4)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-4, rtol=1e-3)


OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "stablelm": ("stablelm", {}),
    "qwen3.5": (
        "qwen3_5_text",
        {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 4}
        | {"linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16},
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_models_that_the_own_decoder_does_not_compute_are_trained(tmp_path: Path, name: str) -> None:
    """Every example of a padded batch as if it were alone; states run over no end of an example."""
    save_checkpoint(tmp_path, OTHERS[name][0], **OTHERS[name][1])
    tokenizer = Tokenizer(tmp_path)
    model = load_model(tmp_path, tokenizer, CPU)
    forward = ForwardPass.build(model, None, tokenizer, LossOptions(), layout="pad", bf16=False)
    rows = [IDS, IDS[3:], IDS[5:]]
    examples = [Example(input_ids=ids, num_prompt=3) for ids in rows]
    sums = forward.compute_loss(ExampleBatch(examples=examples, on_policy=False), counted=True, when="now")
    with torch.no_grad():
        parts = [
            torch.nn.functional.cross_entropy(model(torch.tensor([ids])).logits[0, 2:-1], torch.tensor(ids[3:]))
            * (len(ids) - 3)
            for ids in rows
        ]
    torch.testing.assert_close(sums.total.detach(), torch.stack(parts).sum(), atol=1e-3, rtol=1e-4)
    plan = RolloutPlan(options=RolloutOptions(), probability=1.0, seed=0, max_length=64)
    with pytest.raises(InputError, match="student cannot write on-policy completions: lmbda must be 0"):
        Rollouts.build(model, tmp_path, tokenizer, plan)
    if name == "qwen3.5":
        with pytest.raises(InputError, match="layout pack cannot separate the recurrent states of qwen3_5_text"):
            check_layout(model, "pack")


@pytest.mark.parametrize("name", [name for name in CASES if name != "gpt-oss"])
@torch.no_grad()
def test_the_student_writes_with_the_weights_that_are_trained(tmp_path: Path, name: str) -> None:
    tokenizer = save(tmp_path / "student", name)
    model = load_model(tmp_path / "student", tokenizer, CPU)
    plan = RolloutPlan(options=RolloutOptions(memory_bytes=1 << 22), probability=1.0, seed=0, max_length=64)
    rollouts = Rollouts.build(model, tmp_path / "student", tokenizer, plan)
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    runner = rollouts._engine._resources.runner("student")
    ids = torch.randint(0, VOCAB, (1, 40), generator=generator)
    (hidden,) = runner.extend([runner.tree.root()], [ids[0].tolist()])
    model.set_attn_implementation("eager")
    torch.testing.assert_close(runner.logits(hidden), model(ids).logits[0], atol=2e-4, rtol=0)


def test_a_student_whose_weights_are_kept_in_another_order_writes_nothing(tmp_path: Path) -> None:
    tokenizer = save(tmp_path / "student", "gpt-oss")
    model = load_model(tmp_path / "student", tokenizer, CPU)
    plan = RolloutPlan(options=RolloutOptions(), probability=1.0, seed=0, max_length=64)
    with pytest.raises(InputError, match="a gpt_oss student cannot write on-policy completions: lmbda must be 0"):
        Rollouts.build(model, tmp_path / "student", tokenizer, plan)
