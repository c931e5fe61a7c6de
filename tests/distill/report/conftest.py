"""Small runs that the tests of the page share."""

from __future__ import annotations

import dataclasses
import json

import pytest
from support.report_runs import QUESTIONS, Runs
from support.selections import config_for
from support.small_runs import make_small_runs
from support.tiny_pair import TinyPair

from genssd.distill.select.run import run_select


@pytest.fixture(scope="session")
def runs(tiny_pair: TinyPair, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    base = tmp_path_factory.mktemp("report")
    data = base / "questions.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    search = config_for(tiny_pair, data, base / "select", candidates=4, max_tokens=12, seed=3)
    run_select(dataclasses.replace(search, threshold=2000.0), tiny_pair.engine)
    beam = dataclasses.replace(search, output_dir=str(base / "beam"), beam=2, selection_temperature=50.0)
    run_select(beam, tiny_pair.engine)
    small = make_small_runs(tiny_pair, base)
    several = dataclasses.replace(small["generate"].config, n=2, teacher_states=None)
    dataclasses.replace(small["generate"], config=several).run(base / "generate")
    small["distill"].run(base / "distill")
    return Runs(select=base / "select", beam=base / "beam", generate=base / "generate", distill=base / "distill")
