"""Distillation in training: against formulas on transformers' logits, from memory and from the selection's top k."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.tiny_pair import TinyPair
from support.toys import VOCAB, save_checkpoint
from support.training_runs import ROWS, config_for, metrics, weights
from transformers import AutoModelForCausalLM

from genssd import Engine
from genssd.distill.data.example_files import read_examples
from genssd.distill.data.topk_store import locate_topk
from genssd.distill.select.config import SelectConfig
from genssd.distill.select.reselect import run_reselect
from genssd.distill.select.reselect_config import ReselectConfig
from genssd.distill.select.run import run_select
from genssd.distill.train import evaluation, forward
from genssd.distill.train.config import TrainConfig
from genssd.distill.train.loss_options import LossOptions
from genssd.distill.train.trainer import run_train
from genssd.engine.common.errors import CapacityError, InputError, NumericsError
from genssd.engine.decoding.chunk import Chunk

Write = Callable[..., Path]


def logits_of(directory: Path, ids: list[int]) -> torch.Tensor:
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].double()


def divergence(kind: str, teacher: torch.Tensor, student: torch.Tensor, mix: float) -> torch.Tensor:
    """Return the divergence of every row, by its definition."""
    log_q, log_p = teacher.log_softmax(-1), student.log_softmax(-1)
    q, p = log_q.exp(), log_p.exp()

    def kl(a: torch.Tensor, log_b: torch.Tensor) -> torch.Tensor:
        return (a * (a.log() - log_b)).sum(-1)

    if kind == "forward_kl":
        return kl(q, log_p)
    if kind == "reverse_kl":
        return kl(p, log_q)
    if kind == "jsd":
        m = (mix * q + (1 - mix) * p).log()
        return mix * kl(q, m) + (1 - mix) * kl(p, m)
    if kind == "skew_forward_kl":
        return kl(q, (mix * q + (1 - mix) * p).log())
    return kl(p, ((1 - mix) * q + mix * p).log())


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl"])
@pytest.mark.parametrize(("ratio", "temperature"), [(1.0, 1.0), (0.3, 2.0)])
def test_the_first_loss_is_the_formulas(
    tiny_pair: TinyPair, write_rows: Write, tmp_path: Path, kind: Any, ratio: float, temperature: float
) -> None:
    rows = ROWS[:3]
    config = config_for(
        tiny_pair, write_rows(rows), tmp_path / "run", max_steps=1, per_device_train_batch_size=3,
        teacher_model_name_or_path=str(tiny_pair.teacher), kd_ratio=ratio, kd_loss=kind, temperature=temperature,
        **({"beta": 0.3} if kind == "jsd" else {"alpha": 0.2} if "skew" in kind else {}),
    )  # fmt: skip
    run_train(config)
    tokenizer = tiny_pair.engine.tokenizer("student")
    divergences, cross_entropies = [], []
    for row in rows:
        prompt = tokenizer.encode(row["prompt"], special=True)
        ids = [*prompt, *tokenizer.encode(row["completion"], special=False), tokenizer.eos_token_id]
        q, p = (logits_of(path, ids)[len(prompt) - 1 : -1] for path in (tiny_pair.teacher, tiny_pair.student))
        divergences.append(divergence(kind, q / temperature, p / temperature, 0.3 if kind == "jsd" else 0.2))
        cross_entropies.append(-p.log_softmax(-1).gather(1, torch.tensor(ids[len(prompt) :])[:, None])[:, 0])
    (logged,) = metrics(tmp_path / "run")
    kd, ce = float(torch.cat(divergences).mean()), float(torch.cat(cross_entropies).mean())
    assert logged["divergence"] == pytest.approx(kd, rel=1e-4)
    assert logged["loss"] == pytest.approx(ratio * kd + (1 - ratio) * ce, rel=1e-4)
    if ratio == 1.0:
        assert "cross_entropy" not in logged
    else:
        assert logged["cross_entropy"] == pytest.approx(ce, rel=1e-4)


def test_a_student_that_is_the_teacher_has_nothing_to_learn(
    tiny_pair: TinyPair, write_rows: Write, tmp_path: Path
) -> None:
    config = config_for(
        tiny_pair, write_rows(ROWS), tmp_path / "run", max_steps=1, kd_ratio=1.0,
        teacher_model_name_or_path=str(tiny_pair.student),
    )  # fmt: skip
    run_train(config)
    (logged,) = metrics(tmp_path / "run")
    assert abs(logged["loss"]) < 1e-6
    assert logged["grad_norm"] < 1e-4


def selected(pair: TinyPair, write_rows: Write, out: Path, topk: int) -> Path:
    """Select trajectories of prompts to which each model applies its own chat template."""
    data = write_rows([{"question": f"{i}+{i}?"} for i in range(4)], "problems.jsonl")
    config = SelectConfig(
        teacher=str(pair.teacher), student=str(pair.student), data=str(data), output_dir=str(out), candidates=3,
        chunk=Chunk(tokens=3, until=None), max_tokens=9, teacher_topk=topk,
    )  # fmt: skip
    return run_select(config, pair.engine).path


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_selections_top_k_is_transformers_top_k(tiny_pair: TinyPair, write_rows: Write, tmp_path: Path) -> None:
    path = selected(tiny_pair, write_rows, tmp_path / "run", 5)
    for row in lines(path):
        place = locate_topk(row["teacher_topk"], path.parent, len(row["completion_ids"]), "here")
        assert place is not None
        top = place.read()
        ids = [*row["prompt_ids"], *row["completion_ids"]]
        logp = logits_of(tiny_pair.teacher, ids).log_softmax(-1)[len(row["prompt_ids"]) - 1 : -1]
        torch.testing.assert_close(top.logprob.double(), logp.topk(5).values, atol=1e-4, rtol=1 / 2048)
        torch.testing.assert_close(top.logprob.double(), logp.gather(1, top.ids), atol=1e-4, rtol=1 / 2048)


@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
@pytest.mark.parametrize("layout", ["pad", "tree"])
def test_the_whole_vocabulary_as_top_k_equals_the_teacher_in_memory(
    tiny_pair: TinyPair, write_rows: Write, tmp_path: Path, tail: Any, layout: Any
) -> None:
    path = selected(tiny_pair, write_rows, tmp_path / "run", VOCAB)
    shared = {"max_steps": 2, "kd_ratio": 0.5, "kd_loss": "jsd", "layout": layout, "statuses": ("finished", "length")}
    run_train(config_for(tiny_pair, path, tmp_path / "rows", kd_tail=tail, **shared))
    teacher = str(tiny_pair.teacher)
    run_train(config_for(tiny_pair, path, tmp_path / "memory", teacher_model_name_or_path=teacher, **shared))
    for one, other in zip(metrics(tmp_path / "rows"), metrics(tmp_path / "memory"), strict=True):
        for name in ("loss", "divergence", "cross_entropy", "grad_norm"):
            assert one[name] == pytest.approx(other[name], rel=2e-3)


def test_the_teacher_reads_the_prompt_its_own_way(tiny_pair: TinyPair, write_rows: Write, tmp_path: Path) -> None:
    tokenizer = tiny_pair.engine.tokenizer("student")
    row = {
        "completion_ids": [5, 6, 7],
        "student_prompt_ids": [1, 2],
        "prompt_ids": [3, 4, 5, 6],
        "tokenizer": tokenizer.fingerprint,
    }
    data = write_rows([row, {**row, "prompt_ids": [1, 2]}])
    first, second = read_examples([data], tokenizer, max_length=64, statuses=()).examples
    assert (first.teacher_prompt_ids, second.teacher_prompt_ids) == ((3, 4, 5, 6), ())
    config = config_for(
        tiny_pair, data, tmp_path / "run", max_steps=1, kd_ratio=1.0, teacher_model_name_or_path=str(tiny_pair.teacher)
    )
    run_train(config)
    divergences = []
    for prompt in ([3, 4, 5, 6], [1, 2]):
        q = logits_of(tiny_pair.teacher, [*prompt, 5, 6, 7])[len(prompt) - 1 : -1]
        divergences.append(divergence("forward_kl", q, logits_of(tiny_pair.student, [1, 2, 5, 6, 7])[1:-1], 0.0))
    assert metrics(tmp_path / "run")[0]["loss"] == pytest.approx(float(torch.cat(divergences).mean()), rel=1e-4)


@pytest.mark.parametrize("layout", ["pack", "tree"])
@pytest.mark.parametrize("kd", [0.0, 0.5])
def test_layouts_train_the_same(tiny_pair: TinyPair, write_rows: Write, tmp_path: Path, layout: Any, kd: float) -> None:
    """Every prompt occurs twice; the batches of a tree differ, so one batch holds all examples."""
    rows = [{**row, "completion": row["completion"] + more} for row in ROWS[:5] for more in ("", "x")]
    shared = {
        "num_train_epochs": 3,
        "per_device_train_batch_size": 10,
        "gradient_accumulation_steps": 1,
        "kd_ratio": kd,
    }
    if kd:
        shared["teacher_model_name_or_path"] = str(tiny_pair.teacher)
    run_train(config_for(tiny_pair, write_rows(rows), tmp_path / "pad", **shared))
    run_train(config_for(tiny_pair, write_rows(rows), tmp_path / layout, layout=layout, **shared))
    for one, other in zip(metrics(tmp_path / "pad"), metrics(tmp_path / layout), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-3)
        assert one["tokens"] == other["tokens"]


def test_a_tree_keeps_the_trajectories_of_a_prompt_together(
    tiny_pair: TinyPair, write_rows: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{**row, "completion": f"{row['completion']}{k}"} for k in range(2) for row in ROWS[:6]]
    batches = []
    real = forward.build_token_batch
    monkeypatch.setattr(
        forward, "build_token_batch", lambda rows, *rest: batches.append(list(rows)) or real(rows, *rest)
    )
    run_train(config_for(tiny_pair, write_rows(rows), tmp_path / "run", layout="tree", num_train_epochs=2))
    assert len(batches) == 12
    assert all(len({row.ids[: row.num_prompt] for row in batch}) == 1 for batch in batches)
    assert [b[0].ids for b in batches[:6]] != [b[0].ids for b in batches[6:]], "every epoch has an order of its own"


def test_chunk_weights_multiply_the_chunks_tokens(tiny_pair: TinyPair, write_rows: Write, tmp_path: Path) -> None:
    tokenizer = tiny_pair.engine.tokenizer("student")
    row = {"completion_ids": [5, 6, 7, 8], "student_prompt_ids": [1, 2], "tokenizer": tokenizer.fingerprint}
    chunks = [{"tokens": 3, "weight": 2.0}, {"tokens": 1, "weight": 0.5}]
    data = write_rows([{**row, "weight": 3.0, "chunks": chunks}])
    run_train(config_for(tiny_pair, data, tmp_path / "run", max_steps=1))
    nll = (
        -logits_of(tiny_pair.student, [1, 2, 5, 6, 7, 8])[1:-1]
        .log_softmax(-1)
        .gather(1, torch.tensor([[5], [6], [7], [8]]))[:, 0]
    )
    expected = float((nll * torch.tensor([2.0, 2.0, 2.0, 0.5])).sum() / 6.5)
    assert metrics(tmp_path / "run")[0]["loss"] == pytest.approx(expected, rel=1e-5)
    for wrong, message in (
        ([{"tokens": 3, "weight": 1.0}], "chunks have 3 tokens, the completion 4"),
        ([{"tokens": 4, "weight": -1.0}], "line 1, chunk 0: weight must be"),
        ([{"weight": 1.0}], "chunk 0 does not say how many tokens"),
    ):
        with pytest.raises(InputError, match=message):
            run_train(config_for(tiny_pair, write_rows([{**row, "chunks": wrong}]), tmp_path / "no", max_steps=1))


def test_what_it_refuses(tiny_pair: TinyPair, write_rows: Write, tmp_path: Path) -> None:
    data = write_rows(ROWS)
    with pytest.raises(InputError, match=r"line 1: no teacher_topk of this student.s tokenizer, which"):
        run_train(config_for(tiny_pair, data, tmp_path / "a", kd_ratio=0.5))
    other = tmp_path / "other"
    save_checkpoint(other, "llama", seed=9)
    file = other / "tokenizer.json"
    fields = json.loads(file.read_text())
    fields["model"]["vocab"] = {(name if name != "a" else "aa"): i for name, i in fields["model"]["vocab"].items()}
    file.write_text(json.dumps(fields))
    with pytest.raises(InputError, match=r"Take a loss over spans of text .*: kd_ratio 0"):
        run_train(config_for(tiny_pair, data, tmp_path / "b", kd_ratio=0.5, teacher_model_name_or_path=str(other)))
    for options, message in (
        ({"kd_ratio": 1.5}, "kd_ratio must lie"),
        ({"teacher_model_name_or_path": "t"}, "kd_ratio is 0"),
        ({"kd_ratio": 0.5, "temperature": 2.0}, "say nothing of the tail"),
        ({"kd_ratio": 0.5, "kd_loss": "jsd", "beta": 1.0}, "its limits are forward_kl and reverse_kl"),
        ({"alpha": 1.0}, "alpha"),
        ({"temperature": 0.0}, "temperature"),
    ):
        with pytest.raises(InputError, match=message):
            LossOptions(**options)  # type: ignore[arg-type]


def test_a_damaged_store_is_refused_before_the_training(tiny_pair: TinyPair, write_rows: Write, tmp_path: Path) -> None:
    path = selected(tiny_pair, write_rows, tmp_path / "run", 4)
    row = lines(path)[-1]
    store = tmp_path / "run" / "teacher_topk.bin"
    content = bytearray(store.read_bytes())
    start = row["teacher_topk"]["offset"]
    content[start] ^= 1
    store.write_bytes(content)
    message = rf"selections\.jsonl, line \d+: .*teacher_topk\.bin holds no top k at byte {start}: it is damaged, or not"
    with pytest.raises(InputError, match=message):
        run_train(config_for(tiny_pair, path, tmp_path / "out", kd_ratio=0.5, statuses=("finished", "length")))
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="cannot have k=0"):
        locate_topk({**row["teacher_topk"], "k": 0}, tmp_path, row["teacher_topk"]["tokens"], "here")


def test_a_resumed_selection_has_the_same_top_k(tiny_pair: TinyPair, write_rows: Write, tmp_path: Path) -> None:
    path = selected(tiny_pair, write_rows, tmp_path / "run", 4)
    journal, store = path.read_text(), (tmp_path / "run" / "teacher_topk.bin").read_bytes()
    path.write_text("".join(journal.splitlines(keepends=True)[:2]))
    (tmp_path / "run" / "teacher_topk.bin").write_bytes(store + b"torn")
    recorded = json.loads((tmp_path / "run" / "run.json").read_text())["config"]
    config = SelectConfig(
        **{name: recorded[name] for name in ("teacher", "student", "data", "output_dir", "candidates", "max_tokens")},
        chunk=Chunk(tokens=3, until=None), teacher_topk=4, resume=True,
    )  # fmt: skip
    run_select(config, tiny_pair.engine)
    assert path.read_text() == journal
    assert (tmp_path / "run" / "teacher_topk.bin").read_bytes() == store


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (("q_proj", "nope"), r"no module is called 'nope'; there are .*q_proj"),
        (("lm_head",), "lm_head is no part of a layer"),
        (("q_proj", "embed_tokens"), "embed_tokens is no part of a layer"),
        (("all-linear", "q_proj"), "no module is called 'all-linear'"),
    ],
)
def test_adapters_go_to_the_layers(
    tiny_pair: TinyPair, write_rows: Write, tmp_path: Path, targets: tuple[str, ...], message: str
) -> None:
    pytest.importorskip("peft")
    config = config_for(tiny_pair, write_rows(ROWS), tmp_path / "run", use_peft=True, lora_target_modules=targets)
    with pytest.raises(InputError, match=message):
        run_train(config)


def test_a_crash_while_the_best_is_written_is_survived(
    tiny_pair: TinyPair, write_rows: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_rows(ROWS)
    uninterrupted = config_for(
        tiny_pair, data, tmp_path / "whole", eval_data=(str(data),), allow_eval_overlap=True, eval_steps=2, save_steps=1
    )
    expected = run_train(uninterrupted)
    real = evaluation.write_json

    def crash(path: Path, value: Any) -> None:
        if path.name == "best.json" and value["step"] == 4:
            raise KeyboardInterrupt
        real(path, value)

    monkeypatch.setattr(evaluation, "write_json", crash)
    config = dataclasses.replace(uninterrupted, output_dir=str(tmp_path / "torn"))
    with pytest.raises(KeyboardInterrupt):
        run_train(config)
    monkeypatch.undo()
    assert json.loads((tmp_path / "torn" / "best" / "best.json").read_text())["step"] == 2
    shutil.rmtree(tmp_path / "torn" / "best")
    resumed = run_train(dataclasses.replace(config, resume_from_checkpoint="last"))
    assert resumed.best_eval_loss == expected.best_eval_loss
    one, other = (load_file(tmp_path / name / "best" / "model.safetensors") for name in ("whole", "torn"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    (tmp_path / "stale" / "best").mkdir(parents=True)
    with pytest.raises(InputError, match="holds a model already"):
        run_train(dataclasses.replace(uninterrupted, output_dir=str(tmp_path / "stale")))


def test_a_loss_on_held_out_rows_that_is_not_finite_stops(
    tiny_pair: TinyPair, write_rows: Write, tmp_path: Path
) -> None:
    data = write_rows(ROWS)
    config = config_for(
        tiny_pair,
        data,
        tmp_path / "run",
        eval_data=(str(data),),
        allow_eval_overlap=True,
        learning_rate=1e30,
        warmup_steps=0.0,
        max_steps=1,
    )
    with pytest.raises(NumericsError, match="the loss on eval_data is nan after step 1"):
        run_train(config)


def test_a_teacher_with_fewer_positions_limits_the_rows(tiny_pair: TinyPair, write_rows: Write, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "teacher", "llama", seed=5, max_position_embeddings=16)
    rows = [*ROWS[:2], {"prompt": "long", "completion": "x" * 20}]
    config = config_for(
        tiny_pair, write_rows(rows), tmp_path / "run", kd_ratio=1.0, max_steps=1,
        teacher_model_name_or_path=str(tmp_path / "teacher"),
    )  # fmt: skip
    assert run_train(config).left_out == {"longer than 16 tokens": 1}


def test_adapters_alone_are_trained_and_merged(tiny_pair: TinyPair, write_rows: Write, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    data = write_rows(ROWS)
    config = config_for(
        tiny_pair,
        data,
        tmp_path / "run",
        use_peft=True,
        lora_r=4,
        num_train_epochs=4,
        eval_data=(str(data),),
        allow_eval_overlap=True,
    )
    run_train(config)
    before, after = weights(tiny_pair.student), weights(tmp_path / "run")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all("proj" in name for name in changed)
    base: Any = AutoModelForCausalLM.from_pretrained(tiny_pair.student, dtype=torch.float32)
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "run" / "adapter").merge_and_unload().state_dict()
    for name in before:
        torch.testing.assert_close(adapted[name], after[name], atol=1e-6, rtol=1e-5)
    assert all("lora" in name for name in load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors"))
    logged = metrics(tmp_path / "run")
    losses = [row["loss"] for row in logged if "loss" in row]
    assert losses[-1] < losses[0]
    engine = Engine.from_pretrained(student=tmp_path / "run", memory_bytes=1 << 22)
    assert engine.generate(["1+1="], model="student", max_tokens=2)


def test_training_of_adapters_resumes_exactly(tiny_pair: TinyPair, write_rows: Write, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    config = config_for(
        tiny_pair, write_rows(ROWS), tmp_path / "uninterrupted", use_peft=True, save_steps=2, lora_dropout=0.1
    )
    run_train(dataclasses.replace(config, save_total_limit=None))
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "checkpoint-2").symlink_to(tmp_path / "uninterrupted" / "checkpoint-2")
    run_train(
        dataclasses.replace(config, output_dir=str(tmp_path / "part"), save_steps=None, resume_from_checkpoint="last")
    )
    uninterrupted, resumed = weights(tmp_path / "uninterrupted"), weights(tmp_path / "part")
    assert all(torch.equal(uninterrupted[name], resumed[name]) for name in uninterrupted)


def test_the_best_model_on_held_out_rows_is_kept(tiny_pair: TinyPair, write_rows: Write, tmp_path: Path) -> None:
    """The training data contradict the held-out rows, so that the loss on these rises in the end."""
    held_out = write_rows([{"prompt": "1+1=", "completion": "2"}], "held.jsonl")
    data = write_rows([{"prompt": "1+1=", "completion": "2"}, {"prompt": "1+1=", "completion": "77"}] * 2)
    config = config_for(
        tiny_pair,
        data,
        tmp_path / "run",
        eval_data=(str(held_out),),
        allow_eval_overlap=True,
        eval_steps=2,
        max_steps=12,
        learning_rate=2e-2,
    )
    summary = run_train(config)
    measured = {row["step"]: row["eval_loss"] for row in metrics(tmp_path / "run") if "eval_loss" in row}
    assert list(measured) == [2, 4, 6, 8, 10, 12]
    best = json.loads((tmp_path / "run" / "best" / "best.json").read_text())
    assert best["loss"] == summary.best_eval_loss == min(measured.values()) == measured[best["step"]]
    tokenizer = tiny_pair.engine.tokenizer("student")
    prompt = tokenizer.encode("1+1=", special=True)
    ids = [*prompt, *tokenizer.encode("2", special=False), tokenizer.eos_token_id]
    logp = logits_of(tmp_path / "run" / "best", ids).log_softmax(-1)[len(prompt) - 1 : -1]
    expected = -float(logp.gather(1, torch.tensor(ids[len(prompt) :])[:, None]).mean())
    assert best["loss"] == pytest.approx(expected, rel=1e-4)


def test_tensorboard_gets_what_the_journal_gets(tiny_pair: TinyPair, write_rows: Write, tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run_train(config_for(tiny_pair, write_rows(ROWS), tmp_path / "run", report_to="tensorboard"))
    events = accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    losses = [event.value for event in events.Scalars("train/loss")]
    assert losses == pytest.approx([row["loss"] for row in metrics(tmp_path / "run")], rel=1e-6)


def test_a_monitor_that_is_missing_is_named(
    tiny_pair: TinyPair, write_rows: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(InputError, match="pip install wandb"):
        run_train(config_for(tiny_pair, write_rows(ROWS), tmp_path / "run", report_to="wandb"))


def test_a_bad_batch_is_saved(tiny_pair: TinyPair, write_rows: Write, tmp_path: Path) -> None:
    config = config_for(tiny_pair, write_rows(ROWS), tmp_path / "run", learning_rate=1e30, warmup_steps=0.0)
    with pytest.raises(NumericsError, match=r"bad_batch\.jsonl"):
        run_train(config)
    rows = lines(tmp_path / "run" / "bad_batch.jsonl")
    assert len(rows) <= 4
    assert all("data.jsonl, line " in row["where"] for row in rows)


def test_too_little_memory_says_what_to_lower(
    tiny_pair: TinyPair, write_rows: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(forward, "compute_completion_states", fail)
    with pytest.raises(CapacityError, match="lower per_device_train_batch_size"):
        run_train(config_for(tiny_pair, write_rows(ROWS), tmp_path / "run"))


def test_a_config_is_its_losses_too(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="kd_ratio"):
        TrainConfig(model_name_or_path="m", data=("d",), kd_ratio=2.0)


def test_standardised_logits_are_learnt_from(tiny_pair: TinyPair, write_rows: Write, tmp_path: Path) -> None:
    shared = {"teacher_model_name_or_path": str(tiny_pair.teacher), "kd_ratio": 1.0, "kd_standardize": True}
    config = config_for(tiny_pair, write_rows(ROWS), tmp_path / "run", num_train_epochs=10, **shared)
    run_train(config)
    losses = [row["loss"] for row in metrics(tmp_path / "run")]
    assert losses[-1] < 0.9 * losses[0]
    with pytest.raises(InputError, match="kd_standardize is forward_kl"):
        dataclasses.replace(config, kd_loss="reverse_kl")


def test_pairs_are_learnt_towards_and_away(tiny_pair: TinyPair, write_rows: Write, tmp_path: Path) -> None:
    """(2 - beta) skew forward KL on the chosen, beta skew reverse KL on the rejected; cross-entropy on the chosen."""
    rows = [{"prompt": f"{i}+{i}=", "chosen": f"{2 * i}", "rejected": f"{3 * i}!"} for i in range(2)]
    config = config_for(
        tiny_pair, write_rows(rows), tmp_path / "run", max_steps=1, per_device_train_batch_size=4, kd_ratio=0.6,
        teacher_model_name_or_path=str(tiny_pair.teacher), kd_loss="distillm2", beta=0.7, alpha=0.2,
    )  # fmt: skip
    run_train(config)
    tokenizer = tiny_pair.engine.tokenizer("student")
    kd = ce = tokens = 0.0
    for row in rows:
        for name, kind, factor in (("chosen", "skew_forward_kl", 1.3), ("rejected", "skew_reverse_kl", 0.7)):
            prompt = tokenizer.encode(row["prompt"], special=True)
            ids = [*prompt, *tokenizer.encode(row[name], special=False), tokenizer.eos_token_id]
            q, p = (logits_of(path, ids)[len(prompt) - 1 : -1] for path in (tiny_pair.teacher, tiny_pair.student))
            kd += factor * float(divergence(kind, q, p, 0.2).sum())
            tokens += len(ids) - len(prompt)
            if name == "chosen":
                ce -= float(p.log_softmax(-1).gather(1, torch.tensor(ids[len(prompt) :])[:, None]).sum())
    (logged,) = metrics(tmp_path / "run")
    assert logged["divergence"] == pytest.approx(kd / tokens, rel=1e-4)
    assert logged["loss"] == pytest.approx((0.6 * kd + 0.4 * ce) / tokens, rel=1e-4)
    with pytest.raises(InputError, match="which kd_loss distillm2 alone learns from"):
        run_train(dataclasses.replace(config, kd_loss="skew_forward_kl", beta=0.5, output_dir=str(tmp_path / "no")))
    with pytest.raises(InputError, match=r"line 1, rejected: "):
        run_train(
            dataclasses.replace(
                config, data=(str(write_rows([{"prompt": "a", "chosen": "b", "rejected": ""}])),),
                output_dir=str(tmp_path / "bad"),
            )
        )  # fmt: skip


def test_our_own_pairs_come_with_their_ids(tiny_pair: TinyPair, write_rows: Write, tmp_path: Path) -> None:
    path = selected(tiny_pair, write_rows, tmp_path / "run", 0)
    run_reselect(ReselectConfig(run=str(path.parent), output_dir=str(tmp_path / "reselected"), memory_bytes=1 << 22))
    tokenizer = tiny_pair.engine.tokenizer("student")
    pairs = tmp_path / "reselected" / "pairs.jsonl"
    examples = read_examples([pairs], tokenizer, max_length=512, statuses=()).examples
    rows = lines(pairs)
    assert len(examples) == 2 * len(rows)
    for row, kept, dropped in zip(rows, examples[::2], examples[1::2], strict=True):
        assert (kept.rejected, dropped.rejected) == (False, True)
        assert list(kept.completion_ids) == row["chosen_token_ids"]
        assert list(dropped.completion_ids) == row["rejected_token_ids"]
        assert kept.input_ids[: kept.num_prompt] == dropped.input_ids[: dropped.num_prompt]
        assert tokenizer.decode(kept.input_ids).endswith(row["chosen"])
