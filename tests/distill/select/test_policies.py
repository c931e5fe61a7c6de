"""Policies and budgets of `genssd select`: what is written of them, and how runs that they end go on."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.progress import Recorder
from support.tiny_pair import TinyPair

from genssd import Engine
from genssd.cli import main
from genssd.distill.data.problems import read_usable_problems
from genssd.distill.pool.pool import OwnProcess
from genssd.distill.rounds.config import DistillConfig
from genssd.distill.rounds.run import BudgetReached, run_distill
from genssd.distill.runs.progress import Stage, measure
from genssd.distill.select.calibration import calibrate
from genssd.distill.select.config import SelectConfig, SelectSettings
from genssd.distill.select.decisions import read_decisions
from genssd.distill.select.reselect import run_reselect
from genssd.distill.select.reselect_config import ReselectConfig
from genssd.distill.select.run import run_select
from genssd.distill.train.config import TrainSettings
from genssd.engine.decoding.chunk import Chunk
from genssd.engine.models.sampling import Sampling
from genssd.engine.search import budget as budgets
from genssd.engine.search.budget import Budget

Write = Callable[..., Path]
PROMPTS = [{"question": f"{i}+{i}?"} for i in range(5)]
SEARCH: dict[str, Any] = {"candidates": 2, "chunk": Chunk(tokens=4, until=None), "max_tokens": 12}


def config_for(pair: TinyPair, data: Path, out: Path, **changes: Any) -> SelectConfig:
    return SelectConfig(
        teacher=str(pair.teacher), student=str(pair.student), data=str(data), output_dir=str(out),
        memory_bytes=1 << 24, sampling=Sampling(), **{**SEARCH, **changes},
    )  # fmt: skip


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def rows_of(run: Path) -> dict[str, list[dict[str, Any]]]:
    names = ("selections.jsonl", "decisions.jsonl")
    return {name: sorted(lines(run / name), key=lambda row: row["index"]) for name in names}


@pytest.fixture(scope="module")
def one_by_one(tiny_pair: TinyPair) -> Engine:
    """An engine in which one prompt ends after the other."""
    return Engine.from_pretrained(tiny_pair.teacher, tiny_pair.student, memory_bytes=1 << 24, max_num_seqs=2)


@pytest.fixture
def threshold(tiny_pair: TinyPair, write_rows: Write, tmp_path: Path) -> float:
    """A threshold that some rounds do not reach at once."""
    run_select(config_for(tiny_pair, write_rows(PROMPTS), tmp_path / "free"), tiny_pair.engine)
    scores = sorted(chunk["score"] for row in lines(tmp_path / "free" / "selections.jsonl") for chunk in row["chunks"])
    return float(scores[len(scores) // 2])


POLICIES = [
    {"on_unlearnable": "resample", "max_resamples": 3},
    {"on_unlearnable": "shorten", "min_chunk_tokens": 1},
    {"on_unlearnable": "accept_best", "selection_temperature": 300.0},
    {"on_unlearnable": "accept_best", "prompt_budget": Budget(tokens=17)},
]


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_rows_hold_every_decision_and_a_stopped_run_goes_on_to_the_same_rows(
    tiny_pair: TinyPair, write_rows: Write, tmp_path: Path, threshold: float, policy: dict[str, Any], one_by_one: Engine
) -> None:
    data = write_rows(PROMPTS)
    whole = config_for(tiny_pair, data, tmp_path / "whole", threshold=threshold, **policy)
    report = Recorder()
    summary = run_select(whole, tiny_pair.engine, report)
    rows = rows_of(tmp_path / "whole")
    total: Counter[str] = Counter()
    for row, decided in zip(*rows.values(), strict=True):
        assert row["rounds"] == dict(Counter(r["decision"] for r in decided["rounds"]))
        assert row["ended_by"] == decided["ended_by"]
        assert (row["status"] == "budget") == (row["cut_by"] == "prompt_budget") == (row["ended_by"] is not None)
        total.update(row["rounds"])
        kept = {tuple(c["trace"]): c for c in decided["candidates"] if c["verdict"] in ("kept", "forced")}
        chosen = [c for trace, c in sorted(kept.items(), key=lambda pair: len(pair[0]))]
        assert [c["forced"] for c in row["chunks"]] == [c["verdict"] == "forced" for c in chosen]
        assert [token for c in chosen for token in c["token_ids"]] == row["completion_ids"]
        for c in decided["candidates"]:
            took_part = c["verdict"] in ("kept", "beaten")
            assert (c["probability"] is not None) == (took_part and "selection_temperature" in policy)
        assert {(len(c["trace"]) - 1, c["attempt"]) for c in decided["candidates"]} == {
            (r["round"], r["attempt"]) for r in decided["rounds"]
        }
    assert summary.rounds == dict(total)
    special = {"resample": "resampled", "shorten": "shortened", "accept_best": "forced"}[policy["on_unlearnable"]]
    assert total[special]
    written = json.loads((tmp_path / "whole" / "summary.json").read_text())
    assert (written["rounds"], written["stopped_by"], written["unfinished"]) == (dict(total), None, 0)

    # a total budget ends the run in the middle, as a kill would; what is on disk counts, the rest is done again
    config = dataclasses.replace(whole, output_dir=str(tmp_path / "run"))
    sampled = summary.tokens_sampled
    finished = []
    for tokens in (sampled // 3, sampled // 2, sampled // 2, 10 * sampled):
        config = dataclasses.replace(config, total_budget=Budget(tokens=tokens))
        part = run_select(config, one_by_one)
        finished.append(part.prompts)
        assert (part.stopped_by is None) == (part.unfinished == 0) == (tokens > sampled)
        assert part.prompts + part.unfinished == 5
        config = dataclasses.replace(config, resume=True)
    assert rows_of(tmp_path / "run") == rows
    assert 0 < finished[0] < finished[1] < 5


def test_a_run_that_its_budget_ends_is_a_success(
    tiny_pair: TinyPair, write_rows: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_rows(PROMPTS)
    flags = ["select", "--teacher", str(tiny_pair.teacher), "--student", str(tiny_pair.student), "--data", str(data)]
    flags += ["--output-dir", str(tmp_path / "run"), "--candidates", "2", "--chunk.tokens", "4"]
    flags += ["--chunk.until", "None", "--max-tokens", "12", "--memory-bytes", str(1 << 24)]
    flags += ["--total-budget.tokens", "5"]
    main(flags)  # no SystemExit: exit code 0
    said = capsys.readouterr().out
    assert "total_budget.tokens=5 ended the search: 0 prompts finished, 5 unfinished (" in said
    assert "--resume with a larger one goes on\n" in said
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["stopped_by"], summary["unfinished"], summary["prompts"]) == ("total_budget.tokens", 5, 0)
    main([*flags[:-1], "100000", "--resume", "--prompt-budget.seconds", "None"])
    assert "5 prompts: " in (said := capsys.readouterr().out)
    assert "ended the search" not in said


def test_seconds_end_a_run_and_the_next_part_has_as_many_again(
    tiny_pair: TinyPair, write_rows: Write, tmp_path: Path, one_by_one: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter(range(1_000_000))
    monkeypatch.setattr(budgets, "monotonic", lambda: float(next(now)))
    data = write_rows(PROMPTS)
    config = config_for(tiny_pair, data, tmp_path / "run", total_budget=Budget(seconds=40.0))
    parts = []
    for _ in range(9):
        part = run_select(config, one_by_one)
        parts.append(part.unfinished)
        config = dataclasses.replace(config, resume=True)
    assert part.stopped_by is None
    assert parts[0] > parts[1] >= parts[-1] == 0
    run_select(config_for(tiny_pair, data, tmp_path / "whole"), tiny_pair.engine)
    assert rows_of(tmp_path / "run") == rows_of(tmp_path / "whole")


def test_rounds_of_distill_end_with_the_budget_of_their_selection(
    tiny_pair: TinyPair, write_rows: Write, tmp_path: Path
) -> None:
    data = write_rows([{**row, "answer": "1"} for row in PROMPTS])
    search = {**SEARCH, "memory_bytes": 1 << 22}
    config = DistillConfig(
        teacher=str(tiny_pair.teacher), student=str(tiny_pair.student), data=str(data), require_correct=False, rounds=1,
        output_dir=str(tmp_path / "run"), train=TrainSettings(statuses=("finished", "length"), max_steps=1),
        select=SelectSettings(**search, total_budget=Budget(tokens=5)),
    )  # fmt: skip
    with pytest.raises(BudgetReached, match=r"^round 1: select\.total_budget\.tokens=5 ended the search: 0 "):
        list(run_distill(config))
    again = dataclasses.replace(config, resume=True, select=SelectSettings(**search))
    (summary,) = run_distill(again)
    assert summary.prompts == 5


@pytest.mark.parametrize("policy", POLICIES[:3], ids=str)
def test_reselect_reads_what_policies_did(
    tiny_pair: TinyPair, write_rows: Write, tmp_path: Path, threshold: float, policy: dict[str, Any]
) -> None:
    run = tmp_path / "run"
    config = config_for(tiny_pair, write_rows(PROMPTS), run, threshold=threshold, **{**policy, "candidates": 4})
    run_select(config, tiny_pair.engine)
    decisions = list(read_decisions(run, tiny_pair.engine.tokenizer("student")))
    attempts = [r for d in decisions for r in d.rounds]
    own = run_reselect(ReselectConfig(run=str(run), output_dir=str(run / "own"), memory_bytes=1 << 24))
    rows = lines(run / "own" / "reselected.jsonl")
    assert own.largest_change < 1e-4
    assert [(row["round"], row["attempt"], row["decision"]) for row in rows] == [
        (r.record.round, r.record.attempt, r.record.decision) for r in attempts
    ]
    is_drawn = "selection_temperature" in policy
    assert (own.differing > 0) == is_drawn
    assert all(pair["chosen_score"] <= pair["rejected_score"] for pair in lines(run / "own" / "pairs.jsonl"))
    assert all(row["exact"] for row in rows) != is_drawn
    run_reselect(ReselectConfig(run=str(run), criterion="random", output_dir=str(run / "other"), memory_bytes=1 << 24))
    after_threshold: set[int] = set()
    for row, attempt in zip(lines(run / "other" / "reselected.jsonl"), attempts, strict=True):
        if any(c.verdict in ("threshold", "forced") for c in attempt.candidates):
            after_threshold.add(row["index"])
        assert not (row["exact"] and row["index"] in after_threshold)
    assert after_threshold


def test_a_calibration_knows_no_policy_and_no_budget(tiny_pair: TinyPair, write_rows: Write) -> None:
    data = read_usable_problems(str(write_rows(PROMPTS)), None, system_prompt=None)
    plain = SelectSettings(**SEARCH)
    odd = SelectSettings(
        **SEARCH, on_unlearnable="resample", selection_temperature=3.0, prompt_budget=Budget(tokens=8),
        total_budget=Budget(tokens=1, seconds=1e-9),
    )  # fmt: skip
    pool = OwnProcess(tiny_pair.engine)
    first, second = (calibrate(pool, data, options, fraction=0.9) for options in (plain, odd))
    assert first == second


def test_progress_ends_where_the_budget_does(tiny_pair: TinyPair) -> None:
    stages: list[Stage] = []
    recorder = Recorder()
    recorder.show = stages.append  # type: ignore[method-assign]
    recorder.begin("", unit="prompts", total=4, engine=tiny_pair.engine, work="writing",
                   budget=Budget(tokens=100, seconds=20.0))  # fmt: skip
    (stage,) = stages
    usage, stage.started = tiny_pair.engine.usage, 0.0
    assert measure(stage, 5.0).seconds_left == 15.0
    usage.plan([1000] * 4)
    usage.sampled_tokens += 40
    measured = measure(stage, 4.0)
    assert (measured.tokens_left, measured.seconds_left) == (60, 6.0)
    assert measure(stage, 19.5).seconds_left == 0.5
    usage.finish(4000, 40)
