"""Supervised fine-tuning, checkpoints and resuming."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny_pair import TinyPair
from support.toys import VOCAB, save_tokenizer
from support.training_runs import ROWS, config_for, metrics, weights
from transformers import AutoModelForCausalLM, AutoTokenizer, CohereConfig, CohereForCausalLM

from genssd import Engine
from genssd.distill.data.examples import Example
from genssd.distill.train import forward
from genssd.distill.train.checkpoints import TrainerState
from genssd.distill.train.config import TrainConfig
from genssd.distill.train.schedule import Schedule, compute_learning_rate_factor
from genssd.distill.train.trainer import run_train
from genssd.engine.common.errors import CheckpointError, InputError, NumericsError
from genssd.engine.models.transformers_loading import load_model
from genssd.engine.texts.text import Tokenizer

Write = Callable[..., Path]


def test_one_step_equals_transformers(tiny_pair: TinyPair, write_rows: Write, tmp_path: Path) -> None:
    """Plain AdamW on transformers' own loss, masked by -100, over the same rows as one batch."""
    rows = ROWS[:4]
    config = config_for(tiny_pair, write_rows(rows), tmp_path / "run", max_steps=1, lr_scheduler_type="constant")
    run_train(dataclasses.replace(config, warmup_steps=0.0))
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_pair.student, dtype=torch.float32).train()
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_pair.student)
    ids = [[*tokenizer.encode(r["prompt"] + r["completion"]), tokenizer.eos_token_id] for r in rows]
    width = max(map(len, ids))
    batch = torch.tensor([row + [0] * (width - len(row)) for row in ids])
    labels = batch.clone()
    for i, (row, fields) in enumerate(zip(ids, rows, strict=True)):
        labels[i, : len(fields["prompt"])] = -100
        labels[i, len(row) :] = -100
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in ids])
    loss = model(input_ids=batch, attention_mask=mask, labels=labels).loss
    loss.backward()
    loss = loss.detach()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=0.0).step()
    (logged,) = metrics(tmp_path / "run")
    assert logged["loss"] == pytest.approx(float(loss), abs=1e-5)
    assert logged["tokens"] == int((labels != -100).sum())
    expected, trained = model.state_dict(), weights(tmp_path / "run")
    for name, value in expected.items():
        # Adam's first step is lr * sign(gradient): where the gradient is nearly 0 rounding decides its sign
        close = (value - trained[name]).abs() < 1e-5
        assert close.float().mean() > 0.999, name


