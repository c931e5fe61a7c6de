"""A trained model is saved in the data type of the checkpoint that it began from; what is resumed from is float32."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import NAMES, convert, sign, stored_dtypes
from support.tiny_pair import TinyPair
from support.training_runs import ROWS, config_for
from transformers import AutoModelForCausalLM

from genssd import Engine
from genssd.distill.train.saving import find_stored_dtype, save_model
from genssd.distill.train.trainer import run_train
from genssd.engine.common.errors import CheckpointError
from genssd.engine.texts.text import Tokenizer

Write = Callable[..., Path]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_result_has_the_data_type_of_the_start(
    tiny_pair: TinyPair, write_rows: Write, tmp_path: Path, dtype: torch.dtype
) -> None:
    student = convert(tiny_pair.student, tmp_path / "student", dtype)
    data = write_rows(ROWS)
    config = config_for(
        tiny_pair, data, tmp_path / "run", model_name_or_path=str(student), save_steps=4, eval_data=(str(data),),
        allow_eval_overlap=True,
    )  # fmt: skip
    run_train(config)
    for name in ("run", "run/best"):
        assert stored_dtypes(tmp_path / name) == ({dtype}, NAMES[dtype])
    assert stored_dtypes(tmp_path / "run" / "checkpoint-4") == ({torch.float32}, "float32")
    size = (tmp_path / "run" / "model.safetensors").stat().st_size
    assert size == pytest.approx((student / "model.safetensors").stat().st_size, rel=0.01)
    # the result is the float32 weights of the last step, rounded once
    full = dataclasses.replace(
        config, output_dir=str(tmp_path / "full"), save_steps=6, eval_data=(), allow_eval_overlap=False
    )
    run_train(full)
    last = load_file(tmp_path / "full" / "checkpoint-6" / "model.safetensors")
    rounded = load_file(tmp_path / "run" / "model.safetensors")
    assert all(torch.equal(last[name].to(dtype), rounded[name]) for name in rounded)
    assert any(not torch.equal(last[name], rounded[name].float()) for name in rounded)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run", dtype="auto")
    assert model.dtype == dtype
    Engine.from_pretrained(student=tmp_path / "run", memory_bytes=1 << 22).generate(
        ["1"], model="student", max_tokens=2
    )
    # resumed from float32 weights: the same bits
    (tmp_path / "resumed").mkdir()
    (tmp_path / "resumed" / "checkpoint-4").symlink_to(tmp_path / "run" / "checkpoint-4")
    run_train(
        dataclasses.replace(
            config, output_dir=str(tmp_path / "resumed"), save_steps=None, resume_from_checkpoint="last"
        )
    )
    resumed = load_file(tmp_path / "resumed" / "model.safetensors")
    assert all(torch.equal(resumed[name], rounded[name]) for name in rounded)


def test_merged_adapters_have_it_too(tiny_pair: TinyPair, write_rows: Write, tmp_path: Path) -> None:
    student = convert(tiny_pair.student, tmp_path / "student", torch.bfloat16)
    config = config_for(
        tiny_pair, write_rows(ROWS), tmp_path / "run", model_name_or_path=str(student), use_peft=True, save_steps=3
    )
    run_train(config)
    assert stored_dtypes(tmp_path / "run") == ({torch.bfloat16}, "bfloat16")
    adapter = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in adapter.values()} == {torch.float32}
    path = tmp_path / "run" / "checkpoint-6" / "adapter" / "adapter_model.safetensors"
    resumed = dataclasses.replace(config, resume_from_checkpoint="last")
    run_train(resumed)
    assert all(
        torch.equal(value, adapter[name])
        for name, value in load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors").items()
    )
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match=r"adapter/adapter_model\.safetensors is damaged: .*checkpoint-3$"):
        run_train(resumed)


def test_weights_of_a_checkpoint_that_are_rounded_are_refused(
    tiny_pair: TinyPair, write_rows: Write, tmp_path: Path
) -> None:
    config = config_for(tiny_pair, write_rows(ROWS), tmp_path / "run", save_steps=6)
    run_train(config)
    path = tmp_path / "run" / "checkpoint-6"
    tensors = load_file(path / "model.safetensors")
    save_file({k: v.bfloat16() for k, v in tensors.items()}, path / "model.safetensors", metadata={"format": "pt"})
    sign(path)
    with pytest.raises(CheckpointError, match=r"the weights are torch\.bfloat16, not float32; there is no checkpoint"):
        run_train(dataclasses.replace(config, resume_from_checkpoint="last"))


def test_the_data_type_that_most_weights_have_counts(tiny_pair: TinyPair, tmp_path: Path) -> None:
    student = convert(tiny_pair.student, tmp_path / "student", torch.bfloat16)
    tensors = load_file(student / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float()
    save_file(tensors, student / "model.safetensors", metadata={"format": "pt"})
    assert find_stored_dtype(student) == torch.bfloat16


def test_weights_beyond_float16_are_saved_in_float32(
    tiny_pair: TinyPair, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_pair.student, dtype=torch.float32)
    with torch.no_grad():
        model.get_parameter("model.norm.weight")[3] = 1e5
    with caplog.at_level(logging.WARNING, "genssd"):
        save_model(model, Tokenizer(tiny_pair.student), tmp_path / "saved", dtype=torch.float16)
    assert "a weight is 100000, beyond float16: the model is saved in float32" in caplog.text
    assert stored_dtypes(tmp_path / "saved") == ({torch.float32}, "float32")
