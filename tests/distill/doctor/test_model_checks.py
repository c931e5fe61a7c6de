"""Findings about models: who computes them, their weight files, the rows of their embeddings."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from safetensors.torch import load_file, save_file
from support.doctor import PROBLEMS, copy_of, detail_of, make_pair, one, open_for, write_rows
from support.tiny_pair import TinyPair
from support.toys import VOCAB, edit_json, save_model, save_tokenizer

from genssd.distill.doctor.inputs import open_inputs
from genssd.distill.doctor.model_checks import check_models, check_vocabularies
from genssd.distill.doctor.settings import Settings
from genssd.distill.train.config import TrainConfig


def test_the_architecture_the_size_and_who_computes_it_are_named(tiny_pair: TinyPair, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "d.jsonl", PROBLEMS)
    pair = {"teacher": str(tiny_pair.teacher), "student": str(tiny_pair.student)}
    teacher, student = check_models(open_for("select", **pair, data=data, dtype="float32"))
    decoder = tiny_pair.engine._resources.runners["teacher"].decoder
    assert (teacher.level, student.level) == ("ok", "ok")
    assert "qwen3" in teacher.line
    assert "in the engine's own decoder, in float32" in teacher.line
    assert f"{decoder.config.max_position_embeddings} positions" in teacher.line
    (student,) = check_models(open_for("train", model_name_or_path=pair["student"], data=(data,)))
    assert "llama" in student.line
    assert "trains in transformers" in student.line


def test_a_model_that_transformers_computes_is_slow(tiny_pair: TinyPair, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "d.jsonl", PROBLEMS)
    (found,) = check_models(open_for("evaluate", model=str(tiny_pair.student), data=data, backend="transformers"))
    assert found.level == "warning"
    assert "one sequence at a time" in found.line
    assert found.fix is not None


def test_weight_files_that_do_not_fit_the_config_are_an_error(tiny_pair: TinyPair, tmp_path: Path) -> None:
    model = copy_of(tiny_pair.student, tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    (found,) = check_models(open_inputs(Settings(models={"student": str(model)}), 1))
    assert found.level == "error"
    assert "the weights have no tensor model.norm.weight" in found.line
    (model / "model.safetensors").unlink()
    (found,) = check_models(open_inputs(Settings(models={"student": str(model)}), 1))
    assert found.level == "error"
    assert "has no safetensors weights" in found.line


def test_weights_of_the_hub_may_still_have_to_be_fetched(tiny_pair: TinyPair, tmp_path: Path) -> None:
    place = tmp_path / "snapshots" / "0123"
    place.parent.mkdir()
    copy_of(tiny_pair.student, place)
    (place / "model.safetensors").unlink()
    inputs = open_inputs(Settings(models={"student": str(place)}), 1)
    model = dataclasses.replace(inputs.models["student"], name="org/model")
    (found,) = check_models(dataclasses.replace(inputs, models={"student": model}))
    assert found.level == "warning"
    assert "not fetched yet" in found.line
    assert "hf download org/model" in str(found.fix)


def test_rows_of_padding_are_counted(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    save_model(tmp_path, "llama", vocab_size=VOCAB + 5)
    found = one(check_vocabularies(open_inputs(Settings(models={"student": str(tmp_path)}), 1)))
    assert found.level == "ok"
    assert f"{VOCAB + 5} rows, {VOCAB} token ids, 5 rows of padding that are never drawn" in found.line


def test_an_embedding_that_is_too_small_is_an_error(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    save_model(tmp_path, "llama", vocab_size=VOCAB - 2)
    found = one(check_vocabularies(open_inputs(Settings(models={"student": str(tmp_path)}), 1)))
    assert found.level == "error"
    assert f"largest id is {VOCAB - 1}, but the embedding has {VOCAB - 2} rows" in found.line
    assert "resize_token_embeddings" in str(found.fix)


def test_heads_of_different_widths_say_how_they_are_compared(tmp_path: Path) -> None:
    teacher, student = make_pair(tmp_path)
    save_model(tmp_path / "teacher", "qwen3", vocab_size=VOCAB + 5)
    inputs = open_inputs(Settings(models={"teacher": teacher, "student": student}), 1)
    found = one(check_vocabularies(inputs))
    assert found.level == "ok"
    assert "different numbers of rows" in found.line
    config = TrainConfig(
        model_name_or_path=student, data=("d",), kd_ratio=1.0, teacher_model_name_or_path=teacher, kd_vocabulary="drop"
    )
    settings = dataclasses.replace(inputs.settings, training=config)
    found = one(check_vocabularies(dataclasses.replace(inputs, settings=settings)))
    assert "the ids that one lacks are dropped" in detail_of(found)


def test_what_cannot_be_opened_is_named_and_the_other_model_is_examined(tiny_pair: TinyPair, tmp_path: Path) -> None:
    broken = copy_of(tiny_pair.teacher, tmp_path / "broken")
    edit_json(broken / "config.json", model_type="nonsense")
    inputs = open_inputs(Settings(models={"teacher": str(broken), "student": str(tiny_pair.student)}), 1)
    (fault,) = inputs.faults
    assert (fault.name, fault.level) == ("teacher", "error")
    assert "nonsense" in fault.line
    assert [finding.name for finding in check_models(inputs)] == ["student"]
