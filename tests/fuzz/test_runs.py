"""Journals, run.json, checkpoints' JSON, config files and flags of any content: one line, or success, in time."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import shutil
import typing
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from support.fuzzing import (
    fuzz_settings,
    mutated_bytes,
    mutated_file,
    mutated_json,
    succeeds_or_refuses,
)
from support.small_runs import JOURNALS, SmallRun, make_small_runs, read_results
from support.tiny_pair import TinyPair

from genssd.configs import CONFIGS
from genssd.distill.runs.journal import make_line
from genssd.engine.common.errors import InputError
from genssd.flags import read_config

pytestmark = pytest.mark.fuzz

RESUMED = ("select", "generate", "prefix")
"""Commands whose journals are damaged: the fastest ones; all others read theirs through the same functions."""
WORDS = [
    "", " ", "-1", "0", "1", "1.5", "1e3", "1e400", "nan", "inf", "-inf", "none", "None", "null", "true", "True", "[]",
    "{}", "a", "a,b", "9" * 400, "9" * 5000, "9223372036854775808", "\x1b[31m", "\U0001f600", "a\nb", "--", "-", "=",
    "../..", "/dev/null", "~", "x" * 5000, "{\"a\": 1}", "--limit", "\udcff", "name=value", "2026-11-26", "last",
]  # fmt: skip
"""Values of flags, each of which may be given to any of them."""


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def small_runs(tiny_pair: TinyPair, tmp_path_factory: pytest.TempPathFactory) -> dict[str, SmallRun]:
    return make_small_runs(tiny_pair, tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def finished(small_runs: dict[str, SmallRun], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return the directories of finished runs by command."""
    root = tmp_path_factory.mktemp("finished")
    for command in (*RESUMED, "train"):
        small_runs[command].run(root / command)
    return {command: root / command for command in (*RESUMED, "train")}


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scratch")


@contextlib.contextmanager
def no_sync() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda descriptor: None)
        yield


def copy_run(source: Path, scratch: Path) -> Path:
    shutil.rmtree(scratch / "run", ignore_errors=True)
    return Path(shutil.copytree(source, scratch / "run"))


@st.composite
def damaged_journals(draw: st.DrawFn, content: bytes) -> bytes:
    """Draw a journal whose bytes or lines differ: cut, doubled, moved, removed, changed, or of something else."""
    lines = content.splitlines(keepends=True)
    kind = draw(st.sampled_from(["bytes", "double", "remove", "move", "row", "row", "foreign"]))
    if kind == "bytes":
        place = sum(map(len, lines[: draw(st.integers(0, len(lines) - 1))]))
        return content[:place] + draw(mutated_bytes(content[place:]))
    number = draw(st.integers(0, len(lines) - 1))
    if kind == "double":
        return content + lines[number]
    if kind == "remove":
        return b"".join(lines[:number] + lines[number + 1 :])
    if kind == "move":
        return b"".join([*lines[:number], *lines[number + 1 :], lines[number]])
    if kind == "foreign":  # a whole line of something else, with or without a newline
        return content + draw(st.sampled_from([b"{}\n", make_line({}), b"\x00" * 4096, b"\n", b"[1]\n", b"null\n"]))
    row = draw(mutated_json(json.loads(lines[number])))
    text = json.dumps(row).encode() + b"\n"
    return b"".join([*lines[:number], text, *lines[number + 1 :]])


@fuzz_settings(60, 0.15)
@given(data=st.data())
def test_any_journal(
    small_runs: dict[str, SmallRun], finished: dict[str, Path], scratch: Path, data: st.DataObject
) -> None:
    """What is not refused ends with the results of an undamaged run, or with fewer rows of prompts done again."""
    command = data.draw(st.sampled_from(RESUMED))
    output_dir = copy_run(finished[command], scratch)
    path = output_dir / JOURNALS[command]
    path.write_bytes(data.draw(damaged_journals(path.read_bytes())))
    with no_sync():
        message = succeeds_or_refuses(lambda: small_runs[command].run(output_dir, resume=True))
    if message is None:
        results, expected = read_results(output_dir), read_results(finished[command])
        for row in [*results.get("selections.jsonl", []), *expected.get("selections.jsonl", [])]:
            row.pop("teacher_topk")  # trajectories that are done again are stored after the others
        assert results[path.name] == expected[path.name]
        assert results["summary.json"].keys() == expected["summary.json"].keys()


@fuzz_settings(40, 0.15)
@given(data=st.data())
def test_any_record(
    small_runs: dict[str, SmallRun], finished: dict[str, Path], scratch: Path, data: st.DataObject
) -> None:
    """A run is resumed by its record, and reselect reads the record of another run."""
    command = data.draw(st.sampled_from(["generate", "select"]))
    output_dir = copy_run(finished[command], scratch)
    path = output_dir / "run.json"
    path.write_bytes(data.draw(mutated_file(json.loads(path.read_text()), ("launches", "template_date", "settings"))))
    reselect = small_runs["reselect"]
    reselect = dataclasses.replace(reselect, config=dataclasses.replace(reselect.config, run=str(output_dir)))
    shutil.rmtree(scratch / "again", ignore_errors=True)
    with no_sync():
        succeeds_or_refuses(lambda: small_runs[command].run(output_dir, resume=True))
        succeeds_or_refuses(lambda: reselect.run(scratch / "again"))


@fuzz_settings(20, 0.05)
@given(data=st.data())
def test_any_trainer_state(
    small_runs: dict[str, SmallRun], finished: dict[str, Path], scratch: Path, data: st.DataObject
) -> None:
    output_dir = copy_run(finished["train"], scratch)
    (checkpoint,) = output_dir.glob("checkpoint-*")
    path = checkpoint / "trainer_state.json"
    path.write_bytes(data.draw(mutated_file(json.loads(path.read_text()), ("step", "epoch", "settings"))))
    with no_sync():
        succeeds_or_refuses(lambda: small_runs["train"].run(output_dir, resume=True))


