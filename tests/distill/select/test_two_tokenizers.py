"""Rows of a selection on two tokenizers: training, `score` and `reselect` read the student's own tokens from them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support.byte_tokenizers import TEXTS, build, save
from support.pages import list_trees, read_page

from genssd.distill.data.example_files import read_examples
from genssd.distill.data.traces import read_traces
from genssd.distill.report.config import ReportConfig
from genssd.distill.report.run import run_report
from genssd.distill.score.config import ScoreConfig
from genssd.distill.score.run import run_score
from genssd.distill.select.config import SelectConfig
from genssd.distill.select.reselect import run_reselect
from genssd.distill.select.reselect_config import ReselectConfig
from genssd.distill.select.run import run_select
from genssd.distill.train.config import TrainConfig
from genssd.distill.train.trainer import run_train
from genssd.engine.common.errors import InputError
from genssd.engine.decoding.chunk import Chunk
from genssd.engine.texts.text import Tokenizer

CRITERIA = ("ppl", "ppl(norm='byte')", "divergence", "rsr", "lalp", "aslec_drop", "teacher_logprob", "length")
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}: {{ m.content }}<turn>{% endfor %}"
    "{% if add_generation_prompt %}[assistant: {% endif %}"
)
Rows = list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Run:
    """A finished selection of a byte-level teacher for a student in the style of SentencePiece."""

    teacher: Path
    student: Path
    directory: Path

    def rows(self, name: str = "selections.jsonl") -> Rows:
        return [json.loads(line) for line in (self.directory / name).read_text().splitlines()]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    root = tmp_path_factory.mktemp("run")
    teacher = save(root / "teacher", build("qwen"), template=TEMPLATE.replace("[", "# "), seed=1)
    student = save(root / "student", build("gemma"), template=TEMPLATE, seed=2)
    data = root / "data.jsonl"
    data.write_text("".join(json.dumps({"question": text[:30], "answer": "42"}) + "\n" for text in TEXTS[:3]))
    config = SelectConfig(
        teacher=str(teacher), student=str(student), data=str(data), output_dir=str(root / "out"), candidates=3, beam=2,
        chunk=Chunk(tokens=7, until=None), max_tokens=40, memory_bytes=1 << 24, dtype="float32",
        criterion="ppl(scope='trajectory')",
    )  # fmt: skip
    summary = run_select(config)
    assert (summary.prompts, summary.drifted, summary.failures) == (3, 0, ())
    return Run(teacher, student, root / "out")


def test_rows_carry_the_ids_of_both(run: Run) -> None:
    teacher, student = Tokenizer(run.teacher), Tokenizer(run.student)
    for row in run.rows():
        assert row["tokenizer"] == student.fingerprint
        assert row["prompt_ids"] == teacher.encode_prompt(row["prompt"])
        assert row["student_prompt_ids"] == student.encode_prompt(row["prompt"])
        for response in (row, *row["others"]):
            text = teacher.decode(response["teacher_ids"])
            completion = response["completion"]
            assert (completion if isinstance(completion, str) else completion[0]["content"]) == text
            assert sum(response["teacher_bytes"]) == sum(response["completion_bytes"])
            assert len(response["teacher_bytes"]) == len(response["teacher_ids"]) == len(response["teacher_logprobs"])
            assert len(response["completion_bytes"]) == len(response["completion_ids"])
            assert response["drifted"] is False
            if "\ufffd" not in text:
                assert student.decode(response["completion_ids"]) == text
        assert sum(chunk["tokens"] for chunk in row["chunks"]) == len(row["completion_ids"])


def test_training_reads_the_students_own_ids(run: Run, tmp_path: Path) -> None:
    examples = read_examples(
        [run.directory / "selections.jsonl"], Tokenizer(run.student), max_length=200, statuses=("finished", "length")
    ).examples
    assert [list(e.input_ids) for e in examples] == [r["student_prompt_ids"] + r["completion_ids"] for r in run.rows()]
    assert all(example.has_own_ids for example in examples)
    config = TrainConfig(
        model_name_or_path=str(run.student), data=(str(run.directory / "selections.jsonl"),), max_steps=1,
        output_dir=str(tmp_path / "trained"), per_device_train_batch_size=3, statuses=("finished", "length"),
    )  # fmt: skip
    run_train(config)
    (metrics,) = [json.loads(line) for line in (tmp_path / "trained" / "metrics.jsonl").read_text().splitlines()][-1:]
    losses = [row["score"] for row in run.rows()]  # exp of the mean negative log-probability of every response
    weights = [len(row["completion_ids"]) for row in run.rows()]
    mean = sum(w * math.log(loss) for w, loss in zip(weights, losses, strict=True)) / sum(weights)
    assert metrics["loss"] == pytest.approx(mean, rel=1e-3)
    with pytest.raises(InputError, match="different vocabularies"):
        run_train(
            TrainConfig(
                model_name_or_path=str(run.student), teacher_model_name_or_path=str(run.teacher), kd_ratio=0.5,
                data=(str(run.directory / "selections.jsonl"),), output_dir=str(tmp_path / "kd"),
                statuses=("finished", "length"),
            )
        )  # fmt: skip


def test_score_gives_the_values_of_the_search(run: Run, tmp_path: Path) -> None:
    config = ScoreConfig(
        student=str(run.student), data=(str(run.directory / "selections.jsonl"),), output_dir=str(tmp_path / "scores"),
        criteria=("ppl", "divergence", "ppl(norm='byte')"), memory_bytes=1 << 24, dtype="float32",
    )  # fmt: skip
    summary = run_score(config)
    assert summary.bad_rows == ()
    scores = [json.loads(line) for line in (tmp_path / "scores" / "scores.jsonl").read_text().splitlines()]
    responses = [response for row in run.rows() for response in (row, *row["others"])]
    assert [row["ppl"] for row in scores] == pytest.approx([response["score"] for response in responses], rel=1e-4)
    for row, response in zip(scores, responses, strict=True):
        num_bytes = sum(response["completion_bytes"])
        expected = math.exp(math.log(response["score"]) * len(response["completion_ids"]) / num_bytes)
        assert row["ppl(norm='byte')"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("criterion", [None, *CRITERIA])
def test_reselect_reads_the_decisions(run: Run, tmp_path: Path, criterion: str | None) -> None:
    summary = run_reselect(
        ReselectConfig(
            run=str(run.directory), criterion=criterion, output_dir=str(tmp_path / "r"), memory_bytes=1 << 24,
            dtype="float32",
        )
    )  # fmt: skip
    assert summary.prompts == 3
    if criterion is None:
        assert summary.differing == 0
        assert summary.largest_change < 1e-5
        pairs = [json.loads(line) for line in (tmp_path / "r" / "pairs.jsonl").read_text().splitlines()]
        examples = read_examples(
            [tmp_path / "r" / "pairs.jsonl"], Tokenizer(run.student), max_length=300, statuses=("finished",)
        ).examples
        assert len(examples) == 2 * len(pairs) > 0
        assert all("teacher_prompt_ids" not in pair for pair in pairs)


@pytest.mark.parametrize("criterion", ["divergence", "lalp", "ppl(norm='byte')", "random"])
def test_reselect_gives_the_values_of_a_search_by_the_criterion(run: Run, tmp_path: Path, criterion: str) -> None:
    recorded = json.loads((run.directory / "run.json").read_text())["config"]
    config = SelectConfig(
        teacher=str(run.teacher), student=str(run.student), data=recorded["data"], output_dir=str(tmp_path / "own"),
        candidates=3, chunk=Chunk(tokens=1, until=None), max_tokens=9, memory_bytes=1 << 24, dtype="float32",
        criterion=criterion,
    )  # fmt: skip
    run_select(config)
    decisions = [json.loads(line) for line in (tmp_path / "own" / "decisions.jsonl").read_text().splitlines()]
    assert any(candidate["provisional"] for row in decisions for candidate in row["candidates"])
    summary = run_reselect(
        ReselectConfig(run=str(tmp_path / "own"), output_dir=str(tmp_path / "r"), memory_bytes=1 << 24, dtype="float32")
    )
    assert (summary.differing, summary.prompts) == (0, 3)
    assert summary.largest_change < 1e-5


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("completion_bytes", [1], "completion_bytes must have"),
        ("completion_bytes", None, "completion_bytes must be a list of numbers of bytes"),
        ("teacher_bytes", "x", "teacher_bytes must be a list of numbers of bytes"),
        ("teacher_bytes", [-1], "teacher_bytes must be a list of numbers of bytes"),
        ("teacher_bytes", [1, 2], "the sum of teacher_bytes"),
        ("teacher_logprobs", [0.5], "teacher_logprobs must be a list of"),
    ],
)
def test_rows_with_other_numbers_are_refused(
    run: Run, write_rows: Callable[..., Path], field: str, value: object, message: str
) -> None:
    data = write_rows([{**run.rows()[0], field: value}])
    first, *_ = read_traces([data], Tokenizer(run.student), max_length=300)
    assert isinstance(first, str)
    assert re.search(rf"data\.jsonl, line 1.*{message}", first)


def _printable(text: str) -> str:
    return "".join(c for c in text if c.isascii() and c.isprintable())


def test_the_page_shows_such_a_run(run: Run, tmp_path: Path) -> None:
    summary = run_report(ReportConfig(run=(str(run.directory),), output=str(tmp_path / "page.html")))
    assert (summary.prompts, summary.faults) == (3, ())
    for row, (_, tree) in zip(run.rows(), list_trees(read_page(summary.path)), strict=True):
        assert all(box["teacher"] is None for box in tree["boxes"])
        for response, shown in zip((row, *row["others"]), tree["responses"], strict=True):
            path = [tree["boxes"][place] for place in shown["path"]]
            boxes = [box for box in path if not box["provisional"] or box is path[-1]]
            text = "".join(box["text"] for box in boxes).removesuffix("<end>")
            assert text
            completion = response["completion"]
            completion = completion if isinstance(completion, str) else completion[0]["content"]
            # random bytes: a border of tokens may lie within a character, which then is shown as one that is unknown
            following = iter(completion)
            assert all(character in following for character in _printable(text))
