"""The data of the page, against the files of the runs, `genssd reselect` and formulas."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.pages import list_trees, read_page
from support.report_runs import HOSTILE, QUESTIONS, Runs
from support.tiny_pair import TinyPair

from genssd.distill.answers.intervals import paired_difference
from genssd.distill.report.config import ReportConfig
from genssd.distill.report.evaluations import MAX_CHARACTERS, MAX_PROBLEMS, ReadEvaluation, list_differing
from genssd.distill.report.figures import BINS, describe_scores
from genssd.distill.report.run import ReportSummary, run_report
from genssd.distill.select.reselect import run_reselect
from genssd.distill.select.reselect_config import ReselectConfig
from genssd.engine.texts.text import Tokenizer


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def make(tmp_path: Path, *names: Path, **options: Any) -> tuple[ReportSummary, dict[str, Any]]:
    config = ReportConfig(run=tuple(map(str, names)), output=str(tmp_path / "page.html"), **options)
    summary = run_report(config)
    return summary, read_page(summary.path)


@pytest.mark.parametrize("name", ["select", "beam"])
def test_every_candidate_is_a_box_with_the_numbers_of_the_log(
    runs: Runs, tiny_pair: TinyPair, tmp_path: Path, name: str
) -> None:
    run: Path = getattr(runs, name)
    summary, page = make(tmp_path, run)
    assert (summary.searches, summary.prompts, summary.faults, summary.unfinished) == (1, 3, (), ())
    decisions = {row["index"]: row for row in lines(run / "decisions.jsonl")}
    selections = lines(run / "selections.jsonl")
    assert len(list_trees(page)) == len(selections)
    tokenizer = Tokenizer(tiny_pair.student)
    seen = Counter[str]()
    for (entry, tree), row in zip(list_trees(page), selections, strict=True):
        logged = decisions[entry["index"]]
        by_trace = {tuple(c["trace"]): c for c in logged["candidates"]}
        assert [r[:2] for r in tree["rounds"]] == [[r["round"], r["attempt"]] for r in logged["rounds"]]
        assert {tuple(box["trace"]) for box in tree["boxes"]} == set(by_trace)
        for box in tree["boxes"]:
            c = by_trace[tuple(box["trace"])]
            assert (box["verdict"], box["draw"]) == (c["verdict"], c["probability"])
            assert box["score"] == pytest.approx(c["score"], rel=1e-8)
            assert box["ending"] == c["ended"]
            for mine, theirs in (("student", "logprob"), ("entropy", "entropy")):
                sign = -100 if mine == "student" else 100
                expected = np.asarray(c["student"][theirs]) * sign
                np.testing.assert_allclose(box[mine], expected, atol=0.5001)
            assert box["rank"] == c["student"]["rank"]
            np.testing.assert_allclose(box["teacher"], -100 * np.asarray(c["teacher_logprob"]), atol=0.5001)
            assert sum(box["lengths"]) == len(box["text"].encode("utf-16-le")) // 2
            assert len(box["lengths"]) == len(c["token_ids"])
            seen[box["verdict"]] += 1
        for response, expected_row in zip(tree["responses"], [row, *row["others"]], strict=True):
            ids = [t for place in response["path"] for t in by_trace[tuple(tree["boxes"][place]["trace"])]["token_ids"]]
            assert ids == expected_row["completion_ids"]
            text = "".join(tree["boxes"][place]["text"] for place in response["path"])
            # bytes that form no character become one mark or several
            whole = str(tokenizer.hf.decode(expected_row["completion_ids"]))
            assert text.replace("\ufffd", "") == whole.replace("\ufffd", "") != ""
            assert response["status"] == expected_row["status"]
    assert len(seen) > 1
    figures = page["overview"]["searches"][0]["figures"]
    written = json.loads((run / "summary.json").read_text())
    assert {name: figures[name] for name in ("prompts", "tokens_kept", "tokens_sampled", "statuses", "accuracy")} == {
        name: written[name] for name in ("prompts", "tokens_kept", "tokens_sampled", "statuses", "accuracy")
    }
    assert figures["candidates"] == dict(seen)


@pytest.mark.parametrize("name", ["select", "beam"])
def test_another_criterion_chooses_as_reselect_says(runs: Runs, tiny_pair: TinyPair, tmp_path: Path, name: str) -> None:
    run: Path = getattr(runs, name)
    criteria = ("rsr", "teacher_logprob", "length")
    _, page = make(tmp_path, run, criteria=criteria)
    search = page["overview"]["searches"][0]
    assert list(search["figures"]["criteria"]) == ["ppl", *criteria]
    for criterion in ("ppl", *criteria):
        out = tmp_path / f"again-{criterion}"
        summary = run_reselect(ReselectConfig(run=str(run), criterion=criterion, output_dir=str(out)))
        counts = search["figures"]["criteria"][criterion]
        assert (counts["contested"], counts["differing"]) == (summary.contested, summary.differing)
        assert counts["prompts_differing"] == summary.prompts_differing
        by_round = {(row["index"], row["round"], row["attempt"]): row for row in lines(out / "reselected.jsonl")}
        for entry, tree in list_trees(page):
            judged = tree["criteria"][criterion]
            preferred = {tuple(tree["boxes"][place]["trace"]) for place in judged["picked"]}
            expected = [by_round[entry["index"], r[0], r[1]] for r in tree["rounds"]]
            assert preferred == {tuple(trace) for row in expected for trace in row["reselected"]}
            assert judged["differs"] == [not row["agrees"] for row in expected]
            assert judged["exact"] == [row["exact"] for row in expected]
            assert entry["differing"][criterion] == sum(judged["differs"])
            values = {tuple(s["trace"]): s["score"] for row in expected for s in row["scores"]}
            for box, value in zip(tree["boxes"], judged["values"], strict=True):
                assert value == pytest.approx(values[tuple(box["trace"])], rel=1e-4)


def test_what_data_says_means_nothing_to_html(runs: Runs, tmp_path: Path) -> None:
    summary, page = make(tmp_path, runs.select)
    assert HOSTILE in {entry["question"] for entry in page["list-0"]}
    assert {entry["answer"] for entry in page["list-0"]} == {row["answer"] for row in QUESTIONS}
    text = summary.path.read_text()
    assert "onerror" not in text
    assert "\u202e" not in text
    body, _, _ = text.partition('<script type="text/plain"')
    assert "Content-Security-Policy\" content=\"default-src 'none'" in body
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "").replace('http-equiv="Content', "")


def test_a_name_of_a_run_is_escaped(runs: Runs, tmp_path: Path) -> None:
    link = tmp_path / "<b>&run"
    link.symlink_to(runs.select)
    summary, page = make(tmp_path, link)
    assert page["overview"]["searches"][0]["name"] == str(link)
    assert f"<title>genssd: {tmp_path}/&lt;b&gt;&amp;run</title>" in summary.path.read_text()


def test_responses_of_generate_get_the_students_numbers_from_the_student(
    runs: Runs, tiny_pair: TinyPair, tmp_path: Path
) -> None:
    _, page = make(tmp_path, runs.generate)
    assert page["overview"]["searches"][0]["has_student"] is False
    assert all(box["student"] is None for _, tree in list_trees(page) for box in tree["boxes"])
    _, page = make(tmp_path, runs.generate, student=str(tiny_pair.student), memory_bytes=1 << 22)
    rows = lines(runs.generate / "responses.jsonl")
    assert len(rows) == 3
    for (_, tree), row in zip(list_trees(page), rows, strict=True):
        responses = [row, *row["others"]]
        ids = [r["completion_ids"] for r in responses]
        expected = tiny_pair.engine.score([row["student_prompt_ids"]] * len(ids), ids)
        for box, stats, response in zip(tree["boxes"], expected, responses, strict=True):
            np.testing.assert_allclose(box["student"], -100 * stats.logprob.numpy(), atol=0.51)
            np.testing.assert_allclose(box["teacher"], -100 * np.asarray(response["teacher_logprobs"]), atol=0.51)
            assert box["rank"] == stats.rank.tolist()
            assert box["verdict"] == "written"


@pytest.mark.parametrize(("criterion", "fault"), [("lalp", "without a model"), ("scas", "scas runs the student")])
def test_a_criterion_that_runs_the_model_needs_the_student(
    runs: Runs, tiny_pair: TinyPair, tmp_path: Path, criterion: str, fault: str
) -> None:
    _, page = make(tmp_path, runs.select, criteria=(criterion,))
    search = page["overview"]["searches"][0]
    assert list(search["figures"]["criteria"]) == ["ppl"]
    assert fault in search["left_out"][criterion]
    student = {"student": str(tiny_pair.student), "memory_bytes": 1 << 22}
    _, page = make(tmp_path, runs.select, criteria=(criterion,), **student)
    out = tmp_path / "again"
    run_reselect(ReselectConfig(run=str(runs.select), criterion=criterion, output_dir=str(out), memory_bytes=1 << 22))
    expected = {
        (row["index"], tuple(s["trace"])): s["score"] for row in lines(out / "reselected.jsonl") for s in row["scores"]
    }
    got = {
        (entry["index"], tuple(box["trace"])): value
        for entry, tree in list_trees(page)
        for box, value in zip(tree["boxes"], tree["criteria"][criterion]["values"], strict=True)
    }
    assert got == pytest.approx(expected, rel=1e-4)


def test_rounds_show_curves_and_accuracy(runs: Runs, tmp_path: Path) -> None:
    summary, page = make(tmp_path, runs.distill)
    assert (summary.searches, summary.trainings, summary.evaluations) == (1, 1, 2)
    overview = page["overview"]
    (training,) = overview["trainings"]
    metrics = [row for row in lines(runs.distill / "round-1" / "train" / "metrics.jsonl") if "loss" in row]
    assert [step for step, _ in training["curves"]["loss"]] == [row["step"] for row in metrics]
    np.testing.assert_allclose([v for _, v in training["curves"]["loss"]], [r["loss"] for r in metrics], rtol=1e-4)
    folders = [runs.distill / name / "evaluate" for name in ("round-0", "round-1")]
    written = [json.loads((folder / "summary.json").read_text()) for folder in folders]
    first, second = overview["evaluations"]
    assert [first["accuracy"], second["accuracy"]] == [w["accuracy"] for w in written]
    outcomes = [{r["prompt"][0]["content"]: r["correct"] for r in lines(f / "evaluation.jsonl")} for f in folders]
    keys = list(outcomes[1])
    expected = paired_difference([outcomes[1][k] is True for k in keys], [outcomes[0][k] is True for k in keys])
    assert first["difference"] is None
    assert second["difference"] == dataclasses.asdict(expected)
    assert second["common"] == len(keys) == 3


def test_problems_on_which_models_differ_are_all_counted() -> None:
    def evaluated(right: Callable[[int], bool]) -> ReadEvaluation:
        rows = {f"q{i}": {"correct": right(i), "response": "x" * 2000, "answer": str(i)} for i in range(350)}
        return ReadEvaluation(found=None, rows=rows)  # type: ignore[arg-type]

    evaluations = [evaluated(lambda i: i % 2 == 0), evaluated(lambda i: i % 4 == 0)]
    listed, total = list_differing(evaluations)
    differing = [i for i in range(350) if i % 4 == 2]
    assert total == len(differing) == 87
    assert [one["question"] for one in listed] == [f"q{i}" for i in differing]
    listed, total = list_differing([*evaluations, evaluated(lambda i: i % 3 == 0)])
    assert total > len(listed) == MAX_PROBLEMS
    assert [result[0] for result in listed[0]["of"]] == [True, False, False]
    assert {len(result[1]) for one in listed for result in one["of"]} == {MAX_CHARACTERS}


def test_a_distribution_counts_every_finite_score_once() -> None:
    generator = np.random.default_rng(0)
    kept = [*generator.normal(2.0, 1.0, 200), np.inf, np.nan, 1e9]
    dropped = list(generator.normal(4.0, 2.0, 500))
    scores = describe_scores(kept, dropped)
    assert scores is not None
    assert (sum(scores["kept"]), sum(scores["dropped"])) == (201, 500)
    assert scores["counts"] == [201, 500]
    assert scores["infinite"] == [2, 0]
    edges = scores["edges"]
    assert len(edges) == BINS + 1
    for i in range(1, BINS - 1):  # away from the bars at the ends, which take what is outside
        inside = sum(edges[i] <= value < edges[i + 1] for value in dropped)
        assert abs(scores["dropped"][i] - inside) <= 1  # edges are rounded
    assert scores["medians"][1] == pytest.approx(float(np.median(dropped)), rel=1e-4)
    assert describe_scores([np.inf], []) is None
    same = describe_scores([1.0, 1.0], [])
    assert same is not None
    assert sum(same["kept"]) == 2


def test_no_more_prompts_than_asked_for_have_trees_and_all_are_counted(runs: Runs, tmp_path: Path) -> None:
    summary, page = make(tmp_path, runs.select, prompts=1)
    assert summary.prompts == len(page["list-0"]) == 1
    assert page["overview"]["searches"][0]["figures"]["prompts"] == 3
