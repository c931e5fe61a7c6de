"""`genssd reproduce` at tiny sizes: equal tokens, one pool, interrupted and resumed, tables."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from genssd.distill.reproduce import run, small
from genssd.distill.reproduce.arm_lists import choose_arms
from genssd.distill.reproduce.arms import Arm
from genssd.distill.reproduce.config import ReproduceConfig
from genssd.distill.reproduce.making import Place, Rows
from genssd.distill.reproduce.oracle import EasyStyle
from genssd.distill.reproduce.plot import draw_plot
from genssd.distill.reproduce.results import compute_results
from genssd.distill.reproduce.run import run_reproduce, write_results
from genssd.distill.reproduce.table import replace_table
from genssd.distill.runs.journal import complete_rows, make_line
from genssd.engine.common.errors import InputError
from genssd.engine.criteria.candidate import Candidate
from genssd.kernels.logprob import TokenStats
from genssd.outputs import list_outputs
from genssd.reproduce_command import reproduce


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ReproduceConfig:
    monkeypatch.setattr(small, "exclude_pools", frozenset)
    monkeypatch.setattr(run, "draw_plot", lambda results: b"image")
    return ReproduceConfig(
        task="small", arms=("rsr", "cold-start"), seeds=1, problems=4, eval_problems=5, train_tokens=300, batch_size=4,
        candidates=2, threads=1, output_dir=str(tmp_path / "out"), table=str(tmp_path / "doc.md"),
    )  # fmt: skip


def read_journal(config: ReproduceConfig) -> list[dict[str, Any]]:
    rows = [row for row, _ in complete_rows(Path(config.output_dir) / "results.jsonl")]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def test_arms_are_compared_at_equal_tokens_and_resumed(config: ReproduceConfig, tmp_path: Path) -> None:
    (tmp_path / "doc.md").write_text("# Results\n")
    said: list[str] = []
    results = run_reproduce(config, said.append).results
    rows = {row["arm"]: row for row in read_journal(config)}
    assert list(rows) == ["cold-start", "standard", "random-of-n", "standard-4x", "rsr"]
    assert len(said) == 6
    longest = 4 * 160
    for arm in ("standard", "random-of-n", "standard-4x", "rsr"):
        assert 300 <= rows[arm]["train_tokens"] < 300 + longest, arm  # the step that reaches the budget is the last
        assert len(rows[arm]["correct"]) == 5
    assert rows["cold-start"]["train_tokens"] == rows["cold-start"]["teacher_tokens"] == 0
    assert rows["rsr"]["teacher_tokens"] == rows["random-of-n"]["teacher_tokens"] > rows["standard"]["teacher_tokens"]
    assert len(list(Path(config.output_dir).glob("seed-0/shipped/pool-*/rows/responses.jsonl"))) == 1
    assert not list(Path(config.output_dir).rglob("student/*.safetensors"))
    assert {(one.arm, one.control) for one in results.main} == {
        (arm, "standard") for arm in ("cold-start", "random-of-n", "standard-4x", "rsr")
    }
    text = (tmp_path / "doc.md").read_text()
    assert text.startswith("# Results\n")
    assert text.count("| rsr | RSR 2601.14249 |") == 1
    assert "vs standard" in text
    assert json.loads((tmp_path / "out" / "results.json").read_text())["arms"][0]["name"] == "cold-start"
    names = {f"{path.name}/" if path.is_dir() else path.name for path in (tmp_path / "out").iterdir()}
    named = [pattern for pattern, _ in list_outputs("reproduce", tmp_path / "out")]
    assert names - {".lock", "bad_rows.txt"} == {*named, "seed-0/"} - {"seed-*/"}

    # stopped after four arms, then resumed: the same results
    journal = tmp_path / "out" / "results.jsonl"
    before = read_journal(config)
    journal.write_bytes(b"".join(journal.read_bytes().splitlines(keepends=True)[:4]))
    with pytest.raises(InputError, match="pass --resume"):
        run_reproduce(config)
    run_reproduce(dataclasses.replace(config, resume=True))
    assert read_journal(config) == before
    with pytest.raises(InputError, match="begun with train_tokens=300, not 600"):
        run_reproduce(dataclasses.replace(config, resume=True, train_tokens=600))


def test_an_arm_without_rows_leaves_the_student_as_it_was(
    config: ReproduceConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "_read_trained_rows", lambda path, arm: [])
    run_reproduce(dataclasses.replace(config, arms=("cold-start",)))
    cold, standard = read_journal(config)
    assert standard["train_tokens"] == standard["rows"] == 0
    assert standard["correct"] == cold["correct"]


def test_an_arm_that_cannot_be_run_is_named_and_the_others_are_run(
    config: ReproduceConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_rows = run.make_rows

    def fail(arm: Arm, place: Place) -> Rows:
        if arm.name == "standard":
            raise InputError("no disk")
        return make_rows(arm, place)

    monkeypatch.setattr(run, "make_rows", fail)
    config = dataclasses.replace(config, arms=("standard", "cold-start"))
    with pytest.raises(InputError, match=r"(?s)1 arm could not be run, all others were; .*standard, seed 0: no disk"):
        reproduce(config, Console(quiet=True))
    assert "seed 0, cold-start: accuracy" in capsys.readouterr().out
    assert [row["arm"] for row in read_journal(config)] == ["cold-start"]
    assert "no disk" in (Path(config.output_dir) / "bad_rows.txt").read_text()
    monkeypatch.setattr(run, "make_rows", make_rows)
    reproduce(dataclasses.replace(config, resume=True), Console(quiet=True))
    assert [row["arm"] for row in read_journal(config)] == ["cold-start", "standard"]


def test_a_line_of_another_comparison_is_refused(config: ReproduceConfig) -> None:
    config = dataclasses.replace(config, arms=("standard",))
    run_reproduce(config)
    with (Path(config.output_dir) / "results.jsonl").open("ab") as journal:
        journal.write(make_line({"arm": "gone", "seed": 0, "correct": [True]}))
    with pytest.raises(InputError, match=r"results\.jsonl, line 2 is damaged: it is no result of an arm of small"):
        run_reproduce(dataclasses.replace(config, resume=True))


def test_a_table_does_not_go_into_a_file_that_is_no_text(config: ReproduceConfig, tmp_path: Path) -> None:
    (tmp_path / "doc.md").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match=r"table: .*doc\.md cannot be read as text"):
        write_results(tmp_path, config, [])
    assert (tmp_path / "doc.md").read_bytes() == b"\xff\xfe\x00"


@pytest.mark.plots
def test_the_plot_is_an_image() -> None:
    rows = [
        {
            **dict.fromkeys(("teacher_tokens", "student_tokens", "train_tokens", "rows", "seconds", "mean_tokens"), 9),
            **{"right": 1.0, "styles": {}, "arm": arm, "seed": seed, "correct": [arm == "gen-ssd", seed == 1]},
        }
        for arm in ("standard", "gen-ssd")
        for seed in range(2)
    ]
    assert draw_plot(compute_results(choose_arms("small", ()), rows)).startswith(b"\x89PNG")


def test_a_table_is_replaced_where_it_stands() -> None:
    once = replace_table("before\n", "first\n", "small")
    both = replace_table(once, "other\n", "words")
    again = replace_table(both, "second\n", "small")
    assert again.startswith("before\n")
    assert "first" not in again
    assert again.index("second") < again.index("other")


@pytest.mark.parametrize(
    ("text", "value"),
    [("34+57: 4+7=11, 91\n", 2.0), ("=91\n", 0.0), ("~81? No, 34+57: 4+7=11, 91\n", 1.0), ("\\boxed{91}", 1.0)],
)
def test_the_oracle_prefers_spelled_steps(text: str, value: float) -> None:
    ids = tuple(range(len(text)))
    candidate = Candidate(
        token_ids=ids, stats=TokenStats.empty(), final=False, finished=False, pieces_of=lambda _: list(text)
    )
    assert EasyStyle().score(candidate) == value
