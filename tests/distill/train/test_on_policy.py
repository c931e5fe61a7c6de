"""Completions by the student under training, sampled with its current weights, and the losses on them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_pair import TinyPair
from support.training_runs import ROWS, config_for, metrics, weights

from genssd import Engine
from genssd.distill.data.examples import Example
from genssd.distill.train import on_policy
from genssd.distill.train.config import TrainConfig
from genssd.distill.train.loss_options import LossOptions
from genssd.distill.train.losses import CompletionTokens, Head, compute_loss
from genssd.distill.train.on_policy import RolloutPlan, Rollouts
from genssd.distill.train.rollout_options import RolloutOptions
from genssd.distill.train.trainer import run_train
from genssd.engine.common.errors import InputError
from genssd.engine.models.sampling import Sampling
from genssd.engine.models.transformers_loading import load_model

Write = Callable[..., Path]
ROLLOUT = RolloutOptions(max_tokens=6, memory_bytes=1 << 22, sampling=Sampling(temperature=0.9))


def plan(*, max_length: int) -> RolloutPlan:
    return RolloutPlan(options=ROLLOUT, probability=1.0, seed=0, max_length=max_length)


def on_policy_config(pair: TinyPair, data: Path, out: Path, **options: Any) -> TrainConfig:
    settings = {
        "lmbda": 1.0, "kd_ratio": 1.0, "kd_loss": "reverse_kl", "rollout": ROLLOUT, "save_steps": 1,
        "teacher_model_name_or_path": str(pair.teacher), "save_total_limit": None, **options,
    }  # fmt: skip
    return config_for(pair, data, out, **settings)


@pytest.mark.parametrize(("student", "use_peft"), [("student", False), ("teacher", False), ("student", True)])
def test_every_step_writes_with_the_weights_that_the_last_one_left(
    tiny_pair: TinyPair,
    write_rows: Write,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    student: str,
    use_peft: bool,
) -> None:
    """An engine loaded from each checkpoint writes the completions of the next step; for a llama and a qwen3.

    With adapters a checkpoint has the weights with the adapters merged into them.
    """
    completions_of_step: list[list[tuple[int, ...]]] = []
    prompts_of_step: list[list[tuple[int, ...]]] = []
    real = on_policy.Rollouts.write

    def write(self: Any, examples: Any, step: int, indices: Any) -> Any:
        written = real(self, examples, step, indices)
        prompts_of_step.append([e.input_ids[: e.num_prompt] for e in examples])
        completions_of_step.append([e.completion_ids for e in written])
        assert all(
            e.input_ids[: e.num_prompt] == prompt for e, prompt in zip(written, prompts_of_step[-1], strict=True)
        )
        return written

    monkeypatch.setattr(on_policy.Rollouts, "write", write)
    start = getattr(tiny_pair, student)
    config = on_policy_config(
        tiny_pair, write_rows(ROWS), tmp_path / "run", model_name_or_path=str(start), learning_rate=0.05,
        use_peft=use_peft,
    )  # fmt: skip
    run_train(config)
    assert len(completions_of_step) == 6
    for number, (prompts, written) in enumerate(zip(prompts_of_step, completions_of_step, strict=True)):
        directory = start if number == 0 else tmp_path / "run" / f"checkpoint-{number}"
        engine = Engine.from_pretrained(student=directory, dtype="float32", memory_bytes=1 << 22)
        expected = engine.generate(
            prompts, model="student", max_tokens=6, sampling=ROLLOUT.sampling, seed=config.seed + number + 1
        )
        assert [completion.token_ids for (completion,) in expected] == written
    assert len({tuple(written) for written in completions_of_step}) == 6
    logged = metrics(tmp_path / "run")
    assert all("cross_entropy" not in row for row in logged)


def iter_tensors(value: object) -> Iterator[torch.Tensor]:
    """Yield the tensors in a structure of dataclasses and tuples."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple):
        for part in value:
            yield from iter_tensors(part)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from iter_tensors(getattr(value, field.name))


