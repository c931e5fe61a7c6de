"""Findings about what the models see: rendered prompts with marked control tokens, and what is trained on."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from support.doctor import EXAMPLES, PROBLEMS, detail_of, make_pair, one, open_for, write_rows
from support.templates import THINK_OPENER
from support.tiny_pair import TinyPair
from support.toys import CHATML, save_checkpoint

from genssd.distill.doctor.findings import Piece, join_pieces
from genssd.distill.doctor.inputs import open_inputs
from genssd.distill.doctor.settings import Settings
from genssd.distill.doctor.text_checks import SHOWN, check_masks, check_templates, cut_middle
from genssd.distill.doctor.thinking_checks import check_thinking
from genssd.engine.texts.text import Tokenizer

SWITCHED = CHATML + "{% if add_generation_prompt and enable_thinking %}<think>\n{% endif %}"


def models_of(*directories: str) -> Settings:
    return Settings(models=dict(zip(("teacher", "student"), directories, strict=False)))  # type: ignore[arg-type]


def test_both_templates_are_rendered_on_the_first_row(tiny_pair: TinyPair, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "d.jsonl", [{"question": "Why <|im_end|>?"}, *PROBLEMS])
    pair = {"teacher": str(tiny_pair.teacher), "student": str(tiny_pair.student)}
    teacher, student = check_templates(open_for("select", **pair, data=data))
    tokenizer = Tokenizer(tiny_pair.teacher)
    ids = tokenizer.encode_prompt([{"role": "user", "content": "Why <|im_end|>?"}])
    assert teacher.line == f"{data}, line 1, {len(ids)} tokens"
    assert detail_of(teacher) == "<|im_start|>user\nWhy <|im_end|>?<|im_end|>\n<|im_start|>assistant\n"
    # the name in the question is text, that of the template a control token
    assert [piece.text for piece in teacher.detail if piece.is_control] == [
        "<|im_start|>",
        "<|im_end|>",
        "<|im_start|>",
    ]
    assert student.line.endswith("the same text as the teacher's")


def test_a_model_without_a_template_is_an_error_for_messages_only(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "m")
    (tmp_path / "m" / "chat_template.jinja").unlink()
    model = str(tmp_path / "m")
    found = one(check_templates(open_inputs(models_of(model), 1)))
    assert found.level == "error"
    assert "has no chat template" in found.line
    assert "chat_template.jinja" in str(found.fix)
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": "2 + 2 =", "completion": "4"}])
    found = one(check_templates(open_for("train", model_name_or_path=model, data=(rows,))))
    assert (found.level, found.line) == ("ok", "there is none: the rows must be text, not messages")
    data = write_rows(tmp_path / "raw.jsonl", [{"prompt": "2 + 2 =", "answer": "4"}])
    found = one(check_templates(open_for("generate", teacher=model, data=data)))
    assert found.level == "ok"
    assert "the prompt is text" in found.line
    assert detail_of(found) == "teacher: 2 + 2 =\n"


def test_a_long_text_is_cut_in_its_middle_and_keeps_its_marks() -> None:
    pieces = [Piece("<a>", "control", True), Piece("x" * 5000), Piece("<b>", "control", True)]
    cut = cut_middle(pieces)
    text = join_pieces(cut)
    assert text.startswith("<a>xxx")
    assert text.endswith("xxx<b>")
    assert f"[... {5006 - SHOWN:,} characters ...]" in text
    assert len(text.replace(f" [... {5006 - SHOWN:,} characters ...] ", "")) == SHOWN
    assert [piece.text for piece in cut if piece.is_control] == ["<a>", "<b>"]
    assert cut_middle(pieces[:1]) == pieces[:1]


def test_what_is_trained_on_is_the_response_with_its_end(tiny_pair: TinyPair, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "d.jsonl", EXAMPLES)
    inputs = open_for("train", model_name_or_path=str(tiny_pair.student), data=(data,))
    found = one(check_masks(inputs))
    trained = join_pieces([piece for piece in found.detail if piece.mark == "trained"])
    untrained = join_pieces([piece for piece in found.detail if piece.mark == "untrained"])
    assert trained == "It is\n2<|im_end|>"
    assert untrained == "<|im_start|>user\nWhat is 1 + 1?<|im_end|>\n<|im_start|>assistant\n"
    # the template writes a line break after the end, which no model writes
    assert f"{len('It is2') + 2} of " in found.line
    assert "to <|im_end|> (id 256)" in found.line


def test_a_row_of_weight_zero_is_an_error(tiny_pair: TinyPair, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "d.jsonl", [{**EXAMPLES[0], "weight": 0.0}])
    found = one(check_masks(open_for("train", model_name_or_path=str(tiny_pair.student), data=(data,))))
    assert found.level == "error"
    assert "line 1: no token is trained on: all weights are 0" in found.line
    assert "a weight above 0" in str(found.fix)


def test_a_problem_stands_for_the_rows_that_distill_will_train_on(tiny_pair: TinyPair, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "d.jsonl", PROBLEMS)
    pair = {"teacher": str(tiny_pair.teacher), "student": str(tiny_pair.student)}
    found = one(check_masks(open_for("distill", **pair, data=data)))
    assert "with its answer in place of a response" in found.line
    assert join_pieces([piece for piece in found.detail if piece.mark == "trained"]) == "2<|im_end|>"


def save_with_template(directory: Path, template: str) -> str:
    save_checkpoint(directory)
    (directory / "chat_template.jinja").write_text(template)
    return str(directory)


def test_a_thought_that_one_prompt_alone_opens_is_trained(tmp_path: Path) -> None:
    teacher, student = make_pair(tmp_path)
    (tmp_path / "teacher" / "chat_template.jinja").write_text(THINK_OPENER)
    found = one(check_thinking(open_inputs(models_of(teacher, student), 1)))
    assert found.level == "ok"
    assert "the teacher's chat template opens a thought (<think>) in the prompt" in found.line
    assert "is trained to write '<think>" in found.line
    (tmp_path / "student" / "chat_template.jinja").write_text(THINK_OPENER)
    found = one(check_thinking(open_inputs(models_of(teacher, student), 1)))
    assert (found.level, "is trained" in found.line) == ("ok", False)


def test_thoughts_that_do_not_match_are_an_error(tmp_path: Path) -> None:
    teacher, student = make_pair(tmp_path)
    (tmp_path / "teacher" / "chat_template.jinja").write_text(THINK_OPENER)
    (tmp_path / "student" / "chat_template.jinja").write_text(
        CHATML + "{% if add_generation_prompt and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    )
    found = one(check_thinking(open_inputs(models_of(teacher, student), 1)))
    assert found.level == "error"
    assert "turn thinking on for the student by student_template_kwargs enable_thinking=true" in found.line


@pytest.mark.parametrize("value", [None, True, False])
def test_the_switches_of_a_template_are_listed_with_their_values(value: bool | None, tmp_path: Path) -> None:
    model = save_with_template(tmp_path / "m", SWITCHED)
    settings = models_of(model)
    if value is not None:
        chat = dataclasses.replace(settings.chat, template_kwargs={"enable_thinking": value})
        settings = dataclasses.replace(settings, chat=chat)
    found = one(check_thinking(open_inputs(settings, 1)))
    state = "on" if value else "off" if value is False else "off by default"
    assert f"has the switch enable_thinking, {state}" in found.line
    assert ("opens a thought" in found.line) is bool(value)


def test_a_switch_that_a_template_does_not_read_is_refused(tmp_path: Path) -> None:
    model = save_with_template(tmp_path / "m", CHATML)
    settings = models_of(model)
    chat = dataclasses.replace(settings.chat, template_kwargs={"enable_thinking": True})
    (fault,) = open_inputs(dataclasses.replace(settings, chat=chat), 1).faults
    assert "does not read enable_thinking" in fault.line
