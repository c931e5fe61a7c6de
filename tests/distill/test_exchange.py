"""What we write, read by others unchanged: datasets and TRL."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.tiny_pair import TinyPair
from support.training_runs import config_for, metrics

from genssd import Chunk
from genssd.distill.select.config import SelectConfig
from genssd.distill.select.reselect import run_reselect
from genssd.distill.select.reselect_config import ReselectConfig
from genssd.distill.select.run import run_select
from genssd.distill.train.trainer import run_train

Write = Callable[..., Path]


@pytest.fixture
def selections(tiny_pair: TinyPair, write_rows: Write, tmp_path: Path) -> Path:
    data = write_rows([{"question": f"{i}+{i}?", "answer": str(2 * i)} for i in range(4)])
    config = SelectConfig(
        teacher=str(tiny_pair.teacher),
        student=str(tiny_pair.student),
        data=str(data),
        output_dir=str(tmp_path / "run"),
        candidates=3,
        chunk=Chunk(tokens=4),
        max_tokens=8,
        beam=2,
    )
    return run_select(config, tiny_pair.engine).path


def load(path: Path, cache: Path) -> Any:
    datasets = pytest.importorskip("datasets")
    return datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=str(cache))


@pytest.mark.slow
def test_datasets_loads_selections_and_decisions(selections: Path, tmp_path: Path) -> None:
    rows = load(selections, tmp_path / "cache")
    assert len(rows) == 4
    assert rows.column_names[:3] == ["messages", "prompt", "completion"]
    assert len(load(selections.with_name("decisions.jsonl"), tmp_path / "cache")) == 4


@pytest.mark.slow
def test_trl_trains_on_selections_unchanged(selections: Path, tiny_pair: TinyPair, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    rows = load(selections, tmp_path / "cache")
    settings = trl.SFTConfig(
        output_dir=str(tmp_path / "trl"),
        max_steps=1,
        per_device_train_batch_size=2,
        report_to="none",
        use_cpu=True,
        bf16=False,
        eos_token="<|im_end|>",
        save_strategy="no",
    )
    trainer = trl.SFTTrainer(model=str(tiny_pair.student), args=settings, train_dataset=rows)
    batch = next(iter(trainer.get_train_dataloader()))
    trained = batch["labels"][0] != -100
    assert 0 < int(trained.sum()) < len(trained), "TRL masks the prompt"
    assert trainer.train().global_step == 1


@pytest.fixture
def exports(selections: Path, tiny_pair: TinyPair, tmp_path: Path) -> Path:
    config = ReselectConfig(
        run=str(selections.parent), criterion="rsr", output_dir=str(tmp_path / "again"), memory_bytes=1 << 24
    )
    assert run_reselect(config).pairs > 0
    return tmp_path / "again"


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["DPO", "Reward"])
def test_trl_trains_on_pairs_unchanged(exports: Path, tiny_pair: TinyPair, tmp_path: Path, trainer: str) -> None:
    trl = pytest.importorskip("trl")
    rows = load(exports / "pairs.jsonl", tmp_path / "cache")
    settings = getattr(trl, f"{trainer}Config")(
        output_dir=str(tmp_path / "trl"),
        max_steps=1,
        per_device_train_batch_size=1,
        report_to="none",
        use_cpu=True,
        bf16=False,
        save_strategy="no",
    )
    made = getattr(trl, f"{trainer}Trainer")(model=str(tiny_pair.student), args=settings, train_dataset=rows)
    assert made.train().global_step == 1


@pytest.mark.slow
def test_datasets_loads_steps_in_the_stepwise_format(exports: Path, tmp_path: Path) -> None:
    """prompt, completions, labels: what trainers of process rewards read (TRL's own was taken out of it in 1.x)."""
    rows = load(exports / "steps.jsonl", tmp_path / "cache")
    assert rows.features["prompt"].dtype == "string"
    assert rows.features["completions"].feature.dtype == "string"
    assert rows.features["labels"].feature.dtype == "bool"
    assert all(len(row["completions"]) == len(row["labels"]) > 0 for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sft", "gkd"])
def test_losses_equal_trls_on_the_same_batch(
    tiny_pair: TinyPair, write_rows: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Cross-entropy of SFTTrainer and GKDTrainer's generalized JSD, over rows of unequal length.

    With a chat template that ends in the end of sequence: TRL trains what a template writes behind it, too.
    """
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    student = tmp_path / "student"
    shutil.copytree(tiny_pair.student, student)
    turn = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>"
    opening = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    (student / "chat_template.jinja").write_text("{% for m in messages %}" + turn + "{% endfor %}" + opening)
    rows = []
    for i in range(3):
        answer = {"role": "assistant", "content": "2" * (i + 1)}
        rows.append({"messages": [{"role": "user", "content": f"{i}+{i}?"}, answer]})
    options: dict[str, Any] = {}
    if kind == "gkd":
        options = {"teacher_model_name_or_path": str(tiny_pair.teacher), "kd_ratio": 1.0, "kd_loss": "jsd", "beta": 0.3}
    config = config_for(
        tiny_pair, write_rows(rows), tmp_path / "ours", max_steps=1, per_device_train_batch_size=3,
        model_name_or_path=str(student), **options,
    )  # fmt: skip
    run_train(config)
    settings = {
        "output_dir": str(tmp_path / "trl"), "max_steps": 1, "per_device_train_batch_size": 3, "report_to": "none",
        "use_cpu": True, "bf16": False, "save_strategy": "no", "logging_steps": 1,
    }  # fmt: skip
    tokenizer = transformers.AutoTokenizer.from_pretrained(student)
    tokenizer.pad_token = tokenizer.decode([0])
    model = transformers.AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    shared = {"model": model, "processing_class": tokenizer}
    if kind == "sft":
        asked = [{"prompt": row["messages"][:1], "completion": row["messages"][1:]} for row in rows]
        data, arguments = datasets.Dataset.from_list(asked), trl.SFTConfig(**settings, eos_token="<|im_end|>")
        trainer = trl.SFTTrainer(args=arguments, train_dataset=data, **shared)
    else:
        from trl.experimental.gkd import GKDConfig, GKDTrainer

        teacher = transformers.AutoModelForCausalLM.from_pretrained(tiny_pair.teacher, dtype=torch.float32)
        data, arguments = datasets.Dataset.from_list(rows), GKDConfig(**settings, lmbda=0.0, beta=0.3, temperature=1.0)
        trainer = GKDTrainer(args=arguments, teacher_model=teacher, train_dataset=data, **shared)
    trainer.train()
    theirs = next(row["loss"] for row in trainer.state.log_history if "loss" in row)
    assert metrics(tmp_path / "ours")[0]["loss"] == pytest.approx(theirs, rel=1e-4)