@pytest.mark.parametrize("student", ["student", "teacher"])
def test_the_engine_runs_on_the_trainers_own_memory(tiny_pair: TinyPair, student: str) -> None:
    directory = getattr(tiny_pair, student)
    tokenizer = tiny_pair.engine.tokenizer("student")
    model = load_model(directory, tokenizer, torch.device("cpu"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rollouts = Rollouts.build(model, directory, tokenizer, plan(max_length=64))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.125)
    decoder = rollouts._engine._resources.runners["student"].decoder
    engine_weights = [decoder.embedding, decoder.head.weight, decoder.norm, *iter_tensors(decoder.layers)]
    total = sum(float(value.double().sum()) for value in engine_weights)
    expected = sum(float((value.double() + 0.125).sum()) for value in before.values())
    assert total == pytest.approx(expected, rel=1e-6)


def test_equal_prompts_draw_different_completions_whoever_writes_them(tiny_pair: TinyPair) -> None:
    tokenizer = tiny_pair.engine.tokenizer("student")
    model = load_model(tiny_pair.student, tokenizer, torch.device("cpu"))
    rollouts = Rollouts.build(model, tiny_pair.student, tokenizer, plan(max_length=7))
    examples = [Example(input_ids=(1, 2, 3, 9), num_prompt=3, chunk_weights=((1, 2.0),), where="row")] * 4
    together = rollouts.write(examples, 5, range(4))
    assert len({e.completion_ids for e in together}) == 4
    shared = [rollouts.write(examples, 5, range(rank, 4, 2)) for rank in (0, 1)]
    assert [shared[i % 2][i // 2] for i in range(4)] == together
    assert all(e.chunk_weights == () and len(e.input_ids) <= 7 for e in together)
    assert rollouts.write(examples, 6, range(4)) != together
    longer = Rollouts.build(model, tiny_pair.student, tokenizer, plan(max_length=64))
    assert {len(e.completion_ids) for e in longer.write(examples, 5, range(4))} == {ROLLOUT.max_tokens}


def test_a_step_is_on_policy_with_the_probability_lmbda(
    tiny_pair: TinyPair, write_rows: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other steps train on the data, with their cross-entropy."""
    count = []
    real = on_policy.Rollouts.write
    monkeypatch.setattr(
        on_policy.Rollouts, "write", lambda self, e, step, i: count.append(step) or real(self, e, step, i)
    )
    config = on_policy_config(
        tiny_pair, write_rows(ROWS), tmp_path / "run", lmbda=0.5, kd_ratio=0.5, num_train_epochs=6
    )
    run_train(config)
    logged = metrics(tmp_path / "run")
    assert 4 <= len(count) <= 14
    assert [row["step"] for row in logged if "cross_entropy" not in row] == count
    assert all(row["loss"] == pytest.approx(row["divergence"]) for row in logged if row["step"] in count)


def test_on_policy_training_resumes_exactly_and_comes_closer(
    tiny_pair: TinyPair, write_rows: Write, tmp_path: Path
) -> None:
    data = write_rows(ROWS)
    config = on_policy_config(
        tiny_pair, data, tmp_path / "uninterrupted", num_train_epochs=8, learning_rate=3e-3, warmup_steps=0.0
    )
    run_train(config)
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "checkpoint-5").symlink_to(tmp_path / "uninterrupted" / "checkpoint-5")
    run_train(dataclasses.replace(config, output_dir=str(tmp_path / "part"), resume_from_checkpoint="last"))
    uninterrupted, resumed = weights(tmp_path / "uninterrupted"), weights(tmp_path / "part")
    assert all(torch.equal(uninterrupted[name], resumed[name]) for name in uninterrupted)
    losses = [row["loss"] for row in metrics(tmp_path / "uninterrupted")]
    assert sum(losses[-4:]) < 0.7 * sum(losses[:4])


def heads(rows: int = 1, vocabulary: int = 7) -> tuple[torch.Tensor, torch.Tensor, Head]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, 5, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocabulary, 5, generator=generator, dtype=torch.float64)
    teacher = Head(
        torch.randn(rows, 4, generator=generator, dtype=torch.float64),
        torch.randn(vocabulary, 4, generator=generator, dtype=torch.float64),
    )
    return hidden.requires_grad_(), weight.requires_grad_(), teacher


OPTIONS: dict[str, Any] = {"teacher_model_name_or_path": "t", "kd_ratio": 1.0}


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_sampled_gradient_is_that_of_reverse_kl_on_average(temperature: float) -> None:
    """Every token occurs once, weighted by the student's own probability, which gives the exact expectation."""
    hidden, weight, teacher = heads()
    p = (hidden.detach() @ weight.detach().T / temperature).softmax(-1)[0]
    everything = torch.arange(7)
    sampled = LossOptions(kd_loss="sampled_reverse_kl", lmbda=1.0, temperature=temperature, **OPTIONS)
    repeated = Head(teacher.hidden_MD.expand(7, -1), teacher.weight_VD)
    tokens = CompletionTokens(target_M=everything, weight_M=p, on_policy=True)
    loss = compute_loss(sampled, Head(hidden.expand(7, -1), weight), tokens, repeated)
    sampled_gradients = torch.autograd.grad(loss.total, [hidden, weight])
    exact = compute_loss(
        LossOptions(kd_loss="reverse_kl", temperature=temperature, **OPTIONS), Head(hidden, weight),
        CompletionTokens(target_M=everything[:1], weight_M=torch.ones(1, dtype=torch.float64)), teacher,
    )  # fmt: skip
    expected = torch.autograd.grad(exact.total, [hidden, weight])
    assert float(loss.total.detach()) == pytest.approx(float(exact.total.detach()), rel=1e-6)
    for a, b in zip(sampled_gradients, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
def test_a_support_of_the_whole_vocabulary_is_the_full_divergence(kind: Any, tail: Any) -> None:
    hidden, weight, teacher = heads(rows=6)
    tokens = CompletionTokens(target_M=torch.zeros(6, dtype=torch.int64), weight_M=torch.ones(6, dtype=torch.float64))
    grads = []
    for topk in (0, 7, 50):
        options = LossOptions(kd_loss=kind, kd_topk=topk, kd_tail=tail, temperature=1.7, **OPTIONS)
        loss = compute_loss(options, Head(hidden, weight), tokens, teacher)
        grads.append([loss.total.detach(), *torch.autograd.grad(loss.total, [hidden, weight])])
    for results in grads[1:]:
        for a, b in zip(results, grads[0], strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_local_support_matching_renormalises_both_over_the_teachers_likeliest() -> None:
    hidden, weight, teacher = heads(rows=4)
    tokens = CompletionTokens(target_M=torch.zeros(4, dtype=torch.int64), weight_M=torch.ones(4, dtype=torch.float64))
    options = LossOptions(kd_loss="reverse_kl", kd_topk=3, kd_tail="renormalize", **OPTIONS)
    loss = compute_loss(options, Head(hidden, weight), tokens, teacher)
    q, p = teacher.hidden_MD @ teacher.weight_VD.T, hidden @ weight.T
    support = q.topk(3).indices
    log_q, log_p = q.gather(1, support).log_softmax(1), p.gather(1, support).log_softmax(1)
    expected = (log_p.exp() * (log_p - log_q)).sum()
    assert float(loss.total.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)


@pytest.mark.parametrize("tail", ["drop", "bucket", "renormalize", "policy_gradient"])
@pytest.mark.parametrize("widths", [(7, 7), (9, 7), (7, 9)])
def test_reverse_kl_over_the_students_likeliest_tokens(tail: Any, widths: tuple[int, int]) -> None:
    """Both heads are cut to the ids that both have, of which the student's three likeliest are taken."""
    hidden, weight, _ = heads(rows=4, vocabulary=widths[0])
    teacher = heads(rows=4, vocabulary=widths[1])[2]
    tokens = CompletionTokens(target_M=torch.zeros(4, dtype=torch.int64), weight_M=torch.ones(4, dtype=torch.float64))
    options = LossOptions(kd_loss="reverse_kl", kd_topk=3, kd_topk_of="student", kd_tail=tail, **OPTIONS)
    loss = compute_loss(options, Head(hidden, weight), tokens, teacher)
    log_q, log_p = ((a @ b[:7].T).log_softmax(1) for a, b in (teacher[:2], (hidden, weight)))
    support = log_p.topk(3).indices
    a, b = log_p.gather(1, support), log_q.gather(1, support)
    if tail == "renormalize":
        a, b = a.log_softmax(1), b.log_softmax(1)
    expected = (a.exp() * (a - b)).sum()
    if tail == "bucket":
        rest_p, rest_q = 1 - a.exp().sum(1), 1 - b.exp().sum(1)
        expected = expected + (rest_p * (rest_p / rest_q).log()).sum()
    assert float(loss.total.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    if tail == "policy_gradient":
        expected = ((a.exp() * (a - b)).detach() * a).sum()
    ours = torch.autograd.grad(loss.total, [hidden, weight])
    for gradient, truth in zip(ours, torch.autograd.grad(expected, [hidden, weight]), strict=True):
        torch.testing.assert_close(gradient, truth, atol=1e-6, rtol=1e-5)


def test_special_tokens_count_nothing_in_the_divergence_only() -> None:
    hidden, weight, teacher = heads(rows=3)
    tokens = CompletionTokens(target_M=torch.tensor([1, 6, 2]), weight_M=torch.ones(3, dtype=torch.float64))
    options = LossOptions(kd_ratio=1.0, teacher_model_name_or_path="t", mask_special_tokens=True)
    loss = compute_loss(options, Head(hidden, weight), tokens, teacher, special_ids=[6])
    (gradient,) = torch.autograd.grad(loss.total, [hidden])
    assert (gradient[1] == 0).all()
    assert (gradient[0] != 0).any()
    mixed = dataclasses.replace(options, kd_ratio=0.5)
    loss = compute_loss(mixed, Head(hidden, weight), tokens, teacher, special_ids=[6])
    assert (torch.autograd.grad(loss.total, [hidden])[0][1] != 0).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lmbda": 0.5}, "judged by a teacher"),
        ({"kd_topk": 5}, "of a teacher in memory"),
        ({**OPTIONS, "kd_loss": "sampled_reverse_kl"}, "needs lmbda 1"),
        ({**OPTIONS, "lmbda": 1.0, "kd_loss": "sampled_reverse_kl", "kd_topk": 3}, "no kd_topk"),
        ({"kd_ratio": 1.0, "kd_topk_of": "student"}, "the rows hold .* its own most likely tokens"),
        (
            {"kd_ratio": 1.0, "kd_topk_of": "student", "teacher_model_name_or_path": "http://host:1/v1"},
            "the server http://host:1/v1 gives probabilities of its own most likely tokens",
        ),
        ({**OPTIONS, "kd_topk_of": "student", "kd_loss": "reverse_kl"}, "needs kd_topk and kd_loss reverse_kl"),
        ({**OPTIONS, "kd_topk_of": "student", "kd_topk": 3}, "needs kd_topk and kd_loss reverse_kl"),
        ({**OPTIONS, "kd_topk": 3, "kd_loss": "reverse_kl", "kd_tail": "drop"}, "kd_tail drop .* kd_topk_of student"),
        ({"kd_ratio": 1.0, "kd_tail": "policy_gradient"}, "kd_tail policy_gradient .* kd_topk_of student"),
        ({**OPTIONS, "lmbda": 1.5}, "lmbda must lie"),
    ],
)
def test_what_it_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        TrainConfig(model_name_or_path="m", data=("d",), **options)
    with pytest.raises(InputError, match=r"rollout\.max_tokens"):
        RolloutOptions(max_tokens=0)
