"""Findings about memory and disk, beside what engines, trainings and journals really take."""

from __future__ import annotations

import dataclasses
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from support.doctor import EXAMPLES, PROBLEMS, detail_of, one, open_for, write_rows
from support.families import FAMILY_CASES, save_family
from support.tiny_pair import TinyPair
from support.toys import save_tokenizer

from genssd.distill.doctor.disk_checks import check_disk, find_existing
from genssd.distill.doctor.inputs import Inputs
from genssd.distill.doctor.memory_checks import check_caches, check_training
from genssd.distill.select.config import SelectConfig
from genssd.distill.select.run import run_select
from genssd.distill.train.activations import BatchShape, estimate_training_bytes
from genssd.distill.train.config import TrainConfig, TrainSettings
from genssd.engine.decoding.chunk import Chunk
from genssd.engine.models.transformers_loading import load_model, make_empty_model
from genssd.engine.texts.text import Tokenizer

Usage = namedtuple("Usage", ["total", "used", "free"])


@pytest.fixture
def fields(tiny_pair: TinyPair, tmp_path: Path) -> dict[str, Any]:
    """Fields of a config of select over problems."""
    data = write_rows(tmp_path / "d.jsonl", PROBLEMS)
    return {"teacher": str(tiny_pair.teacher), "student": str(tiny_pair.student), "data": data}


def set_free_memory(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    for module in ("engine.setup.memory", "engine.setup.memory_plan", "distill.doctor.memory_checks"):
        monkeypatch.setattr(f"genssd.{module}.available_bytes", lambda device: free)


def set_free_disk(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1 << 40, 0, free))


