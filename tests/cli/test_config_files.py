"""`--print-config` writes a file that `--config` reads back to the same settings; so is the record of a run."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.flags import FLAGS

from genssd.cli import main
from genssd.config_text import render_config
from genssd.configs import CONFIGS
from genssd.engine.common.errors import InputError
from genssd.flag_list import list_flags
from genssd.flags import read_config, read_incomplete

COMMANDS = [command for command in CONFIGS if command != "doctor"]
"""Commands whose options a config file can hold; the doctor's --config is what it examines."""
ODD = [
    *("--teacher", "./1e5", "--student", "true", "--data", "- d: #.jsonl", "--output-dir", "\u00e9t\u00e9/null"),
    *("--threshold", "inf", "--chunk.until", "\n\n", "--sampling.top-p", "1e-05", "--no-loop-guard"),
    *("--system-prompt", "one: two\nthree", "--chat-template-kwargs", "a=1", '{"b": [1, "x"]}'),
    *("--total-budget.seconds", "2.5", "--criterion", "0.7*rsr + 0.3*ppl(norm='byte')"),
]


def print_config(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    main([*words, "--print-config"])
    return capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("is_odd", [False, True])
def test_what_is_printed_is_read_back(
    command: str, is_odd: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ODD if is_odd and command == "select" else FLAGS[command]
    path = tmp_path / "config.yaml"
    path.write_text(print_config(capsys, command, *flags))
    assert read_config(command, ["--config", str(path)], CONFIGS[command]) == read_config(
        command, flags, CONFIGS[command]
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_the_file_has_every_option_with_its_help_text(command: str) -> None:
    config = read_config(command, FLAGS[command], CONFIGS[command])
    text = render_config(command, config, ())
    fields = yaml.safe_load(text) or {}
    comments = " ".join(line.strip().removeprefix("# ") for line in text.splitlines() if line.lstrip().startswith("#"))
    for flag in list_flags(CONFIGS[command]):
        value: Any = fields
        for part in flag.name.split("."):
            assert part in value, flag.name
            value = value[part]
        assert flag.help in comments, flag.name
        assert flag.section in comments, flag.name


def test_required_options_that_are_not_given_are_comments(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    text = print_config(capsys, "select", "--teacher", "t")
    assert {"# student:", "# data:", "teacher: t"} <= set(text.splitlines())
    assert "to-be-given" not in text
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=r"Missing from genssd select: .*--student .*--data"):
        read_config("select", ["--config", str(path)], CONFIGS["select"])
    completed = read_config("select", ["--config", str(path), "--student", "s", "--data", "d"], CONFIGS["select"])
    assert (completed.teacher, completed.student) == ("t", "s")
    _, missing = read_incomplete("report", [], CONFIGS["report"])
    assert missing == {"run"}
    _, missing = read_incomplete("report", ["runs/a"], CONFIGS["report"])
    assert not missing


@pytest.mark.parametrize("command", COMMANDS)
def test_the_record_of_a_run_is_read_as_a_config(command: str, tmp_path: Path) -> None:
    config = read_config(command, FLAGS[command], CONFIGS[command])
    record = {"command": command, "config": dataclasses.asdict(config), "settings": {}, "versions": {"genssd": "0"}}
    path = tmp_path / "run.json"
    path.write_text(json.dumps(record))
    assert read_config(command, ["--config", str(path)], CONFIGS[command]) == config
    other = "train" if command != "train" else "select"
    with pytest.raises(InputError, match=f"is the record of a run of `genssd {command}`, not of `genssd {other}`"):
        read_config(other, ["--config", str(path)], CONFIGS[other])


def test_the_doctor_has_no_config_file_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["doctor", "--print-config"])
    assert "`genssd doctor` reads no config file of its own options" in capsys.readouterr().err
