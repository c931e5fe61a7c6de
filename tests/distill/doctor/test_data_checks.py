"""Findings about the data: rows, reference answers, lengths, and questions of the exam."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from support.doctor import EXAMPLES, PROBLEMS, detail_of, one, open_for, settings_of, write_rows
from support.tiny_pair import TinyPair
from support.toys import save_checkpoint

from genssd.distill.data.example_files import read_examples
from genssd.distill.data.problems import read_usable_problems
from genssd.distill.doctor.data_checks import check_answers, check_lengths, check_overlap, check_rows
from genssd.distill.doctor.inputs import Inputs, open_inputs
from genssd.distill.doctor.rows import has_responses
from genssd.distill.train.config import TrainSettings
from genssd.engine.common.errors import InputError
from genssd.engine.texts.text import Tokenizer


@pytest.fixture
def open_problems(tiny_pair: TinyPair, tmp_path: Path) -> Any:
    def open_(rows: list[dict[str, Any]], command: str = "select", limit: int = 100, **fields: Any) -> Inputs:
        data = write_rows(tmp_path / "d.jsonl", rows)
        pair = {"teacher": str(tiny_pair.teacher), "student": str(tiny_pair.student)}
        models = {"model": pair["student"]} if command == "evaluate" else pair
        return open_for(command, limit, **models, data=data, **fields)

    return open_


@pytest.fixture
def open_examples(tiny_pair: TinyPair, tmp_path: Path) -> Any:
    def open_(rows: list[dict[str, Any]], limit: int = 100, **fields: Any) -> Inputs:
        data = write_rows(tmp_path / "d.jsonl", rows)
        return open_for("train", limit, model_name_or_path=str(tiny_pair.student), data=(data,), **fields)

    return open_


def test_rows_that_can_be_used(open_problems: Any, open_examples: Any) -> None:
    assert one(check_rows(open_problems(PROBLEMS))).line == "5 of 5 rows can be used"
    assert one(check_rows(open_problems(PROBLEMS, limit=5))).line == "5 of 5 rows can be used"
    assert one(check_rows(open_problems(PROBLEMS, limit=3))).line == "3 of the first 3 rows can be used"
    broken = [*PROBLEMS[:2], {"answer": "1"}, {"answer": "2"}]
    assert one(check_rows(open_problems(broken, limit=3))).line == "2 of the first 3 rows can be used"
    assert one(check_rows(open_examples(EXAMPLES))).line == "5 of 5 rows can be used"
    assert one(check_rows(open_examples(EXAMPLES, limit=1))).line == "1 of the first 1 row can be used"


def test_rows_that_cannot_be_used_are_listed_by_line(open_problems: Any) -> None:
    rows = [*PROBLEMS, {"answer": "4"}, {"question": 3}]
    found = one(check_rows(open_problems(rows)))
    assert (found.level, found.line) == ("warning", "5 of 7 rows can be used")
    assert "d.jsonl, line 6: " in detail_of(found)
    assert "d.jsonl, line 7: " in detail_of(found)
    assert "docs/rows.md" in str(found.fix)


def test_a_training_refuses_what_it_cannot_read_and_leaves_out_what_is_cut_off(
    open_examples: Any, tiny_pair: TinyPair
) -> None:
    cut = {**EXAMPLES[0], "finish_reason": "length"}
    found = one(check_rows(open_examples([*EXAMPLES, cut])))
    assert (found.level, found.line) == ("warning", "5 of 6 rows can be used")
    assert "1 row left out: cut off" in detail_of(found)
    inputs = open_examples([*EXAMPLES, {"question": "a", "answer": "4"}])
    found = one(check_rows(inputs))
    assert (found.level, found.line) == ("error", "1 row cannot be read: train refuses them")
    assert "line 6: answer '4' is a final answer" in detail_of(found)
    with pytest.raises(InputError, match=r"line 6: answer '4' is a final answer"):
        read_examples(inputs.settings.data, Tokenizer(tiny_pair.student), max_length=99, statuses=("finished",))


def test_no_usable_row_is_an_error(open_examples: Any) -> None:
    found = one(check_rows(open_examples([{**EXAMPLES[0], "finish_reason": "length"}])))
    assert (found.level, found.line) == ("error", "none of 1 row can be used")


def test_rows_of_the_doctor_are_those_of_the_commands(open_problems: Any) -> None:
    inputs = open_problems([*PROBLEMS, {"answer": "4"}])
    data = read_usable_problems(inputs.settings.data[0])
    assert inputs.rows.problems == data.problems
    assert inputs.rows.faults == data.list_bad_rows()


ODD = [
    *PROBLEMS,
    {"question": "Which?", "answer": "\\frac{"},
    {"question": "Which?", "answer": r"\begin{cases} x & y \\ 1 & 2 \end{cases}"},
    {"question": "Which?", "answer": r"\frac{\pi}{2}"},
    {"question": "Prove it."},
]


def test_answers_that_cannot_be_verified_are_listed_by_line(open_problems: Any) -> None:
    found = one(check_answers(open_problems(PROBLEMS)))
    assert (found.level, found.line) == ("ok", "5 of 5 rows can be verified")
    inputs = open_problems(ODD)
    found = one(check_answers(dataclasses.replace(inputs, formula_seconds=60.0)))
    assert (found.level, found.line) == ("warning", "6 of 9 rows can be verified")
    reason = "math-verify finds no mathematics in the reference"
    lines = detail_of(found).splitlines()
    assert [line.partition("jsonl, ")[2][:6] for line in lines] == ["line 6", "line 7", "line 9"]
    assert reason in lines[1]
    assert lines[2].endswith("line 9: no reference answer")
    # without time for formulas, the second one counts as its own letters do
    assert one(check_answers(inputs)).line == "7 of 9 rows can be verified"
    found = one(check_answers(dataclasses.replace(inputs, formula_seconds=1e-9)))
    assert found.line == "7 of 9 rows can be verified; 3 formulas not tried, for lack of time"


def test_a_missing_answer_counts_where_it_is_needed(open_problems: Any) -> None:
    rows: list[dict[str, Any]] = [{"question": "Prove it."}, {"question": "And this."}]
    found = one(check_answers(open_problems(rows)))
    assert (found.level, found.line) == ("ok", "no row of 2 rows has a reference answer: responses are not judged")
    found = one(check_answers(open_problems(rows, "distill")))
    assert found.level == "error"
    assert "no answer of 2 rows can be verified, and distill needs them" in found.line
    assert "--no-require-correct" in str(found.fix)
    found = one(check_answers(open_problems([*PROBLEMS, *rows], "distill")))
    assert (found.level, found.line) == ("warning", "5 of 7 rows can be verified")
    found = one(check_answers(open_problems(rows, criterion="rationale_difficulty")))
    assert found.level == "error"


def test_lengths_that_fit(open_problems: Any, open_examples: Any) -> None:
    found = one(check_lengths(open_problems(PROBLEMS, max_tokens=100)))
    prompt = len("What is 1 + 1?user\nassistant\n\n") + 3  # and three control tokens
    assert found.level == "ok"
    assert f"prompts of up to {prompt} tokens and responses of up to 100 fit the positions" in found.line
    assert "in 512 positions" in detail_of(found)
    assert one(check_lengths(open_examples(EXAMPLES))).level == "ok"


def test_a_response_that_may_not_fit_is_a_warning_with_the_largest_that_does(open_problems: Any) -> None:
    found = one(check_lengths(open_problems(PROBLEMS, max_tokens=600)))
    longest = len(open_problems(PROBLEMS).prompts.ids[0]["teacher"])
    assert found.level == "warning"
    assert f"{512 - longest} positions are left, and max_tokens is 600" in found.line
    assert f"--max-tokens {512 - longest}," in str(found.fix)
    assert one(check_lengths(open_problems(PROBLEMS, max_tokens=512 - longest))).level == "ok"


def test_prompts_that_are_too_long_are_listed_by_line(open_problems: Any) -> None:
    long = {"question": "a" * 600, "answer": "1"}
    found = one(check_lengths(open_problems([*PROBLEMS, long], max_tokens=10)))
    assert found.level == "warning"
    assert found.line == "too long for a model: 1 prompt of 6 rows"
    assert "d.jsonl, line 6: " in detail_of(found)
    assert one(check_lengths(open_problems([long], max_tokens=10))).level == "error"


def test_examples_that_are_too_long_are_counted(open_examples: Any) -> None:
    rows = [*EXAMPLES, {"question": "a", "response": "b" * 600}]
    found = one(check_lengths(open_examples(rows)))
    assert found.level == "warning"
    assert "of which 512 are read; 1 longer row of 6 rows left out" in found.line
    assert "max_length" in str(found.fix)


def test_questions_of_the_exam_in_the_data(open_examples: Any, open_problems: Any, tmp_path: Path) -> None:
    other = write_rows(tmp_path / "other.jsonl", [{"question": "Else?", "response": "No."}])
    exam = write_rows(tmp_path / "exam.jsonl", [{"question": "what is  3 + 3", "response": "6"}])
    assert check_overlap(open_examples(EXAMPLES)) == []
    assert one(check_overlap(open_examples(EXAMPLES, eval_data=(other,)))).level == "ok"
    found = one(check_overlap(open_examples(EXAMPLES, eval_data=(exam,))))
    assert found.level == "error"
    assert "1 of 5 rows have a question of eval_data" in found.line
    assert "d.jsonl, line 3: " in detail_of(found)
    found = one(check_overlap(open_examples(EXAMPLES, eval_data=(exam,), allow_eval_overlap=True)))
    assert found.level == "warning"
    exam = write_rows(tmp_path / "exam.jsonl", [PROBLEMS[0]])
    found = one(check_overlap(open_problems(PROBLEMS, "distill", eval_data=exam, train=TrainSettings())))
    assert found.level == "error"


def test_files_that_cannot_be_read_are_faults(tiny_pair: TinyPair, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    fields = {"teacher": str(tiny_pair.teacher), "student": str(tiny_pair.student)}
    for name, reason in [("missing.jsonl", "No such file"), ("empty.jsonl", "has no rows")]:
        inputs = open_inputs(settings_of("select", **fields, data=str(tmp_path / name)), 10)
        (fault,) = inputs.faults
        assert (fault.name, fault.level) == ("data", "error")
        assert reason in fault.line
        assert check_rows(inputs) == check_answers(inputs) == check_lengths(inputs) == []


def test_prompts_that_a_template_refuses_are_rows_that_cannot_be_used(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "m")
    template = "{% for m in messages %}{% if 'bad' in m.content %}{{ raise_exception('no') }}{% endif %}"
    (tmp_path / "m" / "chat_template.jinja").write_text(template + "{{ m.content }}{% endfor %}")
    data = write_rows(tmp_path / "d.jsonl", [*PROBLEMS, {"question": "bad"}])
    found = one(check_rows(open_for("generate", teacher=str(tmp_path / "m"), data=data)))
    assert (found.level, found.line) == ("warning", "5 of 6 rows can be used")
    assert "d.jsonl, line 6: the chat template of" in detail_of(found)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"question": "a", "answer": "1"}, False),
        ({"question": "a", "answer": "He has 3 + 4 = 7 apples.\n#### 7"}, False),
        ({"question": "a", "response": "b"}, True),
        ({"prompt": "a", "completion": "b"}, True),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, True),
        ({"messages": [{"role": "user", "content": "a"}]}, False),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, True),
    ],
)
def test_responses_are_told_from_problems(row: dict[str, Any], expected: bool, tmp_path: Path) -> None:
    assert has_responses(write_rows(tmp_path / "d.jsonl", [row])) is expected