def test_the_caches_of_a_search(fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    set_free_memory(monkeypatch, 4 << 30)
    found = one(check_caches(open_for("select", **fields, max_tokens=100, memory_bytes=1 << 24)))
    assert found.level == "ok"
    assert "caches 16 MiB" in detail_of(found)
    assert "the longest prompt with its response takes 133 tokens" in detail_of(found)
    # 4 candidates of one prompt share the first 33 tokens and what is kept of the response
    assert "a prompt with all of its sequences at most 433" in detail_of(found)
    found = one(check_caches(open_for("generate", **fields, n=3, max_tokens=100, memory_bytes=1 << 24)))
    assert "at most 333" in detail_of(found)


def test_caches_that_are_too_small(fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    set_free_memory(monkeypatch, 4 << 30)
    found = one(check_caches(open_for("select", **fields, max_tokens=100, memory_bytes=1 << 16)))
    assert found.level == "warning"
    assert "the caches hold 64 tokens, and the longest prompt with its response takes 133" in found.line
    assert "--memory-bytes" in str(found.fix)
    found = one(check_caches(open_for("select", **fields, max_tokens=100, memory_bytes=1 << 15)))
    assert found.level == "error"  # not even the prompts fit
    found = one(check_caches(open_for("select", **fields, max_tokens=100, memory_bytes=1 << 18)))
    assert found.level == "warning"
    assert "less than one prompt with all of its sequences" in found.line
    found = one(check_caches(open_for("select", **fields, memory_bytes=1 << 10)))
    assert found.level == "error"
    assert "does not hold one page" in found.line


def test_memory_that_is_not_there(fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    set_free_memory(monkeypatch, 1 << 20)
    found = one(check_caches(open_for("select", **fields, max_tokens=100)))
    assert found.level == "error"
    assert "nothing is left for the key-value cache" in found.line
    set_free_memory(monkeypatch, 1 << 16)
    found = one(check_caches(open_for("select", **fields, max_tokens=100, memory_bytes=1 << 24)))
    assert found.level == "error"
    assert "loading takes" in found.line
    set_free_memory(monkeypatch, 1 << 27)
    found = one(check_caches(open_for("select", **fields, max_tokens=100, memory_bytes=1 << 28)))
    assert found.level == "warning"
    assert "may be killed when the caches fill" in found.line
    memory_bytes = int(str(found.fix).split()[1].rstrip(","))
    found = one(check_caches(open_for("select", **fields, max_tokens=100, memory_bytes=memory_bytes)))
    assert found.level == "ok"


def test_a_cache_of_transformers_is_not_known_before(fields: dict[str, Any]) -> None:
    found = one(check_caches(open_for("select", **fields, backend="transformers")))
    assert found.level == "ok"
    assert "is known when transformers has loaded the model" in found.line


@pytest.mark.parametrize(("kind", "options"), FAMILY_CASES[3:7])
def test_an_empty_model_has_the_estimate_of_the_loaded_one(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    save_family(tmp_path, kind, options)
    config = TrainConfig(model_name_or_path="m", data=("d",))
    batch = BatchShape(rows=3, length=40, completion_tokens=50)
    loaded = load_model(tmp_path, Tokenizer(tmp_path), torch.device("cpu"))
    empty = make_empty_model(tmp_path)
    assert {p.device.type for p in empty.parameters()} == {"meta"}
    estimates = [estimate_training_bytes(model, batch, config, bf16=False) for model in (loaded, empty)]
    assert estimates[0] == estimates[1] > 0
    assert sum(p.nbytes for p in loaded.parameters()) == sum(p.nbytes for p in empty.parameters())


def test_equal_examples_form_the_batch_of_their_number() -> None:
    for layout in ("pad", "pack"):
        config = TrainConfig(model_name_or_path="m", data=("d",), per_device_train_batch_size=3, layout=layout)  # type: ignore[arg-type]
        examples: Any = [_Example((0,) * 20, 8)] * 5
        assert BatchShape.of_equal(config, length=20, prompt=8) == BatchShape.of(examples, config)


@dataclasses.dataclass
class _Example:
    input_ids: tuple[int, ...]
    num_prompt: int


@pytest.fixture
def open_training(tiny_pair: TinyPair, tmp_path: Path) -> Any:
    def open_(**changes: Any) -> Inputs:
        data = write_rows(tmp_path / "t.jsonl", EXAMPLES)
        return open_for("train", model_name_or_path=str(tiny_pair.student), data=(data,), **changes)

    return open_


def test_a_training_that_fits(open_training: Any, fields: dict[str, Any]) -> None:
    found = one(check_training(open_training()))
    assert found.level == "ok"
    assert "with batches of 5 x " in found.line
    found = one(check_training(open_for("distill", **fields)))
    assert "with batches of 8 x 512 tokens" in found.line  # responses that are not written yet
    assert check_training(open_for("select", **fields)) == []


def test_a_training_that_does_not_fit_names_what_to_change(open_training: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found = one(check_training(open_training()))
    set_free_memory(monkeypatch, 1 << 20)
    found = one(check_training(open_training()))
    assert found.level == "error"
    ways = detail_of(found).splitlines()
    assert ways[0].startswith("--gradient-checkpointing: about ")
    assert ways[-1].startswith(
        "--gradient-checkpointing --per-device-train-batch-size 1 --gradient-accumulation-steps 8 --use-peft: about "
    )


def test_the_fix_of_a_training_fits(open_training: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the finding advises is enough: the same check is ok with it, in the same memory."""
    wide = open_training(attn_implementation="eager")
    free = 3 << 20
    set_free_memory(monkeypatch, free)
    found = one(check_training(wide))
    assert found.level in ("warning", "error")
    assert found.fix is not None
    assert found.fix.startswith("--gradient-checkpointing")
    words = found.fix.split()
    changes: dict[str, Any] = {"gradient_checkpointing": True, "use_peft": "--use-peft" in words}
    for name in ("per_device_train_batch_size", "gradient_accumulation_steps"):
        flag = f"--{name.replace('_', '-')}"
        if flag in words:
            changes[name] = int(words[words.index(flag) + 1])
    assert one(check_training(open_training(attn_implementation="eager", **changes))).level == "ok"


def test_the_teacher_in_memory_counts(open_training: Any, tiny_pair: TinyPair) -> None:
    found = one(check_training(open_training(kd_ratio=1.0, teacher_model_name_or_path=str(tiny_pair.teacher))))
    assert "of which the teacher's weights take " in found.line


def test_bf16_that_the_machine_lacks_is_an_error(open_training: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("genssd.distill.train.build.cpu_has_bf16", lambda: False)
    found = one(check_training(open_training(bf16=True)))
    assert found.level == "error"
    assert "no bf16 arithmetic" in found.line


def test_journals_stay_within_the_estimate(tiny_pair: TinyPair, fields: dict[str, Any], tmp_path: Path) -> None:
    """A search whose responses all have max_tokens writes no more than the check says, and not much less."""
    options = {"candidates": 3, "chunk": Chunk(tokens=8, until=None), "max_tokens": 24, "teacher_topk": 2}
    options |= {"teacher_states": "bfloat16"}
    config = SelectConfig(**fields, **options, output_dir=str(tmp_path / "run"))  # type: ignore[arg-type]
    run_select(config, tiny_pair.engine)
    taken = sum((tmp_path / "run" / name).stat().st_size for name in ("selections.jsonl", "decisions.jsonl"))
    found = one(check_disk(open_for("select", **fields, **options, output_dir=str(tmp_path / "other"))))
    assert found.level == "ok"
    lines = dict(line.split(": ") for line in detail_of(found).splitlines())
    kept = {"the teacher's most likely tokens", "the teacher's hidden states"}
    assert {"rows of 5 prompts", "decisions (every candidate)"} | kept == set(lines)
    stored = (tmp_path / "run" / "teacher_states.bin").stat().st_size
    assert stored - 5 * 4 == _bytes(lines["the teacher's hidden states"]) == 5 * 24 * 64 * 2, "64 values each"
    said = sum(_bytes(lines[name]) for name in ("rows of 5 prompts", "decisions (every candidate)"))
    assert taken <= 1.05 * said
    assert taken > said / 8


def _bytes(text: str) -> float:
    number, unit = text.split()
    return float(number) * {"bytes": 1, "KiB": 1 << 10, "MiB": 1 << 20}[unit]


def test_a_full_disk(open_training: Any, fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    set_free_disk(monkeypatch, 1 << 40)
    assert one(check_disk(open_training())).level == "ok"
    set_free_disk(monkeypatch, 1 << 10)
    found = one(check_disk(open_training(save_steps=5)))
    assert found.level == "error"
    assert "3 checkpoints: " in detail_of(found)
    assert "1 trained model: " in detail_of(found)
    assert "--save-total-limit" in str(found.fix)
    found = one(check_disk(open_for("select", **fields)))
    assert found.level == "warning"  # responses may be shorter
    found = one(check_disk(open_for("distill", **fields, train=TrainSettings())))
    assert found.level == "error"


def test_a_directory_that_cannot_be_written(open_training: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)
    found = one(check_disk(open_training()))
    assert found.level == "error"
    assert "cannot be written" in found.line


def test_the_nearest_directory_that_exists(tmp_path: Path) -> None:
    assert find_existing(tmp_path / "a" / "b") == tmp_path
    assert find_existing(tmp_path) == tmp_path


def test_the_estimate_counts_rows_beyond_those_that_were_read(fields: dict[str, Any], tmp_path: Path) -> None:
    found = one(check_disk(open_for("select", 2, **fields)))
    assert "rows of 5 prompts" in detail_of(found)
    found = one(check_disk(open_for("select", 2, **fields, limit=4)))
    assert "rows of 4 prompts" in detail_of(found)