def fields_of(command: str) -> dict[str, object]:
    """Return a config file of a command, as keys and values."""
    common: dict[str, object] = {"data": "d.jsonl", "output_dir": "out", "seed": 1, "limit": 3}
    of_command: dict[str, dict[str, object]] = {
        "select": {"teacher": "t", "student": "s", "chunk": {"tokens": 4, "until": None}, "sampling": {"top_p": 0.9},
                   "chat_template_kwargs": {"enable_thinking": False}, "candidates": 2, "threshold": 1.5},
        "train": {"model_name_or_path": "m", "bf16": True, "lora_target_modules": ["all-linear"], "eval_data": ["e"],
                  "gradient_checkpointing": False, "key_attention": {"weight": 0.5}},
        "score": {"student": "s", "criteria": ["ppl", "rsr"], "pick": {"by": "ppl", "keep": 2}},
        "diagnose": {"student": "s", "teacher": ["t"], "losses": ["jsd"], "templates": {"hint": "{context}"}},
        "distill": {"teacher": "t", "student": "s", "rounds": 2, "select": {"candidates": 2}, "train": {"bf16": None}},
    }  # fmt: skip
    names = {"train": ("limit",), "distill": ("limit", "seed"), "score": ("seed",)}.get(command, ())
    return {**{key: value for key, value in common.items() if key not in names}, **of_command[command]}


YAML_TEXTS = (
    "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\ndata: [*c, *c]\n", "data: &d [*d]\n", "? [a]\n: b\n", "!!int ''\n",
    "seed: !!bool x\n", "seed: 2026-13-45\n", "seed: 0b\n", "seed: !!python/object:os.system x\n", "--- a\n--- b\n",
    "data: |\n a\n\x00", "<<: {seed: 1}\n", "<<: 1\n", "seed: 1:2:3:99\n", f"seed: {'9' * 5000}\n", "[" * 2000,
    "{" * 2000,
    "seed: !!binary x\n", "? {}\n: 1\n", "seed: .nan\n", "data: '\\ud800'\n", "%YAML 9.9\n---\na: 1\n",
    "\ufeffseed: 1\n",
    "chat_template_kwargs: {a: 2026-01-01}\n", "chat_template_kwargs: {1: {2: !!set {3}}}\n",
)  # fmt: skip


@st.composite
def config_texts(draw: st.DrawFn, fields: dict[str, object]) -> bytes:
    """Draw the text of a config file."""
    kind = draw(st.sampled_from(["values", "values", "bytes", "yaml"]))
    if kind == "yaml":
        return draw(st.sampled_from(YAML_TEXTS)).encode("utf-8", "surrogatepass")
    if kind == "bytes":
        return draw(mutated_bytes(yaml.safe_dump(fields).encode()))
    return json.dumps(draw(mutated_json(fields, ("threads", "resume", "sampling", "zzz")))).encode()


def read_one_line(command: str, flags: list[str]) -> None:
    """Read a command's config from flags; nothing is printed but help, and a message has one line."""
    printed, ended = io.StringIO(), None
    with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(printed):
        try:
            read_config(command, flags, CONFIGS[command])
        except (SystemExit, InputError) as error:
            ended = error
    assert (ended.code == 0) if isinstance(ended, SystemExit) else not printed.getvalue()
    if isinstance(ended, InputError):
        assert "\n" not in str(ended)
        raise ended


@fuzz_settings(40, 0.35)
@given(data=st.data())
def test_any_config_file(scratch: Path, data: st.DataObject) -> None:
    command = data.draw(st.sampled_from(["select", "train", "score", "diagnose", "distill"]))
    path = scratch / "config.yaml"
    path.write_bytes(data.draw(config_texts(fields_of(command))))
    succeeds_or_refuses(lambda: read_one_line(command, ["--config", str(path)]))


def flag_names(config_class: type, prefix: str = "") -> Iterator[str]:
    hints = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            yield from flag_names(hint, f"{prefix}{field.name}.")
        else:
            yield f"--{prefix}{field.name.replace('_', '-')}"


@fuzz_settings(80, 0.3)
@given(data=st.data())
def test_any_flags(data: st.DataObject) -> None:
    command = data.draw(st.sampled_from(sorted(CONFIGS)))
    names = [*flag_names(CONFIGS[command]), "--config", "--zzz", "--no-resume", "--help", "-x"]
    needed = {
        "--teacher": "t",
        "--student": "s",
        "--data": "d",
        "--model-name-or-path": "m",
        "--model": "m",
        "--run": "r",
    }
    flags = [word for name, value in needed.items() if name in names for word in (name, value)]
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from(names))
        values = data.draw(st.lists(st.sampled_from(WORDS), max_size=2))
        flags += [f"{name}={values[0]}"] if values and data.draw(st.booleans()) else [name, *values]
    succeeds_or_refuses(lambda: read_one_line(command, flags))


@pytest.mark.parametrize(
    "make", [lambda path: "/dev/zero", lambda path: write_large(path), lambda path: str(path.parent)]
)
def test_a_config_file_without_an_end(make: Callable[[Path], str], tmp_path: Path) -> None:
    message = succeeds_or_refuses(lambda: read_one_line("select", ["--config", make(tmp_path / "c.yaml")]))
    assert message is not None
    assert "is longer than 256 KiB" in message or "Is a directory" in message


def write_large(path: Path) -> str:
    """Write a file of a gigabyte without taking the disk."""
    with path.open("wb") as stream:
        stream.truncate(1 << 30)
    return str(path)