def test_the_optimizer_is_adamw_with_decay_on_matrices_alone(
    tiny_pair: TinyPair, write_rows: Write, tmp_path: Path
) -> None:
    """Three steps on one batch, with an epsilon that keeps rounding from deciding."""
    options = {"adam_beta1": 0.7, "adam_beta2": 0.8, "adam_epsilon": 1e-2, "weight_decay": 0.3, "learning_rate": 0.05}
    config = config_for(
        tiny_pair, write_rows(ROWS[:4]), tmp_path / "run", max_steps=3,
        per_device_train_batch_size=4, gradient_accumulation_steps=1, lr_scheduler_type="constant", warmup_steps=0.0,
        **options,
    )  # fmt: skip
    run_train(config)
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_pair.student, dtype=torch.float32).train()
    tokenizer = tiny_pair.engine.tokenizer("student")
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.3},
            {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
        ],
        lr=0.05,
        betas=(0.7, 0.8),
        eps=1e-2,
    )
    for _ in range(3):
        total, count = torch.zeros(()), 0
        for row in ROWS[:4]:
            prompt = tokenizer.encode(row["prompt"], special=True)
            ids = [*prompt, *tokenizer.encode(row["completion"], special=False), tokenizer.eos_token_id]
            logp = model(torch.tensor([ids])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            total = total - logp.gather(1, torch.tensor(ids[len(prompt) :])[:, None]).sum()
            count += len(ids) - len(prompt)
        optimizer.zero_grad()
        (total / count).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    trained = weights(tmp_path / "run")
    for name, value in model.state_dict().items():
        torch.testing.assert_close(trained[name], value, atol=1e-4, rtol=1e-3)


def test_every_epoch_has_an_order_of_its_own_that_the_seed_decides(
    tiny_pair: TinyPair, write_rows: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[list[tuple[int, ...]]] = []
    real = forward.build_token_batch

    def record(rows: Any, *rest: Any) -> Any:
        batches.append([row.ids for row in rows])
        return real(rows, *rest)

    monkeypatch.setattr(forward, "build_token_batch", record)
    orders = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        batches.clear()
        run_train(config_for(tiny_pair, write_rows(ROWS), tmp_path / name, seed=seed, gradient_accumulation_steps=1))
        orders.append([ids for batch in batches for ids in batch])
    assert orders[0] == orders[1] != orders[2]
    first, second = orders[0][:11], orders[0][11:]
    assert sorted(first) == sorted(second)
    assert first != second


def test_a_weight_counts_a_row_so_many_times(tiny_pair: TinyPair, write_rows: Write, tmp_path: Path) -> None:
    """A row of weight 2 trains like two rows, one of weight 0 like none."""
    first, second, third = ({**row} for row in ROWS[:3])
    weighted = write_rows([{**first, "weight": 2}, second, {**third, "weight": 0.0}], "weighted.jsonl")
    repeated = write_rows([first, first, second], "repeated.jsonl")
    for name, data in (("a", weighted), ("b", repeated)):
        config = config_for(tiny_pair, data, tmp_path / name, max_steps=1, lr_scheduler_type="constant")
        run_train(dataclasses.replace(config, warmup_steps=0.0, per_device_train_batch_size=3))
    weighted_step, repeated_step = metrics(tmp_path / "a")[0], metrics(tmp_path / "b")[0]
    assert weighted_step["loss"] == pytest.approx(repeated_step["loss"], rel=1e-5)
    assert weighted_step["grad_norm"] == pytest.approx(repeated_step["grad_norm"], rel=1e-4)
    for weight in ("2", -1, True, float("nan")):
        with pytest.raises(InputError, match=r"line 1: weight must be a number"):
            run_train(config_for(tiny_pair, write_rows([{**first, "weight": weight}]), tmp_path / "c", max_steps=1))


def test_accumulation_equals_the_unsplit_batch(tiny_pair: TinyPair, write_rows: Write, tmp_path: Path) -> None:
    data = write_rows(ROWS)
    split = config_for(
        tiny_pair, data, tmp_path / "split", per_device_train_batch_size=1, gradient_accumulation_steps=4
    )
    unsplit = config_for(
        tiny_pair, data, tmp_path / "unsplit", per_device_train_batch_size=4, gradient_accumulation_steps=1
    )
    run_train(split)
    run_train(unsplit)
    for a, b in zip(metrics(tmp_path / "split"), metrics(tmp_path / "unsplit"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-4)
        assert a["tokens"] == b["tokens"]


def test_resumed_equals_uninterrupted_bit_for_bit(tiny_pair: TinyPair, write_rows: Write, tmp_path: Path) -> None:
    data = write_rows(ROWS)
    config = config_for(
        tiny_pair, data, tmp_path / "uninterrupted", num_train_epochs=3, save_steps=2, save_total_limit=None
    )
    run_train(config)
    assert [m["step"] for m in metrics(tmp_path / "uninterrupted")] == list(range(1, 10))
    for step in (2, 4):
        directory = tmp_path / f"from-{step}"
        directory.mkdir()
        # what a crash after step 5 would have left
        (directory / f"checkpoint-{step}").symlink_to(tmp_path / "uninterrupted" / f"checkpoint-{step}")
        logged = (tmp_path / "uninterrupted" / "metrics.jsonl").read_text().splitlines(keepends=True)
        (directory / "metrics.jsonl").write_text("".join(logged[:5]) + '{"step": 6, "lo')
        (directory / "checkpoint-6.tmp").mkdir()
        run_train(
            dataclasses.replace(
                config, output_dir=str(directory), save_steps=None, save_total_limit=2, resume_from_checkpoint="last"
            )
        )
        assert [(m["step"], m["loss"]) for m in metrics(directory)] == [
            (m["step"], m["loss"]) for m in metrics(tmp_path / "uninterrupted")
        ]
        resumed, uninterrupted = weights(directory), weights(tmp_path / "uninterrupted")
        assert all(torch.equal(resumed[name], uninterrupted[name]) for name in uninterrupted)


def test_the_output_is_a_directory_that_others_load(tiny_pair: TinyPair, write_rows: Write, tmp_path: Path) -> None:
    summary = run_train(config_for(tiny_pair, write_rows(ROWS), tmp_path / "run"))
    assert (tmp_path / "run" / "chat_template.jinja").exists()
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path / "run")
    assert tokenizer.chat_template
    assert summary.examples == len(ROWS)
    engine = Engine.from_pretrained(student=tmp_path / "run", memory_bytes=1 << 22)
    ((completion,),) = engine.generate(["1+1="], model="student", max_tokens=3)
    assert len(completion.token_ids) <= 3
    before, after = weights(tiny_pair.student), weights(tmp_path / "run")
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_training_learns(tiny_pair: TinyPair, write_rows: Write, tmp_path: Path) -> None:
    config = config_for(tiny_pair, write_rows(ROWS), tmp_path / "run", num_train_epochs=30, learning_rate=3e-3)
    run_train(config)
    losses = [m["loss"] for m in metrics(tmp_path / "run")]
    assert losses[-1] < 0.5 * losses[0]


def test_a_token_budget_ends_training(tiny_pair: TinyPair, write_rows: Write, tmp_path: Path) -> None:
    summary = run_train(config_for(tiny_pair, write_rows(ROWS), tmp_path / "run", max_train_tokens=70))
    steps = metrics(tmp_path / "run")
    assert steps[-1]["tokens"] == summary.tokens >= 70
    assert steps[-2]["tokens"] < 70


def test_only_the_newest_checkpoints_are_kept(tiny_pair: TinyPair, write_rows: Write, tmp_path: Path) -> None:
    run_train(config_for(tiny_pair, write_rows(ROWS), tmp_path / "run", save_steps=1, save_total_limit=2))
    assert sorted(p.name for p in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-5", "checkpoint-6"]


def test_bf16_trains_float32_weights(tiny_pair: TinyPair, write_rows: Write, tmp_path: Path) -> None:
    from genssd.engine.setup.memory import cpu_has_bf16

    config = config_for(tiny_pair, write_rows(ROWS), tmp_path / "run", bf16=True, device="cpu", max_steps=2)
    if not cpu_has_bf16():
        with pytest.raises(InputError, match="no bf16 arithmetic"):
            run_train(config)
        return
    run_train(config)
    plain = dataclasses.replace(config, bf16=False, output_dir=str(tmp_path / "plain"))
    run_train(plain)
    low, full = metrics(tmp_path / "run")[0]["loss"], metrics(tmp_path / "plain")[0]["loss"]
    assert low != full
    assert low == pytest.approx(full, rel=0.05)
    assert all(value.dtype == torch.float32 for value in weights(tmp_path / "run").values())


def test_gradient_checkpointing_changes_no_loss(tiny_pair: TinyPair, write_rows: Write, tmp_path: Path) -> None:
    data = write_rows(ROWS)
    for name, on in (("off", False), ("on", True)):
        run_train(config_for(tiny_pair, data, tmp_path / name, gradient_checkpointing=on, max_steps=2))
    off, on_ = metrics(tmp_path / "off"), metrics(tmp_path / "on")
    assert [m["loss"] for m in off] == pytest.approx([m["loss"] for m in on_], rel=1e-6)


@pytest.mark.slow
def test_compiled_layers_train_the_same(tiny_pair: TinyPair, write_rows: Write, tmp_path: Path) -> None:
    data = write_rows(ROWS)
    for name, on in (("off", False), ("on", True)):
        run_train(config_for(tiny_pair, data, tmp_path / name, torch_compile=on, layout="tree", max_steps=3))
    off, on_ = metrics(tmp_path / "off"), metrics(tmp_path / "on")
    assert [m["loss"] for m in off] == pytest.approx([m["loss"] for m in on_], rel=1e-4)
    one, other = weights(tmp_path / "off"), weights(tmp_path / "on")
    assert one.keys() == other.keys()


def test_a_loss_that_is_not_finite_stops(tiny_pair: TinyPair, write_rows: Write, tmp_path: Path) -> None:
    config = config_for(tiny_pair, write_rows(ROWS), tmp_path / "run", learning_rate=1e30, warmup_steps=0.0)
    with pytest.raises(
        NumericsError,
        match=r"the loss is (nan|inf) and its gradient (nan|inf) at step \d+ \(epoch \d+, batch \d+\); lower",
    ):
        run_train(config)


def test_the_schedule() -> None:
    def factor(before: float, after: float, decay: Literal["cosine", "linear", "constant"] = "cosine") -> float:
        return compute_learning_rate_factor(before, after, warmup=0.1, decay=decay)

    assert factor(0.0, 0.05) == 0.5
    assert factor(0.05, 0.1) == 1.0
    assert factor(0.1, 0.15) == 1.0
    assert factor(0.55, 0.6) == pytest.approx(0.5)
    assert 0.0 < factor(0.99, 1.0) < 0.001
    assert factor(0.55, 0.6, "linear") == pytest.approx(0.5)
    assert factor(0.55, 0.6, "constant") == 1.0


@pytest.mark.parametrize("warmup", [0.0, 0.25, 3, 20])
def test_the_warmup_is_a_number_of_steps_or_a_fraction_of_them(warmup: float) -> None:
    """As in transformers, whose first step has a learning rate of 0; ours has that of its second one."""
    steps = 10
    config = TrainConfig(model_name_or_path="m", data=("d",), warmup_steps=warmup, max_steps=steps, learning_rate=1.0)
    state = TrainerState(settings={})
    schedule = Schedule(config, state, [Example(input_ids=(1, 2, 3), num_prompt=1, where="row")], num_processes=1)
    rates = []
    for batch in schedule.iter_batches():
        rates.append(schedule.learning_rate(batch))
        state.step += 1
    num_warmup = warmup if warmup >= 1 else warmup * steps
    rising = [rate for i, rate in enumerate(rates) if i < num_warmup]
    assert rising == pytest.approx([min(1.0, (i + 1) / num_warmup) for i in range(len(rising))])
    assert all(after < before for before, after in pairwise(rates[len(rising) :]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be at least 1, not 0"),
        ({"max_steps": 3, "max_train_tokens": 5}, "not both"),
        ({"num_train_epochs": 0}, "num_train_epochs must be positive"),
        ({"warmup_steps": -1}, "warmup_steps must be a fraction of the training"),
        ({"warmup_steps": 2.5}, "or a number of steps, not 2.5"),
        ({"warmup_steps": 2, "max_train_tokens": 9}, "warmup_steps must be a fraction below 1 beside max_train_tokens"),
    ],
)
def test_bad_settings(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        TrainConfig(model_name_or_path="m", data=("d",), **changes)


def test_a_training_is_not_mixed_with_another(tiny_pair: TinyPair, write_rows: Write, tmp_path: Path) -> None:
    data = write_rows(ROWS)
    config = config_for(tiny_pair, data, tmp_path / "run", save_steps=2)
    run_train(config)
    with pytest.raises(InputError, match="holds checkpoint-6 of an earlier training; pass --resume"):
        run_train(config)
    resumed = dataclasses.replace(config, resume_from_checkpoint="last")
    changes: list[tuple[str, dict[str, Any]]] = [
        ("seed", {"seed": 1}),
        ("per_device_train_batch_size", {"per_device_train_batch_size": 1}),
        ("learning_rate", {"learning_rate": 1.0}),
        ("model_name_or_path", {"model_name_or_path": str(tiny_pair.teacher)}),
    ]
    for name, change in changes:
        with pytest.raises(InputError, match=f"checkpoint-6 was trained with {name}="):
            run_train(dataclasses.replace(resumed, **change))
    assert json.loads((tmp_path / "run" / "run.json").read_text())["config"]["learning_rate"] == config.learning_rate
    write_rows(ROWS[:-1])
    with pytest.raises(InputError, match="was trained with data="):
        run_train(resumed)


def test_bad_checkpoints(tiny_pair: TinyPair, write_rows: Write, tmp_path: Path) -> None:
    data = write_rows(ROWS)
    with pytest.raises(InputError, match=r"has no checkpoint to resume from; .* auto begins"):
        run_train(config_for(tiny_pair, data, tmp_path / "run", resume_from_checkpoint="last"))
    with pytest.raises(InputError, match=r"is no checkpoint: it has no trainer_state\.json"):
        run_train(config_for(tiny_pair, data, tmp_path / "run", resume_from_checkpoint=str(tmp_path)))
    with pytest.raises(CheckpointError, match="does not exist"):
        run_train(config_for(tiny_pair, data, tmp_path / "run", model_name_or_path="/nowhere"))


def test_a_finished_model_is_not_overwritten(tiny_pair: TinyPair, write_rows: Write, tmp_path: Path) -> None:
    config = config_for(tiny_pair, write_rows(ROWS), tmp_path / "run", max_steps=1)
    run_train(config)
    with pytest.raises(InputError, match="holds a model already; pass --overwrite to begin anew, or choose another"):
        run_train(config)
    (tmp_path / "run" / "run.json").unlink()  # of nobody that we know: nothing in it is removed
    for overwrite in (False, True):
        with pytest.raises(InputError, match="holds a model already; choose another output_dir"):
            run_train(dataclasses.replace(config, overwrite=overwrite))


def test_overwrite_removes_an_earlier_training_and_begins_anew(
    tiny_pair: TinyPair, write_rows: Write, tmp_path: Path
) -> None:
    data = write_rows(ROWS)
    output_dir = tmp_path / "run"
    earlier: dict[str, Any] = {"eval_data": (str(data),), "allow_eval_overlap": True, "eval_steps": 1}
    run_train(config_for(tiny_pair, data, output_dir, max_steps=4, save_steps=1, use_peft=True, **earlier))
    (output_dir / "notes.txt").write_text("mine")
    (output_dir / "chat_template.jinja").write_text("of another tokenizer")
    config = config_for(tiny_pair, data, output_dir, max_steps=2, seed=3, save_steps=2)
    with pytest.raises(
        InputError, match="holds checkpoint-4 of an earlier training; pass --resume-from-checkpoint last"
    ):
        run_train(config)
    with pytest.raises(InputError, match="overwrite removes it: give one of them"):
        dataclasses.replace(config, overwrite=True, resume_from_checkpoint="auto")
    for model in (output_dir, output_dir / "best", output_dir / "checkpoint-3"):
        with pytest.raises(InputError, match="overwrite would remove what the run reads: model_name_or_path"):
            run_train(dataclasses.replace(config, overwrite=True, model_name_or_path=str(model)))
    assert (output_dir / "best").is_dir()
    assert (output_dir / "checkpoint-4").is_dir()
    run_train(dataclasses.replace(config, overwrite=True))
    fresh = config_for(tiny_pair, data, tmp_path / "fresh", max_steps=2, seed=3, save_steps=2)
    run_train(fresh)
    names = {str(path.relative_to(tmp_path / "fresh")) for path in (tmp_path / "fresh").rglob("*")}
    assert {str(path.relative_to(output_dir)) for path in output_dir.rglob("*")} == names | {"notes.txt"}
    assert (output_dir / "notes.txt").read_text() == "mine"
    for name in ("model.safetensors", "config.json", "checkpoint-2/model.safetensors"):
        assert (output_dir / name).read_bytes() == (tmp_path / "fresh" / name).read_bytes()
    assert [row["step"] for row in metrics(output_dir)] == [1, 2]
    assert "--overwrite" not in (output_dir / "README.md").read_text()


def test_resuming_an_earlier_checkpoint_forgets_the_later(
    tiny_pair: TinyPair, write_rows: Write, tmp_path: Path
) -> None:
    config = config_for(tiny_pair, write_rows(ROWS), tmp_path / "run", save_steps=2, save_total_limit=None)
    run_train(config)
    first = str(tmp_path / "run" / "checkpoint-2")
    run_train(dataclasses.replace(config, resume_from_checkpoint=first, save_steps=None, save_total_limit=2))
    assert [p.name for p in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-2"]
    assert [m["step"] for m in metrics(tmp_path / "run")] == list(range(1, 7))


def test_missing_weights_are_not_replaced_by_random_ones(
    tiny_pair: TinyPair, write_rows: Write, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_pair.student, broken)
    tensors = load_file(broken / "model.safetensors")
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    config = config_for(tiny_pair, write_rows(ROWS), tmp_path / "run", model_name_or_path=str(broken))
    with pytest.raises(CheckpointError, match=r"the weights have no tensor model\.layers\.1\.mlp\.down_proj"):
        run_train(config)
    (broken / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(CheckpointError, match="cannot be read as safetensors"):
        run_train(config)


def test_a_head_that_is_more_than_a_product_is_refused(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    settings = {"vocab_size": VOCAB, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    CohereForCausalLM(
        CohereConfig(**settings, intermediate_size=96, num_hidden_layers=1, logit_scale=0.3)
    ).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="the head of cohere is more than a matrix product"):
        load_model(tmp_path, Tokenizer(tmp_path), torch.device("cpu"))


def test_rows_longer_than_the_positions_are_left_out(tiny_pair: TinyPair, write_rows: Write, tmp_path: Path) -> None:
    long = {"prompt": "a", "completion": "b" * 600}  # the model has 512 positions
    summary = run_train(config_for(tiny_pair, write_rows([*ROWS, long]), tmp_path / "run", max_steps=1))
    assert summary.left_out == {"longer than 512 tokens": 1}


def test_a_resumed_training_takes_the_recorded_number_of_threads(
    tiny_pair: TinyPair, write_rows: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The number follows from cores and model, or from OMP_NUM_THREADS; the rounding of torch depends on it."""
    used: list[int] = []
    data, directory = write_rows(ROWS[:4]), tmp_path / "run"
    config = config_for(tiny_pair, data, directory, save_steps=1, max_steps=2)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    before = torch.get_num_threads()
    run_train(config, lambda progress: used.append(torch.get_num_threads()))
    assert torch.get_num_threads() == before
    assert json.loads((directory / "run.json").read_text())["config"]["threads"] == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    resumed = dataclasses.replace(config, resume_from_checkpoint=str(directory / "checkpoint-1"))
    run_train(resumed, lambda progress: used.append(torch.get_num_threads()))
    assert used == [3, 3, 3]
    with pytest.raises(InputError, match=r"was trained with threads=3, not 2; resume with the same settings"):
        run_train(dataclasses.replace(resumed, threads=2))
    monkeypatch.delenv("OMP_NUM_THREADS")
    run_train(
        dataclasses.replace(config, output_dir=str(tmp_path / "tiny"), save_steps=None, max_steps=1),
        lambda progress: used.append(torch.get_num_threads()),
    )
    assert used[-1] == 1  # a tiny model gives work to no second thread
