"""Controls of rankings: data that is made so that the answer is known, the table in a terminal, the page, the run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.tiny_pair import TinyPair
from transformers import AutoModelForCausalLM

from genssd.distill.score import run as score_run
from genssd.distill.score.comparison import compare
from genssd.distill.score.config import ScoreConfig
from genssd.distill.score.control_text import format_controls
from genssd.distill.score.controls import ControlTable, compute_controls
from genssd.distill.score.page import render_page
from genssd.distill.score.run import run_score
from genssd.engine.common.errors import InputError

Write = Callable[..., Path]
HIGHER = {"by length": False, "by merit": True, "spurious": True, "length": False, "random": True}


def make_rows(prompts: int = 40, seed: int = 0) -> tuple[list[dict[str, Any]], dict[str, list[float]]]:
    """Return responses of two teachers. B writes short ones; short ones are more often right, merit decides the rest.

    "by length" is the length with a little noise; "spurious" is the length as well, with more; "by merit" is merit.
    """
    generator = np.random.default_rng(seed)
    rows, columns = [], {name: [] for name in HIGHER}
    for prompt in range(prompts):
        for response in range(6):
            teacher = "AB"[response % 2]
            tokens = int(generator.integers(60, 200)) + (60 if teacher == "A" else 0)
            merit = float(generator.normal())
            correct = bool(1.5 * merit - 0.03 * (tokens - 160) + generator.normal() > 0.0)
            rows.append(
                {
                    "prompt": str(prompt), "teacher": teacher, "tokens": tokens, "steps": 1 + tokens // 20,
                    "correct": correct, "finished": True,
                }
            )  # fmt: skip
            columns["by length"].append(tokens + float(generator.normal()) * 5.0)
            columns["by merit"].append(merit)
            columns["spurious"].append(-tokens + float(generator.normal()) * 70.0)
            columns["length"].append(float(tokens))
            columns["random"].append(float(generator.random()))
    return rows, columns


def controls_of(prompts: int = 40) -> ControlTable:
    rows, columns = make_rows(prompts)
    return compute_controls(rows, columns, HIGHER, equal_length=0.1)


def test_a_ranking_by_length_is_found_and_one_by_merit_is_not() -> None:
    table = controls_of()
    by_length, merit, random = (table.of(name) for name in ("by length", "by merit", "random"))
    for estimate in (by_length.length, by_length.steps, by_length.length_over_pool):
        assert estimate is not None
        assert estimate.high < -0.9, "short responses rank first"
    assert merit.length is not None
    assert not merit.length.excludes(0.0)
    assert by_length.teacher is not None
    assert merit.teacher is not None
    assert table.teacher_by_chance is not None
    assert by_length.teacher > 0.2 > 5 * merit.teacher
    assert table.teacher_by_chance == pytest.approx(1 / 200)
    assert by_length.warning is not None
    assert "length explains" in by_length.warning
    assert "prefers short responses" in by_length.warning
    assert merit.warning is None
    assert random.warning is None
    assert table.of("length").warning is None, "the control itself"


def test_correctness_that_comes_from_length_is_gone_given_length() -> None:
    table = controls_of()
    spurious, merit = table.of("spurious"), table.of("by merit")
    assert spurious.correct is not None
    assert spurious.correct.low > 0.0
    assert spurious.correct_given_length is not None
    assert not spurious.correct_given_length.excludes(0.0)
    assert spurious.warning is not None
    assert "its relation to correctness" in spurious.warning
    assert merit.correct_given_length is not None
    assert merit.correct is not None
    assert merit.correct_given_length.value > merit.correct.value > 0.3
    assert table.of("length").correct_given_length is None


def test_pairs_of_equal_length_take_the_length_out() -> None:
    """By brute force over all pairs; a ranking by length alone is a coin there."""
    rows, columns = make_rows()
    table = compute_controls(rows, columns, HIGHER, equal_length=0.1)
    for name in HIGHER:
        wins: dict[bool, list[float]] = {False: [], True: []}
        for i, one in enumerate(rows):
            for j, other in enumerate(rows):
                if one["prompt"] == other["prompt"] and one["correct"] and not other["correct"]:
                    sign = 1.0 if HIGHER[name] else -1.0
                    margin = sign * (columns[name][i] - columns[name][j])
                    is_equal = abs(one["tokens"] - other["tokens"]) <= 0.1 * max(one["tokens"], other["tokens"])
                    wins[is_equal].append(0.5 if margin == 0.0 else float(margin > 0.0))
        controls = table.of(name)
        assert controls.right_first is not None
        assert controls.right_first_at_equal_length is not None
        assert controls.right_first.value == pytest.approx(np.mean(wins[False] + wins[True]))
        assert controls.right_first_at_equal_length.value == pytest.approx(np.mean(wins[True]))
        assert controls.right_first_at_equal_length.number == len(wins[True])
    by_length = table.of("by length")
    assert by_length.right_first is not None
    assert by_length.right_first_at_equal_length is not None
    assert by_length.right_first.low > 0.6
    assert not by_length.right_first_at_equal_length.excludes(0.5)


def test_teachers_are_compared_at_equal_length() -> None:
    wins = {one.teacher: one for one in controls_of().of("by length").teachers}
    assert wins["B"].all_pairs is not None
    assert wins["B"].all_pairs.low > 0.7, "B writes shorter responses"
    assert wins["B"].equal_length is not None
    assert not wins["B"].equal_length.excludes(0.5)
    assert wins["A"].all_pairs is not None
    assert wins["A"].all_pairs.value == pytest.approx(1.0 - wins["B"].all_pairs.value)


def test_small_samples_have_no_numbers_and_say_so() -> None:
    table = controls_of(prompts=3)
    for controls in table.criteria:
        assert (controls.length, controls.correct, controls.teacher, controls.warning) == (None,) * 4
    text = " ".join(" ".join(format_controls(table)).split())
    assert "by merit" not in text, "no numbers, no rows"
    assert "too few for correlations within prompts: 3 prompts with at least two responses, 10 are needed" in text
    assert "too few for correctness: 3 prompts" in text
    lone = [{"prompt": str(i), "tokens": i, "steps": 1, "teacher": "A", "correct": None} for i in range(12)]
    values = {"up": [2.0 * i for i in range(12)]}
    table = compute_controls(lone, values, {"up": True}, equal_length=0.1)
    assert table.of("up").length is None
    assert table.of("up").length_over_pool is not None
    assert table.of("up").warning is not None, "one response per prompt: the pool"
    assert "over all responses" in str(table.of("up").warning)


def test_the_table_fits_into_a_terminal_and_the_page_holds_it() -> None:
    rows, columns = make_rows()
    columns["ppl(scope='trajectory', norm='byte')"] = columns.pop("by merit")
    higher = {**HIGHER, "ppl(scope='trajectory', norm='byte')": True}
    higher = {name: higher[name] for name in columns}
    table = compute_controls(rows, columns, higher, equal_length=0.1, notes=["no <teacher>"])
    lines = format_controls(table)
    assert max(map(len, lines)) <= 100, max(lines, key=len)
    (row,) = [line for line in lines if line.startswith("  by length")]
    length = table.of("by length").length
    assert length is not None
    assert f"{length.value:+.2f} [{length.low:+.2f},{length.high:+.2f}]" in row
    assert [line for line in lines if line.startswith("warning: by length: length explains")]
    comparison = compare(rows, columns, higher, {name: [0] for name in columns}, ["0"], [0])
    page = render_page(comparison, table, rows, {name: [0] for name in columns}, {}, "student")
    assert f"{length.value:+.2f} [{length.low:+.2f},{length.high:+.2f}]" in page
    assert "no &lt;teacher&gt;" in page
    assert str(table.of("by length").warning).split(";")[0] in page


ROWS = [
    {
        "problem": f"{i}+1?",
        "answer": str(i + 1),
        "model": model,
        "generations": ["Well. " * (i % 4) + f"\\boxed{{{i + k}}}"],
    }
    for i in range(12)
    for k, model in ((1, "A"), (2, "B"))
]


def run(pair: TinyPair, data: Path, out: Path, **options: Any) -> score_run.ScoreSummary:
    config = ScoreConfig(student=str(pair.student), data=(str(data),), output_dir=str(out), **options)
    return run_score(config, pair.engine)


def test_controls_run_beside_every_criterion(tiny_pair: TinyPair, write_rows: Write, tmp_path: Path) -> None:
    summary = run(tiny_pair, write_rows(ROWS), tmp_path / "out", criteria=("ppl",))
    assert [c.name for c in summary.controls.criteria] == ["ppl", "length", "random"]
    rows = [json.loads(line) for line in (tmp_path / "out" / "scores.jsonl").read_text().splitlines()]
    assert all(row["length"] == row["tokens"] for row in rows)
    (note,) = [note for note in summary.controls.notes if "teacher_logprob" in note]
    assert note.startswith("no teacher_logprob: 24 responses of 24 came without")
    written = json.loads((tmp_path / "out" / "controls.json").read_text())
    assert [c["name"] for c in written["criteria"]] == ["ppl", "length", "random"]
    assert written["mixed"] == summary.controls.mixed == 12
    assert "teacher_logprob" in (tmp_path / "out" / "report.html").read_text()


def test_the_teachers_log_probability_is_a_control_where_there_is_a_teacher(
    tiny_pair: TinyPair, write_rows: Write, tmp_path: Path
) -> None:
    data = write_rows(ROWS)
    summary = run(tiny_pair, data, tmp_path / "out", criteria=("ppl",), teacher=str(tiny_pair.teacher))
    assert [c.name for c in summary.controls.criteria] == ["ppl", "length", "random", "teacher_logprob"]
    assert not [note for note in summary.controls.notes if "teacher_logprob" in note]
    twice = run(tiny_pair, data, tmp_path / "b", criteria=("length", "teacher_logprob"), teacher=str(tiny_pair.teacher))
    assert [c.name for c in twice.controls.criteria] == ["length", "teacher_logprob", "random"]


def test_a_journal_without_controls_is_refused_by_name(
    tiny_pair: TinyPair, write_rows: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_rows(ROWS)
    with monkeypatch.context() as patch:
        patch.setattr(score_run, "CONTROLS", ())
        run(tiny_pair, data, tmp_path / "out")
    with pytest.raises(InputError, match=r"features.jsonl has no values of length: an earlier version wrote it"):
        run(tiny_pair, data, tmp_path / "out", resume=True)


def test_later_criteria_judge_finished_traces(tiny_pair: TinyPair, write_rows: Write, tmp_path: Path) -> None:
    """brts from the verdict and transformers' ranks, progress and scas from the engine; bad rows are named."""
    names = ("brts(top=3)", "scas", "progress", "tor")
    unknown = {"prompt": "what?", "completion": "nobody knows"}
    summary = run(tiny_pair, write_rows([*ROWS, unknown]), tmp_path / "out", criteria=names)
    (bad,) = summary.bad_rows
    assert "line 25: no verdict, which brts(top=3) reads, and no reference answer to judge it by" in bad or (
        "line 25: no reference answer, which progress reads" in bad
    )
    rows = [json.loads(line) for line in (tmp_path / "out" / "scores.jsonl").read_text().splitlines()]
    assert {row["correct"] for row in rows} == {True, False}
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_pair.student, dtype=torch.float32)
    picked = [json.loads(line) for line in (tmp_path / "out" / "selected.jsonl").read_text().splitlines()]
    assert len(picked) == 12
    assert all(row["correct"] for row in picked), "a right response is picked wherever there is one"
    for row in picked[:4]:
        prompt, response = row["student_prompt_ids"], row["completion_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        rank = 1 + (logits > logits.gather(1, torch.tensor(response)[:, None])).sum(1)
        assert row["score"] == pytest.approx(2.0 + float((rank <= 3).double().mean()))
    column = next(r for r in rows if r["source"] == picked[0]["source"])
    means = tiny_pair.engine.mean_activations(picked[0]["student_prompt_ids"], picked[0]["completion_ids"])
    (stats,) = tiny_pair.engine.score([picked[0]["student_prompt_ids"]], [picked[0]["completion_ids"]])
    nll = -float(stats.logprob[torch.tensor(means.counted)].double().mean())
    own, shared = float(means.response_F @ means.response_F), float(means.response_F @ means.prompt_F)
    assert column["scas"] == pytest.approx(0.5 * nll**2 * own + 0.5 * nll * means.prompt_nll * shared, rel=1e-6)
    assert all(0.0 <= row["progress"] <= 1.0 for row in rows)
    assert all(row["tor"] == 0.0 for row in rows)
    assert summary.controls.of("tor").length is None, "constant"


def test_brts_needs_a_verdict(tiny_pair: TinyPair, write_rows: Write, tmp_path: Path) -> None:
    data = write_rows(ROWS[:2])
    with pytest.raises(InputError, match=r"no verdict, which brts reads, and no reference answer to judge it by"):
        run(tiny_pair, data, tmp_path / "out", criteria=("brts",), verify=False)
    judged = write_rows([{**row, "correctness": [True]} for row in ROWS[:2]], "judged.jsonl")
    assert run(tiny_pair, judged, tmp_path / "b", criteria=("brts",), verify=False).bad_rows == ()
