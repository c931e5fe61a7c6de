"""What one sees of a search while it runs: its counts, metrics.jsonl, a monitor, and the lines of --peek."""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
import weakref
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from support.doctor import write_rows
from support.tiny_pair import TinyPair

from genssd import Chunk
from genssd.distill.console import describe
from genssd.distill.runs.progress import Stage, measure
from genssd.distill.select.config import SelectConfig
from genssd.distill.select.generate import run_generate
from genssd.distill.select.generate_config import GenerateConfig
from genssd.distill.select.run import run_select
from genssd.engine.common.errors import InputError
from genssd.engine.common.outcomes import KEPT
from genssd.engine.search.selection import CandidateRecord, RoundRecord

PROBLEMS = [{"prompt": f"{i} + {i} =", "answer": str(2 * i)} for i in range(1, 6)]
SEARCH: dict[str, Any] = {"candidates": 3, "chunk": Chunk(tokens=6, until=None), "max_tokens": 24, "seed": 3}


def make_config(pair: TinyPair, directory: Path, **changes: Any) -> SelectConfig:
    data = write_rows(directory / "p.jsonl", PROBLEMS)
    fields = {"teacher": str(pair.teacher), "student": str(pair.student), "data": data, **SEARCH}
    return SelectConfig(**{**fields, "output_dir": str(directory / "run"), "logging_steps": 2, **changes})


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_counts_are_those_of_the_records(tiny_pair: TinyPair) -> None:
    engine = tiny_pair.engine
    before = dataclasses.replace(engine.usage)
    rounds: list[tuple[int, int, RoundRecord]] = []

    def watch(index: int, candidates: list[CandidateRecord], round_: RoundRecord) -> None:
        rounds.append((index, len(candidates), round_))

    prompts = [row["prompt"] for row in PROBLEMS]
    selections = list(engine.iter_select_expand(prompts, watch=watch, **SEARCH))
    records = [record for selection in selections for record in selection.tree]
    kept = [record for record in records if record.verdict in KEPT]
    assert engine.usage.judged_candidates - before.judged_candidates == len(records)
    assert engine.usage.kept_candidates - before.kept_candidates == len(kept)
    assert engine.usage.kept_tokens - before.kept_tokens == sum(len(record.token_ids) for record in kept)
    assert sum(count for _, count, _ in rounds) == len(records)
    for selection in selections:
        assert [round_ for index, _, round_ in rounds if index == selection.index] == list(selection.rounds)


def test_the_progress_line_has_the_counts(tiny_pair: TinyPair) -> None:
    engine = tiny_pair.engine

    stage = Stage(name="", unit="prompts", total=1, engine=weakref.ref(engine), work="writing")
    stage.usage_before = dataclasses.replace(engine.usage)
    (selection,) = engine.select_expand([PROBLEMS[0]["prompt"]], **SEARCH)
    measured = measure(stage, stage.started + 2.0)
    kept = [record for record in selection.tree if record.verdict in KEPT]
    assert measured.pruned == pytest.approx(1 - len(kept) / len(selection.tree))
    line = describe("select", stage, measured)
    assert (
        f"{sum(len(record.token_ids) for record in kept)} kept, {measured.pruned:.0%} of the candidates pruned" in line
    )
    assert f"tokens/s written, {measured.scored / 2:.0f} scored" in line


@pytest.mark.usefixtures("forked_workers")
@pytest.mark.parametrize("processes", [None, 2])
def test_metrics_of_select(tiny_pair: TinyPair, tmp_path: Path, processes: int | None) -> None:
    config = make_config(tiny_pair, tmp_path, processes=processes, memory_bytes=1 << 24)
    run_select(config)
    rows = read_lines(tmp_path / "run/metrics.jsonl")
    assert [row["step"] for row in rows] == [2, 4, 5]
    last = rows[-1]
    decisions = read_lines(tmp_path / "run/decisions.jsonl")
    candidates = [one for line in decisions for one in line["candidates"]]
    assert last["pruned"] == pytest.approx(
        1 - sum(c["verdict"] in KEPT for c in candidates) / len(candidates), abs=1e-5
    )
    selections = read_lines(tmp_path / "run/selections.jsonl")
    assert last["tokens_sampled"] == sum(row["tokens_sampled"] for row in selections)
    assert last["correct"] == pytest.approx(sum(row["correct"] is True for row in selections) / len(selections))
    assert last["student_tokens_per_second"] > 0


