"""The engine against transformers: right on the small pair, and wrong where one tensor is another one."""

from __future__ import annotations

import math
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.doctor import copy_of, one
from support.toys import save_checkpoint

from genssd.distill import small_pair
from genssd.distill.doctor import verify as verifying
from genssd.distill.doctor.findings import Finding
from genssd.distill.doctor.inputs import open_inputs
from genssd.distill.doctor.settings import Settings
from genssd.distill.doctor.verify import compare, verify, write_sequences
from genssd.distill.runs.engine_options import EngineOptions
from genssd.engine.models.transformers_loading import load_model
from genssd.engine.texts.text import Tokenizer

PAIR = Path(next(iter(small_pair.__path__)))
CPU = torch.device("cpu")


def test_the_small_pair_agrees() -> None:
    settings = Settings(models={"teacher": str(PAIR / "teacher"), "student": str(PAIR / "student")})
    found = verify(open_inputs(settings, 1), seconds=30.0)
    assert [(finding.name, finding.level) for finding in found] == [
        ("engine against transformers, teacher", "ok"),
        ("engine against transformers, student", "ok"),
    ]
    assert all(" in float32 differ by " in finding.line for finding in found)


def compare_with(engine_dir: Path, reference_dir: Path, dtype: str = "float32") -> Finding:
    """Compare the engine on one directory with transformers on another one."""
    tokenizer = Tokenizer(reference_dir)
    prompts = [tokenizer.encode_prompt([{"role": "user", "content": "What is 12 + 30?"}])]
    deadline = time.monotonic() + 60
    sequences = write_sequences(engine_dir, "student", prompts, EngineOptions(dtype=dtype), deadline)
    reference = load_model(reference_dir, tokenizer, CPU)
    return compare(sequences, reference, getattr(torch, dtype), "comparison")


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.self_attn.k_proj.weight",
        "model.layers.1.post_attention_layernorm.weight",
        "model.norm.weight",
    ],
)
def test_one_wrong_tensor_is_found(name: str, tmp_path: Path) -> None:
    """The engine reads a copy in which one tensor is perturbed by a tenth of its size; transformers the original."""
    wrong = copy_of(PAIR / "student", tmp_path / "wrong")
    tensors = load_file(wrong / "model.safetensors")
    noise = torch.randn(tensors[name].shape, generator=torch.Generator().manual_seed(0))
    tensors[name] += 0.1 * tensors[name].std().clamp_min(0.1) * noise
    save_file(tensors, wrong / "model.safetensors", metadata={"format": "pt"})
    found = compare_with(wrong, PAIR / "student")
    assert found.level == "error"
    assert "genssd env" in str(found.fix)


def test_bfloat16_is_held_to_what_transformers_loses_itself(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "m", "llama")
    assert compare_with(tmp_path / "m", tmp_path / "m", "bfloat16").level == "ok"
    other = tmp_path / "other"
    save_checkpoint(other, "llama", seed=3)
    assert compare_with(other, tmp_path / "m", "bfloat16").level == "error"


def test_nan_is_no_agreement() -> None:
    sequence = verifying.WrittenSequence(
        prompt_ids=(1,),
        response_ids=(5, 6),
        written=torch.tensor([math.nan, 0.0]).double(),
        scored=torch.zeros(2).double(),
    )
    reference = load_model(PAIR / "student", Tokenizer(PAIR / "student"), CPU)
    assert compare([sequence], reference, torch.float32, "comparison").level == "error"


def test_a_model_that_does_not_fit_is_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verifying, "available_bytes", lambda device: 1 << 10)
    found = one(verify(open_inputs(Settings(models={"student": str(PAIR / "student")}), 1), seconds=1.0))
    assert found.level == "warning"
    assert "not compared: the model takes" in found.line


def test_no_prompt_is_begun_after_the_time() -> None:
    prompts = [[5, 6], [7, 8], [9, 10]]
    options = EngineOptions(dtype="float32")
    sequences = write_sequences(PAIR / "student", "student", prompts, options, time.monotonic() - 1)
    assert {sequence.prompt_ids for sequence in sequences} == {(5, 6)}


def test_a_model_that_cannot_be_loaded_is_an_error(tmp_path: Path) -> None:
    broken = copy_of(PAIR / "student", tmp_path / "broken")
    inputs = open_inputs(Settings(models={"student": str(broken)}), 1)
    (broken / "model.safetensors").unlink()
    found = one(verify(inputs, seconds=1.0))
    assert found.level == "error"
    assert "has no safetensors weights" in found.line
