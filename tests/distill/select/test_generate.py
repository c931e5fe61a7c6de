"""`genssd generate`: responses nobody chose, crash-safe, read by scoring and training unchanged."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.tiny_pair import TinyPair

from genssd import Engine
from genssd.distill.data.example_files import read_examples
from genssd.distill.score.config import ScoreConfig
from genssd.distill.score.run import run_score
from genssd.distill.select.generate import run_generate
from genssd.distill.select.generate_config import GenerateConfig
from genssd.distill.select.generate_summary import GenerateSummary
from genssd.engine.common.errors import InputError
from genssd.engine.decoding.speculation_rules import ReverseSpeculation
from genssd.engine.models.sampling import Sampling

Write = Callable[..., Path]
PROBLEMS = [{"question": f"{i}+{i}?", "answer": str(2 * i)} for i in range(4)] + [{"prompt": "a raw text"}]


def run(pair: TinyPair, data: Path, out: Path, **options: Any) -> GenerateSummary:
    settings = {"max_tokens": 12, "student": str(pair.student), **options}
    return run_generate(
        GenerateConfig(teacher=str(pair.teacher), data=str(data), output_dir=str(out), **settings), pair.engine
    )


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_responses_are_those_of_the_engine(tiny_pair: TinyPair, write_rows: Write, tmp_path: Path) -> None:
    data = write_rows(PROBLEMS)
    summary = run(tiny_pair, data, tmp_path / "run", n=3, seed=5)
    prompts = [row.get("prompt") or [{"role": "user", "content": row["question"]}] for row in PROBLEMS]
    expected = tiny_pair.engine.generate(prompts, n=3, max_tokens=12, seed=5, sampling=Sampling(top_p=0.95))
    rows = sorted(lines(summary.path), key=lambda row: row["index"])
    for row, problem, prompt, completions in zip(rows, PROBLEMS, prompts, expected, strict=True):
        ids = [row["completion_ids"], *(other["completion_ids"] for other in row["others"])]
        assert ids == [list(completion.token_ids) for completion in completions]
        assert row["answer"] == problem.get("answer")
        assert row["student_prompt_ids"] == tiny_pair.engine.tokenizer("student").encode_prompt(prompt)
        assert row["prompt_ids"] == tiny_pair.engine.tokenizer("teacher").encode_prompt(prompt)
        assert row["messages"][-1] == {"role": "assistant", "content": completions[0].text}
    assert summary.tokens == sum(len(c.token_ids) for of in expected for c in of)
    assert sum(summary.statuses.values()) == 15
    assert summary.substituted == 0


def test_a_resumed_run_writes_what_an_uninterrupted_one_writes(
    tiny_pair: TinyPair, write_rows: Write, tmp_path: Path
) -> None:
    data = write_rows(PROBLEMS)
    run(tiny_pair, data, tmp_path / "whole", n=2)
    run(tiny_pair, data, tmp_path / "torn", n=2)
    path = tmp_path / "torn" / "responses.jsonl"
    path.write_bytes(path.read_bytes()[: len(path.read_bytes()) // 2])
    with pytest.raises(InputError, match="pass --resume"):
        run(tiny_pair, data, tmp_path / "torn", n=2)
    with pytest.raises(InputError, match=r"begun with n=2, not 3"):
        run(tiny_pair, data, tmp_path / "torn", n=3, resume=True)
    run(tiny_pair, data, tmp_path / "torn", n=2, resume=True)
    one, other = (
        sorted(lines(tmp_path / name / "responses.jsonl"), key=lambda row: row["index"]) for name in ("whole", "torn")
    )
    assert one == other
    with pytest.raises(InputError, match="is not the file"):
        run(tiny_pair, write_rows(PROBLEMS[::-1], "other.jsonl"), tmp_path / "torn", n=2, resume=True)


def test_settings_of_a_run_do_not_change(tiny_pair: TinyPair, write_rows: Write, tmp_path: Path) -> None:
    data = write_rows(PROBLEMS)
    run(tiny_pair, data, tmp_path / "run")
    for change, message in (
        ({"method": "rsd"}, "begun with method='sample', not 'rsd'"),
        ({"student": None}, "begun with student="),
        ({"sampling": Sampling(temperature=0.5)}, "begun with sampling.temperature=1.0, not 0.5"),
    ):
        with pytest.raises(InputError, match=message):
            run(tiny_pair, data, tmp_path / "run", resume=True, **change)
    path = tmp_path / "run" / "responses.jsonl"
    first = path.read_text().splitlines(keepends=True)[0]
    path.write_text(path.read_text() + first)
    with pytest.raises(InputError, match="line 6 repeats line 1: remove one of them, and resume"):
        run(tiny_pair, data, tmp_path / "run", resume=True)


def test_rows_are_for_the_students_template(tiny_pair: TinyPair, write_rows: Write, tmp_path: Path) -> None:
    student = tmp_path / "student"
    shutil.copytree(tiny_pair.student, student)
    (student / "chat_template.jinja").write_text("{% for m in messages %}Q {{ m.content }} {% endfor %}A ")
    engine = Engine.from_pretrained(tiny_pair.teacher, student, memory_bytes=1 << 24)
    data = write_rows(PROBLEMS[:1])
    config = GenerateConfig(
        teacher=str(tiny_pair.teacher), student=str(student), data=str(data), output_dir=str(tmp_path / "run"),
        max_tokens=4,
    )  # fmt: skip
    (row,) = lines(run_generate(config, engine).path)
    assert engine.tokenizer("student").decode(row["student_prompt_ids"]) == "Q 0+0? A "
    assert row["prompt_ids"] != row["student_prompt_ids"]
    (student / "chat_template.jinja").unlink()
    engine = Engine.from_pretrained(tiny_pair.teacher, student, memory_bytes=1 << 24)
    with pytest.raises(InputError, match=r"line 1: .*has no chat template"):
        run_generate(dataclasses.replace(config, output_dir=str(tmp_path / "none")), engine)
    assert engine.usage.sampled_tokens == 0


def test_the_students_share_is_counted(tiny_pair: TinyPair, write_rows: Write, tmp_path: Path) -> None:
    data = write_rows(PROBLEMS)
    strict = ReverseSpeculation(probability=1.0, tries=1)
    summary = run(tiny_pair, data, tmp_path / "strict", method="rsd", rsd=strict)
    assert summary.substituted == summary.tokens > 0
    some = run(tiny_pair, data, tmp_path / "some", method="rsd", rsd=ReverseSpeculation(probability=0.004, top=200))
    assert 0 < some.substituted < some.tokens
    assert sum(row["substituted"] for row in lines(some.path)) == some.substituted
    with pytest.raises(InputError, match="rsd needs a student"):
        run(tiny_pair, data, tmp_path / "none", method="rsd", student=None)


def test_pools_are_scored_and_trained_on(tiny_pair: TinyPair, write_rows: Write, tmp_path: Path) -> None:
    summary = run(tiny_pair, write_rows(PROBLEMS), tmp_path / "run", n=3)
    scored = run_score(
        ScoreConfig(student=str(tiny_pair.student), data=(str(summary.path),), output_dir=str(tmp_path / "score")),
        tiny_pair.engine,
    )
    assert scored.traces == 15
    assert scored.prompts == 5
    tokenizer = tiny_pair.engine.tokenizer("student")
    examples = read_examples([summary.path], tokenizer, max_length=512, statuses=("finished", "length")).examples
    first = lines(summary.path)[0]
    assert examples[0].input_ids == (*first["student_prompt_ids"], *first["completion_ids"])