def test_a_resumed_run_appends_and_cuts_a_torn_line(tiny_pair: TinyPair, tmp_path: Path) -> None:
    config = make_config(tiny_pair, tmp_path, limit=3)
    run_select(config, tiny_pair.engine)
    path = tmp_path / "run/metrics.jsonl"
    with path.open("a") as file:
        file.write('{"step": 4, "tok')
    run_select(dataclasses.replace(config, limit=None, resume=True), tiny_pair.engine)
    assert [row["step"] for row in read_lines(path)] == [2, 3, 4, 5]


def test_metrics_of_generate_and_their_monitor(
    tiny_pair: TinyPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """trackio is not installed: a module of its interface records what it is given."""
    logged: list[tuple[int, Mapping[str, float]]] = []

    class FakeRun:
        def log(self, metrics: Mapping[str, float], step: int) -> None:
            logged.append((step, metrics))

        def finish(self) -> None:
            logged.append((-1, {}))

    module: Any = ModuleType("trackio")
    module.init = lambda **options: FakeRun()
    data = write_rows(tmp_path / "p.jsonl", PROBLEMS)
    config = GenerateConfig(
        teacher=str(tiny_pair.teacher), data=data, max_tokens=8, output_dir=str(tmp_path / "run"), report_to="trackio"
    )
    with pytest.raises(InputError, match="report_to=trackio needs the package trackio"):
        run_generate(config, tiny_pair.engine)
    monkeypatch.setitem(sys.modules, "trackio", module)
    monkeypatch.setattr("genssd.distill.runs.metrics.find_spec", lambda name: module)
    run_generate(config, tiny_pair.engine)
    (row,) = read_lines(tmp_path / "run/metrics.jsonl")
    (step, values), end = logged
    assert step == row["step"] == len(PROBLEMS)
    assert values == {name: value for name, value in row.items() if name not in ("step", "checksum")}
    assert end == (-1, {})
    assert "pruned" not in values


@pytest.mark.usefixtures("forked_workers")
@pytest.mark.parametrize("processes", [None, 2])
def test_peek_shows_the_rounds_of_the_first_prompt(
    tiny_pair: TinyPair, tmp_path: Path, caplog: pytest.LogCaptureFixture, processes: int | None
) -> None:
    config = make_config(tiny_pair, tmp_path, peek=True, processes=processes, memory_bytes=1 << 24)
    with caplog.at_level(logging.INFO, "genssd"):
        run_select(config)
    shown = [record.getMessage() for record in caplog.records if ", round " in record.getMessage()]
    (decided,) = [line for line in read_lines(tmp_path / "run/decisions.jsonl") if line["index"] == 0]
    assert len(shown) == len(decided["rounds"])
    for number, text in enumerate(shown, start=1):
        first, *lines = text.splitlines()
        assert first.startswith(f"{config.data}, line 1, round {number}: 1 of ")
        verdicts = sorted(one["verdict"] for one in decided["candidates"] if len(one["trace"]) == number)
        assert sorted(line.split()[2].rstrip(":,") for line in lines) == verdicts
        assert [line.split()[0] for line in lines] == ["+", *["-"] * (len(lines) - 1)]


@pytest.mark.parametrize("config_class", [SelectConfig, GenerateConfig])
def test_logging_steps_must_be_positive(config_class: Any) -> None:
    with pytest.raises(InputError, match="logging_steps must be at least 1, not 0"):
        config_class(teacher="t", student="s", data="d", logging_steps=0)


def test_overwrite_begins_anew_and_leaves_files_of_the_user(tiny_pair: TinyPair, tmp_path: Path) -> None:
    config = make_config(tiny_pair, tmp_path, limit=3)
    run_select(config, tiny_pair.engine)
    directory = tmp_path / "run"
    (directory / "notes.txt").write_text("mine")
    (directory / "calibration.json").write_text("of an earlier run")
    with pytest.raises(InputError, match="pass --resume to go on, --overwrite to begin anew"):
        run_select(dataclasses.replace(config, seed=4), tiny_pair.engine)
    with pytest.raises(InputError, match="give one of them"):
        run_select(dataclasses.replace(config, resume=True, overwrite=True), tiny_pair.engine)
    run_select(dataclasses.replace(config, seed=4, limit=2, overwrite=True), tiny_pair.engine)
    assert {row["index"] for row in read_lines(directory / "selections.jsonl")} == {0, 1}
    assert len(read_lines(directory / "decisions.jsonl")) == 2
    assert json.loads((directory / "run.json").read_text())["settings"]["seed"] == 4
    assert (directory / "notes.txt").read_text() == "mine"
    assert not (directory / "calibration.json").exists()
    generate = GenerateConfig(teacher=config.teacher, data=config.data, output_dir=str(directory), overwrite=True)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="belongs to a run of `genssd select`"):
        run_generate(generate, tiny_pair.engine)
