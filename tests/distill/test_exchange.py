"""What we write, read by others unchanged: datasets and TRL."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import TinyPair

from genssd import Chunk
from genssd.distill.reselecting import ReselectConfig, run_reselect
from genssd.distill.selecting import SelectConfig, run_select

Write = Callable[..., Path]


@pytest.fixture
def selections(tiny_pair: TinyPair, write_rows: Write, tmp_path: Path) -> Path:
    data = write_rows([{"question": f"{i}+{i}?", "answer": str(2 * i)} for i in range(4)])
    config = SelectConfig(
        teacher=str(tiny_pair.teacher),
        student=str(tiny_pair.student),
        data=str(data),
        output_dir=str(tmp_path / "run"),
        candidates=2,
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
