"""The problems of both tasks: no question of the test in any training; solutions rewritten in two styles."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from genssd.distill.data.overlap import normalise_question
from genssd.distill.reproduce import small
from genssd.distill.reproduce.small import SHIPPED_PAIR, SmallTask
from genssd.distill.reproduce.word_problems import (
    PARTS,
    WordProblem,
    detect_writing,
    read_gsm8k,
    write_in_words,
    write_terse,
)
from genssd.distill.reproduce.words import WordsTask, drop_layers
from genssd.distill.reproduce.worlds import ProblemFiles
from genssd.distill.runs.progress import SILENT
from genssd.distill.small_pair.problems import assign_split, make_problems
from genssd.engine.checkpoints.config import load_config
from genssd.engine.common.errors import InputError

LINE = "Natalia sold 48/2 = <<48/2=24>>24 clips in May."


def read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_seed_of_small_has_its_own_problems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = make_problems(1, small.FIRST_SEED)[0]
    monkeypatch.setattr(small, "exclude_pools", lambda: frozenset((first.operands,)))
    task = SmallTask(models=tmp_path, problems=20, multiple=3, eval_problems=15)
    seeds = [task.write_problems(seed, tmp_path / str(seed)) for seed in range(3)]
    for files in seeds:
        files.check_disjoint()
        assert [len(read(path)) for path in (files.train, files.calibration, files.test)] == [60, 32, 15]
    assert first.question not in {row["problem"] for row in read(seeds[0].train)}  # a model has learnt it
    before = seeds[0].train.read_bytes()
    assert task.write_problems(0, tmp_path / "0").train.read_bytes() == before
    tests = [normalise_question(row["problem"]) for files in seeds for row in read(files.test)]
    trained = {normalise_question(row["problem"]) for files in seeds for row in read(files.train)}
    assert len(set(tests)) == len(tests)
    assert not trained & set(tests)  # of any seed


def test_models_of_small_have_seen_no_test_problem() -> None:
    """The pools that both models learnt from are of the other split, whatever the seed."""
    pool = make_problems(300, small.TEACHER_PROBLEMS) + make_problems(300, small.STUDENT_PROBLEMS)
    tests = make_problems(300, small.FIRST_SEED, split="eval")
    assert {assign_split(problem.operands) for problem in pool} == {"train"}
    assert {assign_split(problem.operands) for problem in tests} == {"eval"}


def test_a_question_in_two_files_is_refused(tmp_path: Path) -> None:
    paths = {name: tmp_path / f"{name}.jsonl" for name in ("train", "calibration", "test")}
    for name, question in (("train", "How many apples?"), ("calibration", "What?"), ("test", "how many APPLES")):
        paths[name].write_text(json.dumps({"problem": question, "answer": "1"}) + "\n")
    with pytest.raises(InputError, match=r"1 of 2 rows of the training data stand in the evaluation data"):
        ProblemFiles(**paths).check_disjoint()


def test_lines_are_rewritten() -> None:
    assert write_in_words(LINE) == "Natalia sold 48/2 = 24 clips in May."
    assert write_terse(LINE) == "48/2=24"
    assert [detect_writing(text) for text in (write_terse(LINE), write_in_words(LINE), r"\boxed{24}", "")] == [
        "terse", "in words", None, None,
    ]  # fmt: skip


def test_solutions_mix_both_styles_in_the_same_way_every_time() -> None:
    problems = [WordProblem(question=f"q{i}", answer="24", lines=(LINE, LINE)) for i in range(40)]
    written = [problem.write_solution() for problem in problems]
    assert written == [problem.write_solution() for problem in problems]
    styles = [detect_writing(line) for text in written for line in text.split("\n")[:-1]]
    assert 25 <= styles.count("terse") <= 55
    assert all(text.endswith(r"\boxed{24}") for text in written)


@pytest.fixture
def word_data(tmp_path: Path) -> Path:
    """A directory like that of GSM8K and MAWPS."""
    rows = [
        {
            "question": f"Tom has {i} toys and buys {i}. How many has Tom?",
            "answer": f"{i}+{i}=<<{i}+{i}={2 * i}>>{2 * i}\n#### {2 * i}",
        }
        for i in range(400)
    ]
    unusable = [{"question": "Half?", "answer": "1/2=<<1/2=0.5>>0.5\n#### 0.5"}, {"question": "?", "answer": "none"}]
    _write(tmp_path / "gsm8k" / "train.jsonl", rows + unusable)
    _write(tmp_path / "gsm8k" / "test.jsonl", [*rows[:3], {**rows[0], "question": "Ann has 5. And then?"}])
    mawps = [{"input": f"Ann had {i} cards . How many ?", "target": float(i)} for i in range(20)]
    _write(tmp_path / "mawps" / "a.jsonl", [*mawps, {"input": "Half ?", "target": 0.5}, mawps[0]])
    return tmp_path


def _write(path: Path, rows: list[dict[str, object]]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_parts_of_words_have_no_question_in_common(word_data: Path, tmp_path: Path) -> None:
    known = read_gsm8k(word_data / "gsm8k" / "train.jsonl")
    assert len(known) == 400
    parts = {part: {p.question for p in known if p.part == part} for part in PARTS}
    assert {part: len(questions) > 20 for part, questions in parts.items()} == dict.fromkeys(PARTS, True)
    task = WordsTask(
        base="", data=word_data, models=tmp_path, problems=30, multiple=2, eval_problems=20,
    )  # fmt: skip
    for seed in range(2):
        files = task.write_problems(seed, tmp_path / str(seed))
        files.check_disjoint()
        trained = {row["problem"] for path in (files.train, files.calibration) for row in read(path)}
        assert trained <= parts["run"]
        tested = {normalise_question(row["problem"]) for row in read(files.test)}
        assert len(tested) == 20
        assert not tested & set(map(normalise_question, trained))
    with pytest.raises(InputError, match=r"problems to train on and 24 to test; lower --problems"):
        WordsTask(base="", data=word_data, models=tmp_path, problems=999, multiple=2, eval_problems=20).write_problems(
            0, tmp_path / "0"
        )


def test_teacher_and_student_of_words_are_made_of_one_model(word_data: Path, tmp_path: Path) -> None:
    drop_layers(str(SHIPPED_PAIR / "teacher"), tmp_path / "short")
    assert load_config(tmp_path / "short").num_hidden_layers == 2
    task = WordsTask(
        base=str(SHIPPED_PAIR / "student"), data=word_data, models=tmp_path / "models", problems=4, multiple=2,
        eval_problems=4, steps=1, threads=1,
    )  # fmt: skip
    pair = task.make_pair("shipped", SILENT)
    layers = [load_config(directory).num_hidden_layers for directory in (pair.teacher, pair.student)]
    assert layers == [2, 1]
    changed = pair.student / "config.json"
    before = changed.stat().st_mtime_ns
    assert task.make_pair("shipped", SILENT) == pair
    assert changed.stat().st_mtime_ns == before  # it is made once
