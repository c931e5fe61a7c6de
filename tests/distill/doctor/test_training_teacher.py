"""`genssd distill` with a teacher of its training: what the doctor says of it beside the teacher that writes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.byte_tokenizers import build, save
from support.doctor import PROBLEMS, one, open_for, settings_of, write_rows
from support.templates import THINK_OPENER
from support.tiny_pair import TinyPair
from support.toys import CHATML, save_checkpoint
from transformers import AutoModelForCausalLM

from genssd.distill.doctor.inputs import Inputs, find_max_length, open_inputs
from genssd.distill.doctor.memory_checks import check_training
from genssd.distill.doctor.model_checks import check_models, check_vocabularies
from genssd.distill.doctor.token_checks import check_tokenizers
from genssd.distill.select.config import SelectSettings
from genssd.distill.train.config import TrainSettings
from genssd.engine.common.amounts import format_bytes

TITLE = "teacher of the training"


@pytest.fixture
def open_distill(tiny_pair: TinyPair, tmp_path: Path) -> Callable[..., Inputs]:
    def open_(training_teacher: Path | str, **changes: Any) -> Inputs:
        models = {"teacher": str(tiny_pair.teacher), "student": str(tiny_pair.student)}
        models |= {role: changes.pop(role) for role in list(changes) if role in models}
        train = TrainSettings(**{"kd_ratio": 1.0, **changes}, teacher_model_name_or_path=str(training_teacher))
        return open_for("distill", **models, data=write_rows(tmp_path / "p.jsonl", PROBLEMS), train=train)

    return open_


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("foreign") / "gemma"
    return save(directory, build("gemma", size=700), seed=2, max_position_embeddings=128)


def test_another_teacher_of_the_training_is_examined(open_distill: Callable[..., Inputs], tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "other", "qwen3", seed=7, max_position_embeddings=96, vocab_size=300)
    inputs = open_distill(tmp_path / "other")
    assert [finding.name for finding in check_models(inputs)] == ["teacher", "student", TITLE]
    found = one(check_models(inputs), TITLE)
    assert (found.level, "beside the training of the student" in found.line) == ("ok", True)
    (rows,) = check_vocabularies(inputs)
    assert f"{TITLE}: 300 rows" in rows.line
    assert "the ids that both have" in str(rows.detail)
    assert [(f.name, f.level) for f in check_tokenizers(inputs)] == [
        ("tokenizers", "ok"),
        ("tokenizers of the training", "ok"),
    ]
    assert find_max_length(inputs) == 96
    found = one(check_training(inputs))
    assert "of which the teacher's weights take" in found.line
    assert "x 96 tokens" in found.line


def test_the_teacher_that_writes_may_be_that_of_the_training(
    open_distill: Callable[..., Inputs], tiny_pair: TinyPair
) -> None:
    inputs = open_distill(tiny_pair.teacher)
    assert inputs.training_teacher is inputs.teacher
    assert [finding.name for finding in check_models(inputs)] == ["teacher", "student"]
    assert [f.name for f in check_tokenizers(inputs)] == ["tokenizers", "tokenizers of the training"]
    assert "of which the teacher's weights take" in one(check_training(inputs)).line


def test_of_a_teacher_whose_states_are_stored_the_head_alone_counts(tiny_pair: TinyPair, tmp_path: Path) -> None:
    teacher = str(tiny_pair.teacher)
    train = TrainSettings(kd_ratio=1.0, kd_states=True, teacher_model_name_or_path=teacher)
    inputs = open_for(
        "distill", teacher=teacher, student=str(tiny_pair.student), data=write_rows(tmp_path / "p.jsonl", PROBLEMS),
        select=SelectSettings(teacher_states="bfloat16"), train=train,
    )  # fmt: skip
    rows, width = AutoModelForCausalLM.from_pretrained(teacher).get_output_embeddings().weight.shape
    assert f"of which the teacher's weights take {format_bytes(4 * rows * width)}" in one(check_training(inputs)).line


def test_a_teacher_of_the_training_with_another_tokenizer(open_distill: Callable[..., Inputs], foreign: Path) -> None:
    found = one(check_tokenizers(open_distill(foreign)), "tokenizers of the training")
    assert (found.level, "Take a loss over spans of text" in found.line) == ("error", True)
    found = one(check_tokenizers(open_distill(foreign, kd_loss="span_kl")), "tokenizers of the training")
    assert (found.level, "by its bytes" in found.line) == ("ok", True)


def test_on_policy_steps_need_a_student_that_writes_no_lead(
    open_distill: Callable[..., Inputs], foreign: Path, tmp_path: Path
) -> None:
    """The rows of the search will train the opening of the thought, which the foreign teacher's own prompt has."""
    models: dict[str, Any] = {}
    for role, template in (("teacher", THINK_OPENER), ("student", CHATML)):
        save_checkpoint(tmp_path / role, seed=3)
        (tmp_path / role / "chat_template.jinja").write_text(template)
        models[role] = str(tmp_path / role)
    for lmbda, level in ((0.0, "ok"), (0.5, "error")):
        inputs = open_distill(foreign, kd_loss="span_kl", lmbda=lmbda, **models)
        found = one(check_tokenizers(inputs), "tokenizers of the training")
        assert found.level == level
    assert "the student is trained to write '<think>\\n' that open or close the thought" in found.line
    models["student"] = models["teacher"]
    inputs = open_distill(foreign, kd_loss="span_kl", lmbda=0.5, **models)
    assert one(check_tokenizers(inputs), "tokenizers of the training").level == "ok"


def test_a_teacher_of_the_training_that_is_not_there_is_a_fault(tiny_pair: TinyPair, tmp_path: Path) -> None:
    train = TrainSettings(kd_ratio=1.0, teacher_model_name_or_path=str(tmp_path / "gone"))
    data = write_rows(tmp_path / "p.jsonl", PROBLEMS)
    settings = settings_of(
        "distill", teacher=str(tiny_pair.teacher), student=str(tiny_pair.student), data=data, train=train
    )
    (fault,) = open_inputs(settings, 5).faults
    assert (fault.name, fault.level) == (TITLE, "error")
    assert str(tmp_path / "gone") in fault.line
