"""Findings about tokenizers and about the tokens that end a response."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.doctor import EXAMPLES, PROBLEMS, detail_of, make_pair, one, open_for, write_rows
from support.tiny_pair import TinyPair
from support.toys import edit_json, save_checkpoint, save_model
from transformers import AutoTokenizer

from genssd.distill.doctor.inputs import open_inputs
from genssd.distill.doctor.settings import Settings
from genssd.distill.doctor.token_checks import check_ends, check_tokenizers


def both(teacher: str, student: str) -> Any:
    return open_inputs(Settings(models={"teacher": teacher, "student": student}), 1)


def add_token(directory: str, name: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.add_tokens([name], special_tokens=True)
    tokenizer.save_pretrained(directory)


def test_one_tokenizer_in_both(tiny_pair: TinyPair) -> None:
    found = one(check_tokenizers(both(str(tiny_pair.teacher), str(tiny_pair.student))))
    assert (found.level, found.line) == ("ok", "the same in both: 259 tokens")
    assert check_tokenizers(open_inputs(Settings(models={"student": str(tiny_pair.student)}), 1)) == []


def test_a_token_that_the_student_lacks_is_a_warning(tmp_path: Path) -> None:
    teacher, student = make_pair(tmp_path)
    add_token(teacher, "<tool>")
    found = one(check_tokenizers(both(teacher, student)))
    assert found.level == "warning"
    assert "the student lacks 1 added token of the teacher" in found.line
    assert "<tool> (id 259 of the teacher): the student does not have it" in detail_of(found)
    assert "<tool>" in str(found.fix)


def test_other_vocabularies_are_read_by_bytes_or_an_error(tmp_path: Path) -> None:
    teacher, student = make_pair(tmp_path)
    path = tmp_path / "student" / "tokenizer.json"
    fields = json.loads(path.read_text())
    vocabulary = fields["model"]["vocab"]
    vocabulary["A"], vocabulary["B"] = vocabulary["B"], vocabulary["A"]
    path.write_text(json.dumps(fields))
    found = one(check_tokenizers(both(teacher, student)))
    assert found.level == "ok"
    assert "by its bytes" in found.line
    path.write_text(json.dumps({**fields, "decoder": None}))
    found = one(check_tokenizers(both(teacher, student)))
    assert found.level == "error"
    assert "have different vocabularies: id 32 is 'A' in one and 'B' in the other, id 33 is 'B' in one" in found.line
    assert "models of one family" in str(found.fix)


def test_the_ends_of_both_are_named(tiny_pair: TinyPair) -> None:
    found = check_ends(both(str(tiny_pair.teacher), str(tiny_pair.student)))
    assert [(f.level, f.line) for f in found] == [("ok", "it stops at <|im_end|> (id 256)")] * 2


def test_a_turn_that_ends_with_no_end_token_is_a_warning(tmp_path: Path) -> None:
    save_checkpoint(tmp_path)
    edit_json(tmp_path / "tokenizer_config.json", eos_token="<|pad|>")
    edit_json(tmp_path / "config.json", eos_token_id=257)
    edit_json(tmp_path / "generation_config.json", eos_token_id=257)
    found = one(check_ends(open_inputs(Settings(models={"student": str(tmp_path)}), 1)))
    assert found.level == "warning"
    assert "it stops at <|pad|> (id 257), but its chat template ends the assistant's turn with '<|im_end|>'" in (
        found.line
    )
    assert "generation_config.json" in str(found.fix)


@pytest.mark.parametrize(("role", "level"), [("student", "error"), ("teacher", "warning")])
def test_a_model_without_any_end_cannot_stop(role: Any, level: str, tmp_path: Path) -> None:
    save_checkpoint(tmp_path)
    for name in ("config.json", "generation_config.json"):
        edit_json(tmp_path / name, eos_token_id=None)
    edit_json(tmp_path / "tokenizer_config.json", eos_token=None)
    found = one(check_ends(open_inputs(Settings(models={role: str(tmp_path)}), 1)))
    assert found.level == level
    assert "no token ends a response" in found.line


def test_an_end_of_the_teacher_that_is_none_of_the_students(tmp_path: Path) -> None:
    teacher, student = make_pair(tmp_path)
    edit_json(tmp_path / "student" / "tokenizer_config.json", eos_token="<|pad|>")
    save_model(tmp_path / "student", "llama", eos_token_id=257)
    found = one(check_ends(both(teacher, student)), "ends of both")
    assert found.level == "warning"
    assert "responses of the teacher end with <|im_end|> (id 256), where the student does not stop yet" in found.line


def cut(count: int) -> list[dict[str, Any]]:
    """Return EXAMPLES of which so many are cut off."""
    return [{**row, "finish_reason": "length" if i < count else "stop"} for i, row in enumerate(EXAMPLES)]


@pytest.mark.parametrize(
    ("rows", "level", "line"),
    [
        (EXAMPLES, "ok", "5 of 5 examples end with an end token, which is trained on"),
        (cut(3), "warning", "2 of 5 examples end with an end token"),
        (cut(5), "error", "no example of 5 rows ends with an end token: the student would never stop"),
    ],
)
def test_whether_the_student_learns_to_stop(
    rows: list[dict[str, Any]], level: str, line: str, tiny_pair: TinyPair, tmp_path: Path
) -> None:
    data = write_rows(tmp_path / "d.jsonl", rows)
    fields = {"model_name_or_path": str(tiny_pair.student), "data": (data,), "statuses": ("finished", "length")}
    found = one(check_ends(open_for("train", **fields)), "learning to stop")
    assert found.level == level
    assert line in found.line
    assert (found.fix is None) == (level == "ok")


def test_problems_say_nothing_about_learning_to_stop(tiny_pair: TinyPair, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "d.jsonl", PROBLEMS)
    found = check_ends(open_for("evaluate", model=str(tiny_pair.student), data=data))
    assert [finding.name for finding in found] == ["ends of the student"]
