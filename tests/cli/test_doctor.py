"""`genssd doctor` and `genssd env`: what is examined, exit codes, JSON, and the line of the other commands."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.configs import MODELS
from support.doctor import EXAMPLES, PROBLEMS
from support.tiny_pair import TinyPair
from support.toys import edit_json

from genssd.cli import main
from genssd.distill.doctor.console import FORMAT

Write = Callable[..., Path]
PAIR = ["--teacher", MODELS[0], "--student", MODELS[1]]
SMALL = ["--memory-bytes", str(1 << 26), "--max-tokens", "100"]
IMPORTED = """
import sys
from genssd.cli import main
try:
    main(sys.argv[1:])
finally:
    sys.exit("torch" if "torch" in sys.modules else "light")
"""


def run(*words: object) -> int:
    """Run a command line and return its exit code."""
    try:
        main(list(map(str, words)))
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def read_report(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    report = json.loads(capsys.readouterr().out)
    assert isinstance(report, dict)
    return report


def test_a_command_with_its_flags_is_examined(write_rows: Write, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("doctor", "select", *PAIR, "--data", write_rows(PROBLEMS), *SMALL) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.splitlines()[0] == "ok       settings: of `genssd select`"
    assert re.search(r"^\d+ ok, 0 warnings, 0 errors$", out.splitlines()[-1])
    assert "<|im_start|>user\n" in out
    assert all(len(line) <= 100 and line == line.rstrip() for line in out.splitlines())
    assert "\x1b" not in out


def test_exit_codes(write_rows: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_rows(PROBLEMS)
    words = ["doctor", "select", *PAIR, "--data", data]
    assert run(*words, *SMALL) == 0
    assert run(*words, "--memory-bytes", 1 << 26, "--max-tokens", 3000) == 1
    assert "\nwarning  lengths: after the longest prompt" in capsys.readouterr().out
    assert run(*words, *SMALL, "--max-resamples", 3) == 2
    assert "error    settings: max_resamples=3 has no effect" in capsys.readouterr().out
    (tmp_path / "empty.jsonl").write_text("")
    assert run("doctor", *PAIR, "--data", tmp_path / "empty.jsonl") == 2
    assert "has no rows" in capsys.readouterr().err


def test_json(write_rows: Write, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [*PROBLEMS, {"question": 3}]
    assert run("doctor", "--json", "select", *PAIR, "--data", write_rows(rows), *SMALL) == 1
    report = read_report(capsys)
    assert report.keys() == {"format", "command", "level", "counts", "findings"}
    assert (report["format"], report["command"], report["level"]) == (FORMAT, "select", "warning")
    assert report["counts"] == {"ok": len(report["findings"]) - 1, "warning": 1, "error": 0}
    for finding in report["findings"]:
        assert finding.keys() == {"name", "level", "line", "detail", "pieces", "fix"}
        assert finding["level"] in ("ok", "warning", "error")
        assert isinstance(finding["line"], str)
        assert finding["detail"] == "".join(piece["text"] for piece in finding["pieces"])
        assert all(piece.keys() == {"text", "mark", "is_control"} for piece in finding["pieces"])
        assert finding["fix"] is None or isinstance(finding["fix"], str)
    (warning,) = [finding for finding in report["findings"] if finding["level"] == "warning"]
    assert warning["name"] == "rows"
    assert "line 6" in warning["detail"]


@pytest.mark.parametrize(
    ("rows", "flags", "command"),
    [
        (PROBLEMS, PAIR, "select"),
        (EXAMPLES, PAIR, "train"),
        (EXAMPLES, PAIR[2:], "train"),
        (PROBLEMS, PAIR[2:], "evaluate"),
        (PROBLEMS, PAIR[:2], "generate"),
        (None, PAIR, None),
    ],
)
def test_models_and_data_by_themselves(
    rows: Any, flags: list[str], command: str | None, write_rows: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    data = [] if rows is None else ["--data", write_rows(rows)]
    run("doctor", "--json", *flags, *data)
    assert read_report(capsys)["command"] == command


@pytest.mark.parametrize(
    ("text", "more", "command"),
    [
        ("teacher: T\nstudent: S\ndata: D\nchunk: {tokens: 8}\n", [], "select"),
        ("teacher: T\nstudent: S\ndata: D\nselect: {candidates: 2}\n", [], "distill"),
        ("model_name_or_path: S\ndata: [D]\n", [], "train"),
        ("model: S\ndata: D\nsamples: 2\n", [], "evaluate"),
        ("teacher: T\nstudent: S\ndata: D\n", ["--command", "distill"], "distill"),
    ],
)
def test_a_config_file_is_read_as_that_of_its_command(
    text: str, more: list[str], command: str, write_rows: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_rows(EXAMPLES if command == "train" else PROBLEMS)
    text = text.replace("T\n", f"{MODELS[0]}\n").replace("S\n", f"{MODELS[1]}\n")
    (tmp_path / "c.yaml").write_text(text.replace("D", str(data)))
    run("doctor", "--json", "--config", tmp_path / "c.yaml", *more)
    report = read_report(capsys)
    assert report["command"] == command
    assert report["findings"][0]["line"] == f"of `genssd {command}`"


def test_a_run_is_examined_by_its_record(
    tiny_pair: TinyPair, write_rows: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = ["--teacher", tiny_pair.teacher, "--student", tiny_pair.student]
    words = ["--data", write_rows(PROBLEMS[:1]), "--output-dir", tmp_path / "run", "--candidates", 2]
    small = ["--memory-bytes", 1 << 22, "--max-tokens", 4, "--chunk.tokens", 4]
    assert run("select", *pair, *words, *small) == 0
    line = capsys.readouterr().err.splitlines()[0]
    assert re.fullmatch(r"genssd: \d+ checks before loading: all ok", line)
    assert run("doctor", "--run", tmp_path / "run") == 0
    out = capsys.readouterr().out
    assert f"ok       run: {tmp_path / 'run'} holds a run of" in " ".join(out.split("\n         "))
    edit_json(tmp_path / "run" / "run.json", command="tune")
    assert run("doctor", "--run", tmp_path / "run") == 2
    assert "runs of `genssd tune` are not examined" in capsys.readouterr().err


def test_verify_loads_the_models(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("doctor", "--verify", "--student", MODELS[1]) == 0
    out = capsys.readouterr().out
    assert "ok       engine against transformers, student: log-probabilities of " in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "doctor examines one of a command with its flags, --config, --run, or models .*, not nothing"),
        (["--run", "r", "--student", MODELS[1]], "not --run and models|run.json cannot be read"),
        (["--data", __file__], "doctor needs the models that the data are for"),
        (["tune", "--student", MODELS[1]], "doctor does not examine `genssd tune`; it examines select, train"),
        (["select", "--student", "/nowhere"], "model directory /nowhere does not exist"),
        (["select", *PAIR], "--data"),
        (["--rows", "0", "--student", MODELS[1]], "rows must be at least 1, not 0"),
        (["--verify-seconds", "0", "--student", MODELS[1]], "verify_seconds must be above 0"),
        (["--command", "train", "--student", MODELS[1]], "command names what a config file is for"),
        (["--nonsense"], "nonsense"),
    ],
)
def test_words_that_name_nothing_to_examine(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("doctor", *words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.search(message, err)
    assert len(err.splitlines()) == 1


def test_the_unknown_key_of_a_config_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.yaml").write_text(f"model_name_or_path: {MODELS[1]}\ndata: [{__file__}]\nlearning_rat: 1\n")
    assert run("doctor", "--config", tmp_path / "c.yaml") == 2
    assert "unknown key 'learning_rat'; did you mean 'learning_rate'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("files", "words", "message"),
    [
        ({"c.yaml": "teacher: [\n"}, ["--config", "c.yaml"], "config file c.yaml is not valid YAML"),
        ({"c.yaml": "teacher: ./none\n"}, ["--config=c.yaml"], "model directory ./none does not exist"),
        ({"c.yaml": "train: {eval_data: [a.jsonl]}\n"}, ["--config", "c.yaml"], "a.jsonl cannot be read"),
        ({}, ["--config", "c.yaml"], "config file c.yaml cannot be read"),
        ({}, ["--run", "none"], "none/run.json cannot be read"),
        ({"run.json": "{"}, ["--run", "."], "run.json is not valid JSON"),
        ({}, ["select", "--data", "a.jsonl"], "a.jsonl cannot be read"),
    ],
)
def test_files_are_refused_before_torch_is_imported(
    files: dict[str, str], words: list[str], message: str, tmp_path: Path
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    done = subprocess.run(
        [sys.executable, "-c", IMPORTED, "doctor", *words], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    line, state = done.stderr.splitlines()
    assert message in line
    assert state == "light"


def test_a_command_says_what_the_doctor_finds_and_goes_on(
    tiny_pair: TinyPair, write_rows: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"question": "a", "response": "b" * count} for count in (3, 600)]
    words = ["--model-name-or-path", tiny_pair.student, "--data", write_rows(rows), "--max-steps", 1]
    assert run("train", *words, "--output-dir", tmp_path / "run") == 0
    out, err = capsys.readouterr()
    assert "1 step on 1 example" in out
    lines = [line for line in err.splitlines() if "genssd doctor" in line]
    assert len(lines) == 1
    assert lines[0].startswith(
        "genssd: warning: rows: 1 of 2 rows can be used (and 1 more); `genssd doctor train` with"
    )


def test_what_a_command_refuses_it_refuses_by_itself(
    tiny_pair: TinyPair, write_rows: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--teacher", tiny_pair.teacher, "--student", tiny_pair.student, "--output-dir", tmp_path / "out"]
    assert run("select", *words, "--data", write_rows([{"answer": "1"}])) == 2
    err = capsys.readouterr().err
    assert "doctor" not in err
    assert "none of which can be used" in err


def test_env(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("env") == 0
    out = capsys.readouterr().out
    assert re.search(r"^genssd: \d", out)
    assert "\nprocessor: " in out
    assert "\nkernels of avx2: " in out


def test_a_fault_of_the_doctor_stops_no_command(
    tiny_pair: TinyPair,
    write_rows: Write,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(settings: object) -> None:
        raise KeyError("some bug")

    monkeypatch.setattr("genssd.doctor_command.summarise", fail)
    words = ["--model-name-or-path", tiny_pair.student, "--data", write_rows(EXAMPLES), "--max-steps", 1]
    assert run("train", *words, "--output-dir", tmp_path / "run") == 0
    out, err = capsys.readouterr()
    assert "1 step on 5 examples" in out
    assert "the doctor failed and is left out, please report it: KeyError: 'some bug'" in err


def test_on_a_cluster_the_doctor_examines_what_is_here(
    write_rows: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("doctor", "select", *PAIR, "--data", write_rows(PROBLEMS), *SMALL, "--ray") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "memory of the engine: that of every node of the Ray cluster is known when its actors have loaded" in said
    assert run("doctor", "select", *PAIR, "--data", tmp_path, *SMALL, "--ray") == 2
    assert (
        "is read through Ray, which the doctor does not start; examine a file with some of" in capsys.readouterr().err
    )
