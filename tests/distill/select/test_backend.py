"""`genssd select` with models that transformers computes: the journal of the own decoder, also after a crash."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import selections
from support.selections import PROMPTS
from support.tiny_pair import TinyPair
from support.toys import save_checkpoint

from genssd import Engine
from genssd.distill.runs.journal import CHECKSUM
from genssd.distill.select.config import SelectConfig
from genssd.distill.select.run import run_select
from genssd.engine.common.errors import InputError

Write = Callable[..., Path]


def config_for(pair: TinyPair, data: Path, output_dir: Path, **changes: Any) -> SelectConfig:
    return selections.config_for(pair, data, output_dir, **{"dtype": "float32", "backend": "transformers", **changes})


def lines(path: Path) -> list[dict[str, Any]]:
    return sorted((json.loads(line) for line in path.read_text().splitlines()), key=lambda row: row["index"])


def assert_same(mine: Any, theirs: Any) -> None:
    """Equal but for the last digits of numbers."""
    if isinstance(mine, dict):
        assert mine.keys() == theirs.keys()
        for key, value in mine.items():
            assert_same(value, theirs[key])
    elif isinstance(mine, list):
        assert len(mine) == len(theirs)
        for a, b in zip(mine, theirs, strict=True):
            assert_same(a, b)
    elif isinstance(mine, float):
        assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-4)
    else:
        assert mine == theirs


def test_the_journals_are_those_of_the_own_decoder(tiny_pair: TinyPair, write_rows: Write, tmp_path: Path) -> None:
    data = write_rows(PROMPTS)
    run_select(config_for(tiny_pair, data, tmp_path / "other"))
    run_select(config_for(tiny_pair, data, tmp_path / "own", backend="genssd"))
    for name in ("selections.jsonl", "decisions.jsonl"):
        mine, theirs = (
            [{k: v for k, v in row.items() if k != CHECKSUM} for row in lines(tmp_path / run / name)]
            for run in ("own", "other")
        )
        assert_same(mine, theirs)


def test_a_run_that_was_cut_off_resumes_to_the_same_bytes(
    tiny_pair: TinyPair, write_rows: Write, tmp_path: Path
) -> None:
    save_checkpoint(tmp_path / "student", "lfm2", num_hidden_layers=3, layer_types=["conv", "full_attention", "conv"])
    pair = dataclasses.replace(tiny_pair, student=tmp_path / "student")
    data = write_rows(PROMPTS)
    config = config_for(pair, data, tmp_path / "run", backend="auto")
    engine = Engine.from_pretrained(pair.teacher, pair.student, dtype="float32", memory_bytes=1 << 24)
    run_select(config, engine)
    names = ("selections.jsonl", "decisions.jsonl")
    whole = {name: lines(tmp_path / "run" / name) for name in names}
    for name in names:
        journal = (tmp_path / "run" / name).read_bytes().splitlines(keepends=True)
        (tmp_path / "run" / name).write_bytes(journal[0] + journal[1][:20])
    (tmp_path / "run" / "summary.json").unlink()
    run_select(dataclasses.replace(config, resume=True), engine)
    assert {name: lines(tmp_path / "run" / name) for name in names} == whole
    with pytest.raises(InputError, match="backend"):
        run_select(dataclasses.replace(config, resume=True, backend="transformers"), engine)
