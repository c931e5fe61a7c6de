"""Names that are not there, and directories that are taken, are refused before torch is imported, in the same words."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest

from genssd.configs import CONFIGS
from genssd.distill.files.rows import read_rows
from genssd.distill.runs.directory import claim_directory
from genssd.distill.runs.field_kinds import Kind, Marker
from genssd.distill.runs.output_files import JOURNALS, OUTPUTS
from genssd.early_checks import DATA_FILES, MODELS, TOKENIZERS, UNCHECKED, check_names, check_output
from genssd.engine.checkpoints.checkpoint import locate
from genssd.engine.common.errors import CheckpointError, InputError
from genssd.flags import read_config

IMPORTED = """
import sys
from genssd.cli import main
try:
    main(sys.argv[1:])
finally:
    sys.exit("torch" if "torch" in sys.modules else "light")
"""


def iter_names(config: type, prefix: str = "") -> Iterator[tuple[str, set[object]]]:
    """Yield the flags of a config that name something in the file system, and their marks."""
    hints = typing.get_type_hints(config, include_extras=True)
    for field in dataclasses.fields(config):
        marks = set(getattr(hints[field.name], "__metadata__", ()))
        name = f"{prefix}{field.name.replace('_', '-')}"
        if isinstance(field.default_factory, type) and dataclasses.is_dataclass(field.default_factory):
            yield from iter_names(field.default_factory, f"{name}.")
        elif marks & {Marker.FILE_NAME, Kind.MODEL, Kind.NAMED_MODEL, Kind.DATA_FILE}:
            yield name, marks


@pytest.mark.parametrize("command", CONFIGS)
def test_every_flag_that_names_a_file_or_a_model_is_known(command: str) -> None:
    for name, marks in iter_names(CONFIGS[command]):
        if marks & {Kind.MODEL, Kind.NAMED_MODEL}:
            assert name in MODELS
        elif Kind.DATA_FILE in marks:
            assert name in DATA_FILES
        else:
            assert name in DATA_FILES | TOKENIZERS | UNCHECKED


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        (["--student", "/nowhere/model", "--data", "d.jsonl"], "/nowhere/model"),
        (["--teacher_model_name_or_path=./nowhere"], "./nowhere"),
        (["--teacher", ".", "nowhere", "--data", "x"], "nowhere"),
        (["--data", "there.jsonl", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--train.eval-data=~/nowhere.jsonl"], "HOME/nowhere.jsonl"),
        (["--data", "https://example.org/x.jsonl"], "https://example.org/x.jsonl"),
        (["--data="], ""),
    ],
)
def test_the_words_are_those_of_the_commands(
    flags: list[str], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "there.jsonl").write_text("{}\n")
    with pytest.raises((CheckpointError, InputError)) as refused:
        check_names(flags)
    name = name.replace("HOME", str(tmp_path))
    with pytest.raises(type(refused.value)) as late:
        locate(name) if refused.type is CheckpointError else next(read_rows(name))
    assert str(refused.value) == str(late.value)


@pytest.mark.parametrize(
    "flags",
    [
        ["--student", "org/name", "--data", "org/name:train"],
        ["--data", "-", "--student", ".", "--teacher", "None"],
        ["--data", "/nowhere.jsonl", "--data", "there.jsonl"],
        ["--data", "/nowhere.jsonl", "--help"],
        ["--output-dir", "/nowhere", "--teacher"],
    ],
)
def test_what_may_be_there_is_left_to_the_commands(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.jsonl").write_text("{}\n")
    check_names(flags)


def test_nothing_large_is_imported_before(tmp_path: Path) -> None:
    words = ["select", "--teacher", ".", "--student", ".", "--data", "nowhere.jsonl"]
    done = subprocess.run(
        [sys.executable, "-c", IMPORTED, *words], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.stderr.splitlines() == ["genssd: nowhere.jsonl cannot be read: No such file or directory", "light"]


@dataclasses.dataclass(frozen=True)
class Place:
    """What a config says of its output directory."""

    output_dir: str
    resume: bool = False
    overwrite: bool = False


@pytest.mark.parametrize("command", JOURNALS)
def test_finished_work_is_refused_unless_it_is_gone_on_with_or_removed(command: str, tmp_path: Path) -> None:
    place = Place(str(tmp_path))
    check_output(command, place)
    (tmp_path / "run.json").write_text(json.dumps({"command": command}))
    journal = tmp_path / JOURNALS[command]
    journal.write_text('{"index": 0')  # torn: nothing is finished
    check_output(command, place)
    journal.write_text("{}\n")
    with pytest.raises(InputError, match=rf"^{journal} holds finished work already; pass --resume to go on, --over"):
        check_output(command, place)
    check_output(command, dataclasses.replace(place, resume=True))
    check_output(command, dataclasses.replace(place, overwrite=True))
    for other in {"train", "select", "score"} - {command}:
        with pytest.raises(InputError, match=f"^{tmp_path} belongs to a run of `genssd {command}`; choose another"):
            check_output(other, dataclasses.replace(place, resume=True))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["run.json", journal.name])


def test_a_directory_in_use_is_refused_and_its_holder_not_disturbed(tmp_path: Path) -> None:
    place = Place(str(tmp_path / "out"), resume=True)
    with claim_directory(tmp_path / "out", "select"):
        with pytest.raises(InputError, match=r"another run is at work in .*out; wait for it, or choose another"):
            check_output("select", place)
        with pytest.raises(InputError, match="another run is at work in"), claim_directory(tmp_path / "out", "select"):
            pass
    check_output("select", place)


def test_a_directory_that_cannot_be_examined_is_left_to_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".lock").mkdir()
    check_output("select", Place(str(tmp_path)))
    check_output("select", Place(str(tmp_path / ("x" * 300))))
    (tmp_path / "file").touch()
    check_output("select", Place(str(tmp_path / "file")))
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run").mkdir()
    (tmp_path / "run/run.json").write_text('{"command": "score"}')
    with pytest.raises(InputError, match="run belongs to a run of `genssd score`"):
        check_output("train", Place("~/run"))


def test_every_journal_is_that_of_its_command() -> None:
    for command, journal in JOURNALS.items():
        assert journal in OUTPUTS[command], command


def test_finished_work_is_refused_before_torch_is_imported(tmp_path: Path) -> None:
    for name, text in {"run.json": '{"command": "generate"}', "responses.jsonl": "{}\n", "d.jsonl": "{}\n"}.items():
        (tmp_path / name).write_text(text)
    words = ["generate", "--teacher", ".", "--data", "d.jsonl", "--output-dir", "."]
    done = subprocess.run([sys.executable, "-c", IMPORTED, *words], cwd=tmp_path, capture_output=True, text=True)
    message, imported = done.stderr.splitlines()
    assert message.startswith("genssd: responses.jsonl holds finished work already; pass --resume to go on")
    assert imported == "light"


@pytest.mark.parametrize("flags", [["--ray"], ["--ray", "auto"], ["--select.ray"], ["--config", "c.yaml"]])
def test_what_a_cluster_reads_is_left_to_it(flags: list[str], tmp_path: Path) -> None:
    check_names(["--data", str(tmp_path), "s3://bucket/x", *flags])
    with pytest.raises(InputError, match=r"nowhere\.jsonl cannot be read"):
        check_names(["--data", "nowhere.jsonl", *flags])


def test_a_cluster_of_this_machine_needs_no_word() -> None:
    given = ["--teacher", "t", "--student", "s", "--data", "d"]
    for flags in (["--ray", *given], [*given, "--ray"], [*given, "--ray", "local"], [*given, "--ray=local"]):
        assert read_config("select", flags, CONFIGS["select"]).ray == "local"
    assert read_config("select", [*given, "--ray", "h:6379"], CONFIGS["select"]).ray == "h:6379"
    assert read_config("select", given, CONFIGS["select"]).ray is None
