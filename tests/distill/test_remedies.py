"""Damaged journals are refused with a remedy, and doing what the message says ends with the same results."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.small_runs import JOURNALS, SmallRun, make_small_runs, read_results
from support.tiny_pair import TinyPair

from genssd.distill.data.topk_store import locate_topk
from genssd.engine.common.errors import InputError

FILES = [*((command, name) for command, name in JOURNALS.items()), ("select", "decisions.jsonl")]
NAMED_LINE = re.compile(r"(?P<path>/\S+), line (?P<line>\d+)")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def small_runs(tiny_pair: TinyPair, tmp_path_factory: pytest.TempPathFactory) -> dict[str, SmallRun]:
    return make_small_runs(tiny_pair, tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def finished(small_runs: dict[str, SmallRun], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that returns the directory of a finished run of a command, to be copied."""
    root = tmp_path_factory.mktemp("finished")

    def find(command: str) -> Path:
        if not (root / command).exists():
            small_runs[command].run(root / command)
        return root / command

    return find


@pytest.fixture
def copied(finished: Callable[[str], Path], small_runs: dict[str, SmallRun], tmp_path: Path) -> Callable[[str], Path]:
    """Return a function that returns another finished run of a command, to be damaged."""

    def copy(command: str) -> Path:
        if command == "distill":  # its rows name files of its directory
            small_runs[command].run(tmp_path / "run")
        else:
            shutil.copytree(finished(command), tmp_path / "run")
        return tmp_path / "run"

    return copy


def change_digit(lines: list[bytes]) -> list[bytes]:
    return [lines[0].translate(bytes.maketrans(b"01234", b"56789")), *lines[1:]]


def double_first(lines: list[bytes]) -> list[bytes]:
    return [*lines, lines[0]]


def tear_first(lines: list[bytes]) -> list[bytes]:
    return [lines[0][:20] + b"\n", *lines[1:]]


def refuse(small: SmallRun, output_dir: Path) -> str:
    before = {path: path.read_bytes() for path in output_dir.rglob("*") if path.is_file() and path.name != ".lock"}
    with pytest.raises(InputError) as refused:
        small.run(output_dir, resume=True)
    after = {path: path.read_bytes() for path in output_dir.rglob("*") if path.is_file() and path.name != ".lock"}
    assert after == before, "a run that is refused changes nothing"
    return str(refused.value)


def remove_named_line(message: str) -> None:
    """Do what a message says: remove the line that it names."""
    named = NAMED_LINE.search(message)
    assert named is not None, message
    path, number = Path(named["path"]), int(named["line"])
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[: number - 1] + lines[number:]))


def comparable(output_dir: Path) -> dict[str, Any]:
    """Return the results of a run, without the places of top k: redone trajectories are stored after the others."""
    results = read_results(output_dir)
    results.pop("teacher_topk.bin", None)
    for row in results.get("selections.jsonl", []):
        place = row.pop("teacher_topk", None)
        located = locate_topk(place, output_dir, len(row["completion_ids"]), "row")
        assert located is not None
        assert located.read().ids.shape == (len(row["completion_ids"]), 2)
    return results


@pytest.mark.parametrize("damage", [change_digit, double_first, tear_first])
@pytest.mark.parametrize(("command", "name"), FILES)
def test_the_line_that_is_named_is_removed_and_done_again(
    small_runs: dict[str, SmallRun],
    copied: Callable[[str], Path],
    finished: Callable[[str], Path],
    command: str,
    name: str,
    damage: Callable[[list[bytes]], list[bytes]],
) -> None:
    small = small_runs[command]
    if not small.can_resume:
        pytest.skip(f"{command} cannot resume")
    output_dir = copied(command)
    lines = (output_dir / name).read_bytes().splitlines(keepends=True)
    if len(lines) == 1 and damage is tear_first:
        return  # a last line may be torn, and is done again
    (output_dir / name).write_bytes(b"".join(damage(lines)))
    message = refuse(small, output_dir)
    assert "remove this line and resume" in message or "remove one of them, and resume" in message
    remove_named_line(message)
    small.run(output_dir, resume=True)
    results, expected = comparable(output_dir), comparable(finished(command))
    assert results.keys() == expected.keys()
    for file in expected:
        assert results[file] == expected[file], file


