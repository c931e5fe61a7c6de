"""A threshold from the teacher's plain chunks."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.tiny_pair import TinyPair

from genssd.distill.select.beginning import check_search
from genssd.distill.select.calibration import worst_of_best
from genssd.distill.select.config import Calibrate, SelectConfig
from genssd.distill.select.run import run_select
from genssd.engine.common.errors import InputError
from genssd.engine.criteria.likelihood import Perplexity
from genssd.engine.decoding.chunk import Chunk

Write = Callable[..., Path]
CHUNK = Chunk(tokens=4, until=None)


@given(st.lists(st.integers(0, 20).map(float), min_size=1, max_size=30), st.floats(0.01, 1.0), st.booleans())
def test_at_least_the_worst_of_best_and_no_smaller_value_would_do(
    values: list[float], share: float, higher: bool
) -> None:
    ordered = sorted(values, reverse=higher)
    threshold = worst_of_best(ordered, share)

    def passing(limit: float) -> int:
        return sum(value >= limit if higher else value <= limit for value in values)

    assert passing(threshold) >= share * len(values) - 1e-6
    stricter = [value for value in values if (value > threshold if higher else value < threshold)]
    assert not stricter or passing(max(stricter) if not higher else min(stricter)) < share * len(values)


def select(pair: TinyPair, data: Path, out: Path, **options: Any) -> SelectConfig:
    config = SelectConfig(
        teacher=str(pair.teacher), student=str(pair.student), data=str(data), output_dir=str(out), chunk=CHUNK,
        max_tokens=12, **options,
    )  # fmt: skip
    run_select(config, pair.engine)
    return config


@pytest.mark.parametrize("criterion", ["ppl", "lalp(steps=1)"])
def test_the_threshold_is_the_quantile_of_plain_chunks_and_prunes(
    tiny_pair: TinyPair, write_rows: Write, tmp_path: Path, criterion: str
) -> None:
    held_out = write_rows([{"question": f"{i}-{i}?"} for i in range(6)], "held.jsonl")
    data = write_rows([{"question": f"{i}+{i}?"} for i in range(6)])
    options = {"criterion": criterion, "calibrate": Calibrate(data=str(held_out), share=0.5, limit=5)}
    select(tiny_pair, data, tmp_path / "run", candidates=2, **options)
    found = json.loads((tmp_path / "run" / "calibration.json").read_text())
    prompts = [[{"role": "user", "content": f"{i}-{i}?"}] for i in range(5)]
    plain = tiny_pair.engine.select_expand(
        prompts, candidates=1, chunk=CHUNK, criterion=criterion, max_tokens=12, loop_guard=None
    )
    values = sorted((c.score for s in plain for c in s.best.chunks), reverse=criterion != "ppl")
    assert found["threshold"] == pytest.approx(values[math.ceil(len(values) / 2) - 1], rel=1e-5)
    assert (found["chunks"], found["prompts"]) == (len(values), 5)
    assert found["shares"]["0.5"] == found["threshold"]
    rows = [json.loads(line) for line in (tmp_path / "run" / "decisions.jsonl").read_text().splitlines()]
    verdicts = [(c["verdict"], c["score"]) for row in rows for c in row["candidates"]]
    sign = 1 if criterion == "ppl" else -1
    assert all(sign * score <= sign * found["threshold"] for verdict, score in verdicts if verdict == "kept")
    assert any(verdict == "threshold" for verdict, _ in verdicts)


def test_seed_and_answers_reach_the_plain_samples(tiny_pair: TinyPair, write_rows: Write, tmp_path: Path) -> None:
    held_out = write_rows([{"question": f"{i}-{i}?", "answer": "0"} for i in range(3)], "held.jsonl")
    data = write_rows([{"question": "1+1?", "answer": "2"}])
    found = []
    for seed in (0, 1):
        options = {"criterion": "rationale_difficulty", "calibrate": Calibrate(data=str(held_out)), "seed": seed}
        select(tiny_pair, data, tmp_path / str(seed), **options)
        found.append(json.loads((tmp_path / str(seed) / "calibration.json").read_text())["threshold"])
    assert found[0] != found[1]


def test_an_infinite_threshold_is_none(
    tiny_pair: TinyPair, write_rows: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Perplexity, "score", lambda self, candidate: math.inf)
    data = write_rows([{"question": "1+1?"}])
    with pytest.raises(InputError, match=r"ppl is infinite at the share 0\.95"):
        select(tiny_pair, data, tmp_path / "run", calibrate=Calibrate(data=str(data)))


def test_a_resumed_run_keeps_its_threshold(tiny_pair: TinyPair, write_rows: Write, tmp_path: Path) -> None:
    held_out = write_rows([{"question": "1-1?"}], "held.jsonl")
    data = write_rows([{"question": f"{i}+{i}?"} for i in range(3)])
    calibrating = {"calibrate": Calibrate(data=str(held_out), share=1.0)}
    select(tiny_pair, data, tmp_path / "run", **calibrating)
    whole = (tmp_path / "run" / "selections.jsonl").read_text()
    (tmp_path / "run" / "selections.jsonl").write_text("".join(whole.splitlines(keepends=True)[:1]))
    held_out.write_text("no longer a row\n")
    select(tiny_pair, data, tmp_path / "run", resume=True, **calibrating)
    again = (tmp_path / "run" / "selections.jsonl").read_text()
    assert sorted(again.splitlines()) == sorted(whole.splitlines())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 1.0}, "not both"),
        ({"criterion": "lark"}, "no threshold that holds for all prompts"),
        ({"criterion": "0.5*ppl + 0.5*rsr"}, "no threshold that holds for all prompts"),
    ],
)
def test_what_cannot_be_calibrated(options: dict[str, Any], message: str) -> None:
    models = {"teacher": "t", "student": "s"}
    with pytest.raises(InputError, match=message):
        check_search(SelectConfig(**models, data="d", calibrate=Calibrate(data="held"), **options), ["t"], "s")
    for wrong in ({"limit": 0}, {"share": 0.0}, {"share": 1.5}):
        with pytest.raises(InputError, match="calibrate"):
            SelectConfig(teacher="t", student="s", data="d", calibrate=Calibrate(data="held", **wrong))  # type: ignore[arg-type]
