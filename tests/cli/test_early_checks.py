"""Names that are not there are refused before torch is imported, with the words of the commands."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest

from genssd.configs import CONFIGS
from genssd.distill.files.rows import read_rows
from genssd.distill.runs.field_kinds import Kind, Marker
from genssd.early_checks import DATA_FILES, MODELS, TOKENIZERS, UNCHECKED, check_names
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
