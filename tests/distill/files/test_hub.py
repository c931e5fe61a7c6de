"""Data sets of the hub by name. The hub of the tests is a directory that `datasets` reads by its own rules."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest

from genssd.distill.data.problems import read_problems
from genssd.distill.files import hub
from genssd.distill.files.hub import parse_hub_name
from genssd.distill.files.rows import SUFFIXES, hash_content, read_rows
from genssd.engine.common.errors import InputError

CARD = """---
configs:
- config_name: main
  data_files:
  - split: train
    path: train.jsonl
  - split: test
    path: test.jsonl
- config_name: short
  data_files:
  - split: train
    path: test.jsonl
---
"""


@pytest.fixture
def organisation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Serve the data sets `lab/NAME` from the directories that a test makes below the returned one."""
    root = tmp_path / "hub" / "lab"
    root.mkdir(parents=True)
    for name in ("load_dataset", "get_dataset_split_names", "get_dataset_config_names"):
        function = getattr(datasets, name)

        def serve(repository: str, *arguments: Any, function: Any = function, **options: Any) -> Any:
            assert not options.get("trust_remote_code")
            options |= {"cache_dir": str(tmp_path / "cache")} if function.__name__ == "load_dataset" else {}
            return function(str(root.parent / repository), *arguments, **options)

        monkeypatch.setattr(datasets, name, serve)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    hub._load.cache_clear()
    yield root
    hub._load.cache_clear()


def write_set(directory: Path, splits: tuple[str, ...] = ("train", "test"), card: str = "") -> None:
    directory.mkdir()
    for split in splits:
        rows = [{"question": f"{split} {i}", "answer": None if i else str(i)} for i in range(300)]
        (directory / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if card:
        (directory / "README.md").write_text(card)


def test_a_split_is_read(organisation: Path) -> None:
    write_set(organisation / "sums")
    rows = list(read_rows("lab/sums:test"))
    assert [json.loads(row.text)["question"] for row in rows] == [f"test {i}" for i in range(300)]
    assert (rows[256].number, rows[256].where) == (257, "lab/sums:test, row 257")
    problem = read_problems("lab/sums:train", 1)[0]
    assert (problem.answer, problem.where) == ("0", "lab/sums:train, row 1")
    assert [json.loads(row.text)["question"] for row in read_rows("lab/sums:train[1:3]")] == ["train 1", "train 2"]


def test_the_content_counts(organisation: Path) -> None:
    write_set(organisation / "sums")
    write_set(organisation / "copy")
    assert hash_content("lab/sums:train") == hash_content("lab/copy:train") != hash_content("lab/sums:test")


def test_a_choice_that_is_left_open_is_listed(organisation: Path) -> None:
    write_set(organisation / "sums")
    write_set(organisation / "one", ("train",))
    write_set(organisation / "many", card=CARD)
    assert len(list(read_rows("lab/one"))) == 300
    assert json.loads(next(read_rows("lab/many/short:train")).text)["question"] == "test 0"
    for name, message in [
        ("lab/sums", r"^lab/sums has several splits; name one of them: lab/sums:train, lab/sums:test$"),
        ("lab/many/main", r"has several splits; name one of them: lab/many/main:train, lab/many/main:test$"),
        ("lab/many:train", r"must name one of the data set's configs: lab/many/main:train, lab/many/short:train$"),
        ("lab/many", r"must name one of the data set's configs: lab/many/main, lab/many/short$"),
        (
            "lab/many/other:train",
            r"must name one of the data set's configs: lab/many/main:train, lab/many/short:train$",
        ),
        ("lab/sums:valid", r"^lab/sums:valid is no file here, and no data set that the hub gives: .*valid"),
        ("lab/nothing:train", r"^lab/nothing:train is no file here, and no data set that the hub gives: "),
    ]:
        with pytest.raises(InputError, match=message):
            list(read_rows(name))


def test_a_path_that_exists_is_a_file(organisation: Path) -> None:
    write_set(organisation / "sums")
    Path("lab").mkdir()
    Path("lab/sums:test").write_text('{"question": "mine"}\n')
    assert [p.prompt for p in read_problems("lab/sums:test")] == [[{"role": "user", "content": "mine"}]]
    with pytest.raises(InputError, match=r"^lab/sums cannot be read: No such file or directory$"):
        list(read_rows("lab/sums"))  # a folder of this name is here: the user means a file in it


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("org/name", ("org/name", None, None)),
        ("org/name:train", ("org/name", None, "train")),
        ("org/na-me.v2/main:test", ("org/na-me.v2", "main", "test")),
        ("org/name:train[:10%]", ("org/name", None, "train[:10%]")),
        ("org/name:train+test", ("org/name", None, "train+test")),
        ("org/name.jsonl:train", ("org/name.jsonl", None, "train")),
        ("data/problems.jsonl", None),
        ("data/problems.jsonl.gz", None),
        ("./org/name", None),
        ("../org/name", None),
        ("~/org", None),
        ("/org/name", None),
        ("org/name/config/more", None),
        ("name:train", None),
        ("name", None),
        ("org/name:", None),
        ("org/na me", None),
        ("-", None),
    ],
)
def test_names_of_data_sets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, parts: tuple[str | None, ...] | None
) -> None:
    monkeypatch.chdir(tmp_path)
    parsed = parse_hub_name(name, SUFFIXES)
    assert (parsed and (parsed.repository, parsed.config, parsed.split)) == parts


def test_without_a_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise ConnectionError("Couldn't reach 'lab/sums' on the Hub\n(LocalEntryNotFoundError)")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(InputError) as caught:
        list(read_rows("lab/sums:train"))
    assert str(caught.value) == (
        "lab/sums:train is no file here, and no data set that the hub gives: "
        "Couldn't reach 'lab/sums' on the Hub (LocalEntryNotFoundError)"
    )


def test_without_the_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(InputError, match=r"lab/sums:train is no file here; to read .* pip install 'genssd\[data\]'"):
        list(read_rows("lab/sums:train"))