@pytest.mark.parametrize("command", [command for command in JOURNALS if command != "distill"])
def test_lines_in_another_order_are_as_good(
    small_runs: dict[str, SmallRun], copied: Callable[[str], Path], finished: Callable[[str], Path], command: str
) -> None:
    if not small_runs[command].can_resume:
        pytest.skip(f"{command} cannot resume")
    output_dir = copied(command)
    path = output_dir / JOURNALS[command]
    path.write_bytes(b"".join(reversed(path.read_bytes().splitlines(keepends=True))))
    small_runs[command].run(output_dir, resume=True)
    assert comparable(output_dir) == comparable(finished(command))


def test_a_damaged_line_of_the_metrics(
    small_runs: dict[str, SmallRun], copied: Callable[[str], Path], finished: Callable[[str], Path]
) -> None:
    output_dir = copied("train")
    path = output_dir / "metrics.jsonl"
    path.write_bytes(b"".join(change_digit(path.read_bytes().splitlines(keepends=True))))
    with pytest.raises(InputError, match=r"metrics\.jsonl, line 1 is damaged") as refused:
        small_runs["train"].run(output_dir, resume=True)
    remove_named_line(str(refused.value))
    small_runs["train"].run(output_dir, resume=True)
    results, expected = read_results(output_dir), read_results(finished("train"))
    assert results["model.safetensors"] == expected["model.safetensors"]
    assert results["metrics.jsonl"] == expected["metrics.jsonl"][1:]


@pytest.mark.parametrize("left", [0.0, 0.5])
def test_lost_top_k(
    small_runs: dict[str, SmallRun], copied: Callable[[str], Path], finished: Callable[[str], Path], left: float
) -> None:
    output_dir = copied("select")
    store, journal, decisions = (
        output_dir / name for name in ("teacher_topk.bin", "selections.jsonl", "decisions.jsonl")
    )
    whole = store.read_bytes()
    store.write_bytes(whole[: int(left * len(whole))])
    if not left:
        store.unlink()
    message = refuse(small_runs["select"], output_dir)
    if left:
        said = re.search(r"lacks the top k of .*, line (\d); restore it, or remove line \1 and all later ones", message)
        assert said is not None
        lines = journal.read_bytes().splitlines(keepends=True)
        journal.write_bytes(b"".join(lines[: int(said[1]) - 1]))
    else:
        assert f"line 1; restore it, or remove {journal} and {decisions} to begin anew" in message
        journal.unlink()
        decisions.unlink()
    small_runs["select"].run(output_dir, resume=True)
    assert comparable(output_dir) == comparable(finished("select"))
    assert store.read_bytes() == whole


def test_reselect_names_the_remedy_of_its_run(
    small_runs: dict[str, SmallRun], copied: Callable[[str], Path], tmp_path: Path
) -> None:
    """reselect reads the decisions of a run: it verifies them, and the run mends them."""
    selection = copied("select")
    reselect = dataclasses.replace(
        small_runs["reselect"], config=dataclasses.replace(small_runs["reselect"].config, run=str(selection))
    )
    reselect.run(tmp_path / "whole")
    expected = read_results(tmp_path / "whole")
    decisions = selection / "decisions.jsonl"
    lines = decisions.read_bytes().splitlines(keepends=True)
    decisions.write_bytes(b"".join(change_digit(lines)))
    with pytest.raises(InputError, match=r"decisions\.jsonl, line 1 is damaged") as refused:
        reselect.run(tmp_path / "a")
    remove_named_line(str(refused.value))
    with pytest.raises(InputError, match=r"resume the run \(genssd select --resume with its settings\)"):
        reselect.run(tmp_path / "a")
    small_runs["select"].run(selection, resume=True)
    reselect.run(tmp_path / "a")
    results = read_results(tmp_path / "a")
    assert results["summary.json"] == expected["summary.json"] | {"output_dir": results["summary.json"]["output_dir"]}
    for name in ("reselected.jsonl", "pairs.jsonl", "steps.jsonl"):
        assert sorted(map(json.dumps, results[name])) == sorted(map(json.dumps, expected[name]))
    decisions.write_bytes(b"".join(reversed(decisions.read_bytes().splitlines(keepends=True))))
    with pytest.raises(InputError, match="in the order of that file; resume the run"):
        reselect.run(tmp_path / "b")
    small_runs["select"].run(selection, resume=True)
    reselect.run(tmp_path / "b")
