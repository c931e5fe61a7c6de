"""What commands refuse after loading, or late: the doctor finds it before, in the words of the command."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.doctor import EXAMPLES, PROBLEMS, copy_of, make_pair, one, open_for, write_rows
from support.tiny_pair import TinyPair
from support.toys import save_checkpoint

from genssd.distill.doctor.data_checks import check_held_out, check_rows
from genssd.distill.doctor.findings import join_pieces
from genssd.distill.doctor.inputs import Inputs
from genssd.distill.doctor.model_checks import check_models, check_vocabularies
from genssd.distill.doctor.option_checks import check_options
from genssd.distill.doctor.run_checks import check_run
from genssd.distill.doctor.text_checks import check_templates
from genssd.distill.doctor.thinking_checks import check_thinking
from genssd.distill.doctor.token_checks import check_ends
from genssd.distill.evaluate.config import EvaluateConfig
from genssd.distill.evaluate.run import run_evaluate
from genssd.distill.rounds.config import DistillConfig
from genssd.distill.select.config import Calibrate, SelectConfig
from genssd.distill.select.run import run_select
from genssd.distill.train.config import TrainConfig, TrainSettings
from genssd.distill.train.trainer import run_train
from genssd.engine.common.errors import GenssdError, InputError

PAIR_ROW = {"prompt": "1 + 1 =", "chosen": "2", "rejected": "3"}


def save_without_template(place: Path) -> str:
    save_checkpoint(place, "llama", seed=3)
    (place / "chat_template.jinja").unlink()
    return str(place)


def save_with_windows(place: Path) -> str:
    layers = ["sliding_attention", "full_attention"]
    save_checkpoint(place, "qwen3", seed=3, layer_types=layers, sliding_window=8, use_sliding_window=True)
    return str(place)


@pytest.fixture
def team(tmp_path: Path) -> dict[str, Any]:
    """A team whose second teacher has no chat template, and chat rows."""
    teacher, student = make_pair(tmp_path)
    other = save_without_template(tmp_path / "other")
    data = write_rows(tmp_path / "p.jsonl", PROBLEMS)
    return {"teacher": (teacher, other), "student": student, "data": data, "output_dir": str(tmp_path / "run")}


def test_every_teacher_must_read_the_rows(team: dict[str, Any]) -> None:
    inputs = open_for("select", **team)
    finding = one(check_rows(inputs))
    assert (finding.level, finding.line) == ("error", "none of 5 rows can be used")
    assert f"line 1: {team['teacher'][1]} has no chat template" in join_pieces(finding.detail)
    assert [(f.name, f.level) for f in check_templates(inputs)] == [
        ("template of the teacher", "ok"),
        ("template of the student", "ok"),
        ("template of teacher 2", "error"),
    ]
    with pytest.raises(GenssdError, match="has no chat template"):  # the command's own refusal, after loading
        run_select(SelectConfig(**team, memory_bytes=1 << 24))


def test_further_teachers_are_in_the_findings_about_models(team: dict[str, Any]) -> None:
    inputs = open_for("select", **team)
    assert [finding.name for finding in check_models(inputs)] == ["teacher", "student", "teacher 2"]
    assert "teacher 2: " in one(check_vocabularies(inputs)).line
    assert "ends of teacher 2" in [finding.name for finding in check_ends(inputs)]
    assert [finding.name for finding in check_thinking(inputs)] == ["thinking", "thinking, teacher 2"]


def refuse(config: Any, run: Callable[[Any], object], inputs: Inputs) -> None:
    """Check that the command refuses its options, and the doctor finds an error with the same words."""
    with pytest.raises(GenssdError) as refused:
        run(config)
    finding = one(check_options(inputs))
    assert (finding.level, finding.line) == ("error", str(refused.value))


def write_broken(directory: Path) -> str:
    return write_rows(directory / "broken.jsonl", [{"nothing": 1}])


@pytest.mark.parametrize(
    "changes",
    [
        {"processes": 0},
        {"devices": "0"},
        {"generation_config": True},
        {"teacher_topk": 100_000},
        {"calibrate": "broken"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_options_of_select(changes: dict[str, Any], tiny_pair: TinyPair, tmp_path: Path) -> None:
    if "calibrate" in changes:
        changes = {"calibrate": Calibrate(data=write_broken(tmp_path))}
    fields = {
        "teacher": str(tiny_pair.teacher),
        "student": str(tiny_pair.student),
        "data": write_rows(tmp_path / "p.jsonl", PROBLEMS),
        "output_dir": str(tmp_path / "run"),
        "memory_bytes": 1 << 24,
        **changes,
    }
    refuse(SelectConfig(**fields), run_select, open_for("select", **fields))


def test_the_samples_of_an_evaluation_may_ask_for_the_models_own(tiny_pair: TinyPair, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "p.jsonl", PROBLEMS)
    fields = {"model": str(tiny_pair.student), "data": data, "samples": 1, "generation_config": True}
    refuse(EvaluateConfig(**fields), run_evaluate, open_for("evaluate", **fields))


@pytest.mark.parametrize(
    "changes",
    [{"resume_from_checkpoint": "last"}, {"layout": "pack"}],
    ids=lambda changes: next(iter(changes)),
)
def test_options_of_train(changes: dict[str, Any], tmp_path: Path) -> None:
    fields = {
        "model_name_or_path": save_with_windows(tmp_path / "windows"),
        "data": (write_rows(tmp_path / "e.jsonl", EXAMPLES),),
        "output_dir": str(tmp_path / "run"),
        **changes,
    }
    refuse(TrainConfig(**fields), run_train, open_for("train", **fields))


@pytest.mark.parametrize(
    ("row", "changes", "words"),
    [
        (PAIR_ROW, {}, "a preference pair, which kd_loss distillm2 alone learns from"),
        (EXAMPLES[0], {"kd_ratio": 1.0}, "no teacher_topk of this student's tokenizer"),
        (EXAMPLES[0], {"kd_ratio": 1.0, "kd_states": True}, "no teacher_states of this student's tokenizer"),
        (EXAMPLES[0], {"writer": "teacher"}, "line 1"),
        (EXAMPLES[0], {"require_correct": True}, "correct"),
    ],
    ids=["pair", "topk", "states", "writer", "correct"],
)
def test_rows_that_the_loss_cannot_use(
    row: dict[str, Any], changes: dict[str, Any], words: str, tiny_pair: TinyPair, tmp_path: Path
) -> None:
    fields = {
        "model_name_or_path": str(tiny_pair.student),
        "data": (write_rows(tmp_path / "e.jsonl", [row]),),
        "output_dir": str(tmp_path / "run"),
        **changes,
    }
    if "kd_states" in changes:
        fields["teacher_model_name_or_path"] = str(tiny_pair.teacher)
    finding = one(check_rows(open_for("train", **fields)))
    assert finding.level == "error"
    with pytest.raises(InputError) as refused:
        run_train(TrainConfig(**fields))
    assert words in str(refused.value)
    assert str(refused.value) in join_pieces(finding.detail)


def test_rows_of_eval_data(tiny_pair: TinyPair, tmp_path: Path) -> None:
    good = write_rows(tmp_path / "e.jsonl", EXAMPLES)
    for held_out, level in ((good, "ok"), (write_broken(tmp_path), "error")):
        fields = {"model_name_or_path": str(tiny_pair.student), "data": (good,), "eval_data": (held_out,)}
        finding = one(check_held_out(open_for("train", **fields, allow_eval_overlap=True)))
        assert finding.level == level
    problems = write_rows(tmp_path / "p.jsonl", PROBLEMS)
    unanswered = write_rows(tmp_path / "u.jsonl", [{"question": "Why?"}])
    for exam, level in ((problems, "ok"), (unanswered, "error")):
        config = DistillConfig(
            teacher=str(tiny_pair.teacher), student=str(tiny_pair.student), data=problems, eval_data=exam
        )
        fields = {"teacher": config.teacher, "student": config.student, "data": problems, "eval_data": exam}
        assert one(check_held_out(open_for("distill", **fields))).level == level


def test_a_teacher_of_a_training_renders_no_chats(tiny_pair: TinyPair, tmp_path: Path) -> None:
    """It reads the student's tokens, so that it may lack a chat template, and variables of the student's."""
    other = copy_of(tiny_pair.teacher, tmp_path / "other")
    (other / "chat_template.jinja").unlink()
    fields = {
        "model_name_or_path": str(tiny_pair.student),
        "data": (write_rows(tmp_path / "e.jsonl", EXAMPLES),),
        "teacher_model_name_or_path": str(other),
        "kd_ratio": 1.0,
    }
    inputs = open_for("train", **fields)
    assert [finding.name for finding in check_templates(inputs)] == ["template of the student"]
    assert [finding.name for finding in check_models(inputs)] == ["student", "teacher"]
    assert one(check_rows(inputs)).level == "ok"


def test_finished_work_without_resume_is_an_error(tiny_pair: TinyPair, tmp_path: Path) -> None:
    fields = {
        "teacher": str(tiny_pair.teacher),
        "student": str(tiny_pair.student),
        "data": write_rows(tmp_path / "p.jsonl", PROBLEMS[:1]),
        "output_dir": str(tmp_path / "run"),
        "max_tokens": 4,
        "memory_bytes": 1 << 24,
    }
    run_select(SelectConfig(**fields))
    assert json.loads((tmp_path / "run/run.json").read_text())["command"] == "select"
    assert one(check_run(open_for("select", **fields))).level == "error"
    assert one(check_run(open_for("select", **fields, resume=True))).level == "ok"
    with pytest.raises(InputError, match="holds finished work already"):
        run_select(SelectConfig(**fields))


def test_a_training_of_distill_is_examined_too(tiny_pair: TinyPair, tmp_path: Path) -> None:
    fields = {
        "teacher": str(tiny_pair.teacher),
        "student": save_with_windows(tmp_path / "windows"),
        "data": write_rows(tmp_path / "p.jsonl", PROBLEMS),
        "train": TrainSettings(layout="tree"),
    }
    finding = one(check_options(open_for("distill", **fields)))
    assert finding.level == "error"
    assert "layout tree cannot mask the sliding windows" in finding.line
