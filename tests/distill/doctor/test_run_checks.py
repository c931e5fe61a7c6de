"""Findings about settings and about the run in an output directory, and the configs of recorded runs."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.configs import config_of
from support.doctor import PROBLEMS, one, open_for, write_rows
from support.small_runs import make_small_runs
from support.tiny_pair import TinyPair
from support.toys import edit_json

from genssd.distill.doctor.recorded import read_recorded
from genssd.distill.doctor.run_checks import check_run, check_settings
from genssd.distill.doctor.settings import EXAMINED, make_settings, read_settings
from genssd.distill.runs.chat_settings import choose_date
from genssd.distill.select.config import SelectConfig
from genssd.distill.select.run import run_select
from genssd.engine.common.errors import InputError
from genssd.engine.decoding.chunk import Chunk


@pytest.fixture
def fields(tiny_pair: TinyPair, tmp_path: Path) -> dict[str, Any]:
    data = write_rows(tmp_path / "d.jsonl", PROBLEMS)
    return {"teacher": str(tiny_pair.teacher), "student": str(tiny_pair.student), "data": data}


def test_settings_without_effect_and_settings_that_are_refused(fields: dict[str, Any]) -> None:
    found = one(check_settings(open_for("select", **fields)))
    assert (found.level, found.line) == ("ok", "of `genssd select`")
    found = one(check_settings(open_for("select", **fields, max_resamples=5)))
    assert found.level == "error"
    assert "max_resamples=5 has no effect" in found.line
    found = one(check_settings(open_for("select", **fields, criterion="aslec_casl")))
    assert found.level == "error"
    assert "cannot judge chunks: it is fitted over all of the data" in found.line


@pytest.mark.parametrize("command", ["select", "train", "distill"])
def test_a_run_in_the_output_directory(command: str, tiny_pair: TinyPair, tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    small = make_small_runs(tiny_pair, tmp_path / "files")[command]
    small.run(tmp_path / "run")
    config = dataclasses.replace(small.config, output_dir=str(tmp_path / "run"))
    settings = read_settings(command, config)
    inputs = open_for("evaluate", model=str(tiny_pair.student), data=write_rows(tmp_path / "d.jsonl", PROBLEMS))
    inputs = dataclasses.replace(inputs, settings=settings)
    found = one(check_run(inputs))
    assert found.level == ("ok" if command == "train" else "error")  # a training is refused by its checkpoints
    ending = ", whose settings are compared" if command == "train" else " with these settings"
    assert f"holds a run of `genssd {command}`{ending}" in found.line
    assert "pass --resume" in str(found.fix)
    # the record gives the same config again, nested options and tuples included
    fixed = {"threads": 1, "template_date": choose_date(config)} if command == "train" else {}
    shutil.move(tmp_path / "run", tmp_path / "moved")
    expected = dataclasses.replace(config, output_dir=str(tmp_path / "moved"), **fixed)
    assert read_recorded(str(tmp_path / "moved")) == (command, expected)
    shutil.move(tmp_path / "moved", tmp_path / "run")
    if command != "train":
        changed = dataclasses.replace(config, system_prompt="Be brief.")
        found = one(check_run(dataclasses.replace(inputs, settings=read_settings(command, changed))))
        assert found.level == "error"
        assert "was begun with system_prompt=None, not 'Be brief.'" in found.line
    edit_json(tmp_path / "run" / "run.json", command="score")
    found = one(check_run(inputs))
    assert found.level == "error"
    assert "belongs to a run of `genssd score`" in found.line


def test_a_length_of_chunks_that_the_run_chose_is_no_other_setting(fields: dict[str, Any], tmp_path: Path) -> None:
    config = SelectConfig(**fields, max_tokens=8, memory_bytes=1 << 22, output_dir=str(tmp_path / "run"))
    run_select(config)
    chosen = json.loads((tmp_path / "run" / "run.json").read_text())["settings"]["chunk.tokens"]
    assert chosen > 0
    resumed = {**fields, "max_tokens": 8, "resume": True, "output_dir": config.output_dir}
    assert one(check_run(open_for("select", **resumed))).level == "ok"
    other = one(check_run(open_for("select", **resumed, chunk=Chunk(tokens=chosen + 1))))
    assert f"was begun with chunk.tokens={chosen}, not {chosen + 1}" in other.line


def test_an_empty_directory_holds_no_run(fields: dict[str, Any], tmp_path: Path) -> None:
    assert check_run(open_for("select", **fields, output_dir=str(tmp_path))) == []


def test_records_that_cannot_be_examined(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no run: it has no run\.json"):
        read_recorded(str(tmp_path))
    record: dict[str, Any] = {
        "command": "score",
        "config": {},
        "settings": {},
        "versions": {"genssd": "0.1.0", "torch": "2", "transformers": "5"},
        "python": "3.11",
    }
    (tmp_path / "run.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match="runs of `genssd score` are not examined; examined are those of select"):
        read_recorded(str(tmp_path))
    (tmp_path / "run.json").write_text(json.dumps({**record, "command": "select", "config": {"gone": 1}}))
    with pytest.raises(InputError, match=r"run\.json: gone is no option of this version"):
        read_recorded(str(tmp_path))
    (tmp_path / "run.json").write_text(json.dumps({**record, "command": "select"}))
    with pytest.raises(InputError, match=r"run\.json: .*missing .* required keyword-only arguments"):
        read_recorded(str(tmp_path))


@pytest.mark.parametrize("command", EXAMINED)
def test_the_settings_of_every_command(command: str, tmp_path: Path) -> None:
    settings = read_settings(command, config_of(command, [str(tmp_path / "d.jsonl")]))
    assert settings.command == command
    assert settings.data == (str(tmp_path / "d.jsonl"),)
    assert "student" in settings.models
    assert ("teacher" in settings.models) is (command in ("select", "distill", "generate"))
    assert (settings.training is not None) is (command in ("train", "distill"))
    assert (settings.engine is None) is (command == "train")
    assert settings.needs_answers is (command in ("evaluate", "distill"))


@pytest.mark.parametrize(
    ("models", "responses", "command"),
    [
        ({"teacher": "t", "student": "s"}, False, "select"),
        ({"teacher": "t", "student": "s"}, True, "train"),
        ({"student": "s"}, True, "train"),
        ({"student": "s"}, False, "evaluate"),
        ({"teacher": "t"}, False, "generate"),
        ({"teacher": "t"}, True, "generate"),
    ],
)
def test_what_models_and_data_are_meant_for(models: Any, responses: bool, command: str) -> None:
    settings = make_settings(models, ("d",), has_responses=responses)
    assert settings.command == command
    assert settings.models == models
    assert make_settings(models, (), has_responses=False).command is None
