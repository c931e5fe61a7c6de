"""The tune file and the lookup of launch configurations, without a GPU: the card is given."""

from __future__ import annotations

import dataclasses
import json
import logging
import multiprocessing
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from genssd.kernels import tune_file, tuned
from genssd.kernels.tune_file import Card, Entry, Problem, TuneFileError, add_entries, read_entries

H200 = Card(name="NVIDIA H200", capability="sm_90", versions=("1", "2", "3"))
CUDA = torch.device("cuda", 0)
SCORE = Problem(operator="score", dtype="bfloat16", shape=(151936, 4096))
FEW = {
    "block_n": 64, "block_v": 256, "block_d": 64, "num_warps": 4, "num_stages": 5, "descriptors": True,
    "splits": 132, "group": 16, "per_multiprocessor": 1, "library": False,
}  # fmt: skip
MANY = {**FEW, "block_n": 128, "num_warps": 8, "num_stages": 4}
NARROW = {**FEW, "block_v": 128, "block_d": 128, "num_stages": 4}
ENTRY = Entry(
    deterministic=(FEW, MANY, MANY, MANY),
    fastest=(NARROW, MANY, MANY, MANY),
    microseconds=(301.0, 336.0, 490.0, 14700.0),
)


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The tune file of this process; the card is an H200."""
    file = tmp_path / "cache" / "tune.json"
    monkeypatch.setenv("GENSSD_TUNE_FILE", str(file))
    monkeypatch.setattr(tuned, "card_of", lambda device: H200)
    tuned.forget()
    yield file
    tuned.forget()


def identity(values: tune_file.Configuration) -> dict[str, int]:
    return dict(values)


def find(rows: int, build: Callable[[tune_file.Configuration], Any] = identity, problem: Problem = SCORE) -> Any:
    return tuned.find(problem.operator, getattr(torch, problem.dtype), problem.shape, CUDA, rows, build)


def test_classes_of_rows() -> None:
    counts = {0: (1, 16, 64), 1: (65, 128), 2: (129, 512), 3: (513, 8192)}
    for index, rows in counts.items():
        assert {tune_file.row_class(n) for n in rows} == {index}
    assert [tune_file.row_class(rows) for rows in tune_file.SAMPLE_ROWS] == [0, 1, 2, 3]
    assert len(tune_file.ROW_CLASSES) == len(tune_file.ROW_LIMITS) + 1


def test_what_is_written_is_read_and_looked_up(path: Path) -> None:
    add_entries(path, H200, {SCORE: ENTRY})
    assert read_entries(path) == [(H200, SCORE, ENTRY)]
    assert json.loads(path.read_text())["entries"][0]["microseconds"]["1..64"] == 301.0
    assert [find(rows) for rows in (1, 64, 65, 4096)] == [FEW, FEW, MANY, MANY]
    with tuned.launch_mode(deterministic=False):
        assert [find(rows) for rows in (1, 64, 65, 4096)] == [NARROW, NARROW, MANY, MANY]
    assert find(1) == FEW
    assert sorted(p.name for p in path.parent.iterdir()) == ["tune.json", "tune.json.lock"]


def test_the_file_is_read_once(path: Path) -> None:
    add_entries(path, H200, {SCORE: ENTRY})
    calls: list[object] = []

    def build(values: tune_file.Configuration) -> int:
        calls.append(values)
        return 0

    assert find(1, build) == 0
    path.unlink()
    assert [find(rows, build) for rows in (1, 100, 1000)] == [0, 0, 0]
    assert len(calls) == 4


@pytest.mark.parametrize(
    "other",
    [
        dataclasses.replace(SCORE, operator="logits"),
        dataclasses.replace(SCORE, dtype="float16"),
        dataclasses.replace(SCORE, shape=(151936, 1024)),
    ],
    ids=["operator", "dtype", "shape"],
)
def test_another_problem_has_no_entry(path: Path, other: Problem) -> None:
    add_entries(path, H200, {SCORE: ENTRY})
    assert find(1, problem=other) is None


@pytest.mark.parametrize("field", ["name", "capability", "versions"])
def test_another_card_or_version_has_no_entry(path: Path, field: str, caplog: pytest.LogCaptureFixture) -> None:
    value: Any = ("1", "9", "3") if field == "versions" else "other"
    add_entries(path, dataclasses.replace(H200, **{field: value}), {SCORE: ENTRY})
    assert find(1) is None
    messages = [record.message for record in caplog.records]
    assert len(messages) == (field != "name")
    assert all("run `genssd tune` again" in message for message in messages)


def test_entries_of_others_are_kept_and_own_ones_replaced(path: Path) -> None:
    a100 = dataclasses.replace(H200, name="NVIDIA A100", capability="sm_80")
    draw = Problem(operator="draw", dtype="float32", shape=(151936,))
    add_entries(path, a100, {SCORE: ENTRY})
    add_entries(path, H200, {SCORE: ENTRY, draw: ENTRY})
    add_entries(path, H200, {SCORE: dataclasses.replace(ENTRY, deterministic=None)})
    entries = {(card, problem): entry for card, problem, entry in read_entries(path)}
    assert set(entries) == {(a100, SCORE), (H200, SCORE), (H200, draw)}
    assert entries[H200, SCORE].deterministic is None
    assert entries[a100, SCORE].deterministic == ENTRY.deterministic


BROKEN = {
    "empty": "",
    "cut": '{"format": "genssd tune 1", "entries": [{"card": "NVID',
    "list": "[]",
    "foreign": '{"lr": 0.1}',
    "format": '{"format": "genssd tune 99", "entries": []}',
    "entries": '{"format": "genssd tune 1", "entries": {}}',
    "entry": '{"format": "genssd tune 1", "entries": [7]}',
    "deep": "[" * 100_000,
}


def damaged(**changes: object) -> str:
    """The text of a file whose only entry has other values."""
    fields = tune_file._write_entry(H200, SCORE, ENTRY)
    return json.dumps({"format": tune_file.FORMAT, "entries": [{**fields, **changes}]})


BROKEN |= {
    "operator": damaged(operator="sort"),
    "shape": damaged(shape="wide"),
    "versions": damaged(versions={"torch": "2"}),
    "fastest": damaged(fastest=None),
    "classes": damaged(fastest={"1..64": FEW}),
    "configuration": damaged(fastest={name: [1] for name in tune_file.ROW_CLASSES}),
    "value": damaged(fastest={name: {**FEW, "block_n": "64"} for name in tune_file.ROW_CLASSES}),
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_file_is_one_warning_and_is_not_overwritten(
    path: Path, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    path.parent.mkdir()
    path.write_text(content)
    assert [find(rows) for rows in (1, 100, 1000)] == [None] * 3
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert str(path) in record.message
    assert "run `genssd tune` again" in record.message
    assert "\n" not in record.message
    with pytest.raises(TuneFileError, match=r"tune\.json"):
        add_entries(path, H200, {SCORE: ENTRY})
    assert path.read_text() == content


def test_a_file_that_is_no_text_or_a_directory(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path.mkdir(parents=True)
    assert find(1) is None
    assert "cannot be read" in caplog.records[0].message
    path.rmdir()
    path.write_bytes(b"\xff\xfe\x00")
    tuned.forget()
    assert find(1) is None
    assert "is not valid JSON" in caplog.records[1].message


def test_values_that_the_kernels_do_not_know_are_one_warning(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    add_entries(path, H200, {SCORE: ENTRY})

    def build(values: tune_file.Configuration) -> int:
        return tuned.build_from(Sizes, values).block

    assert [find(rows, build) for rows in (1, 100)] == [None, None]
    (record,) = caplog.records
    assert "score of [151936, 4096] is not used: it must have block, is_wide, not block_n" in record.message


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    block: int
    is_wide: bool = False


def test_values_are_checked() -> None:
    assert tuned.build_from(Sizes, {"block": 64, "is_wide": True}) == Sizes(block=64, is_wide=True)
    for values, message in (
        ({"block": 64}, "must have block, is_wide"),
        ({"block": 64, "is_wide": True, "more": 1}, "must have block, is_wide"),
        ({"block": 48, "is_wide": True}, "block must be a power of two, not 48"),
        ({"block": 0, "is_wide": True}, "block must be at least 1, not 0"),
        ({"block": True, "is_wide": True}, "block must be at least 1, not True"),
        ({"block": 64, "is_wide": 1}, "is_wide must be true or false, not 1"),
    ):
        with pytest.raises(ValueError, match=message):
            tuned.build_from(Sizes, values)


@pytest.mark.parametrize("field", ["block_v", "splits"])
def test_classes_that_disagree_are_refused_in_deterministic_mode(
    path: Path, field: str, caplog: pytest.LogCaptureFixture
) -> None:
    mixed = (FEW, MANY, {**MANY, field: 64}, MANY)
    add_entries(path, H200, {SCORE: Entry(deterministic=mixed, fastest=mixed)})
    assert [find(rows) for rows in (1, 200)] == [None, None]
    (record,) = caplog.records
    assert (
        f"is not used with deterministic=True: its classes of rows have different values of {field}" in record.message
    )
    with tuned.launch_mode(deterministic=False):
        assert find(200) == mixed[2]
    assert len(caplog.records) == 1


def test_the_librarys_product_is_refused_in_deterministic_mode(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    library = ({**FEW, "library": True},) * 4
    add_entries(path, H200, {SCORE: Entry(deterministic=library, fastest=library)})
    assert find(1) is None
    assert "the library's product depends on the number of rows" in caplog.records[0].message


def test_sizes_that_decide_no_bits_may_differ() -> None:
    assert tuned.find_disagreement("score", (FEW, MANY, {**MANY, "group": 12, "num_stages": 3}, MANY)) is None
    assert tuned.find_disagreement("logits", (FEW, {**MANY, "splits": 7})) is None
    tiling = {"split": 16384, "block": 1024, "num_warps": 4}
    assert tuned.find_disagreement("draw", (tiling, tiling)) is None
    assert tuned.find_disagreement("draw", (tiling, {**tiling, "num_warps": 8})) is not None
    assert tuned.find_disagreement("attention", ({"segment": 512}, {"segment": 1024})) is not None


def test_where_the_file_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ann")
    monkeypatch.delenv("GENSSD_TUNE_FILE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert tune_file.default_path() == Path("/home/ann/.cache/genssd/tune.json")
    monkeypatch.setenv("XDG_CACHE_HOME", "/scratch/ann")
    assert tune_file.default_path() == Path("/scratch/ann/genssd/tune.json")
    monkeypatch.setenv("GENSSD_TUNE_FILE", "~/mine.json")
    assert tune_file.default_path() == Path("/home/ann/mine.json")


def _add_one(path: Path, width: int) -> None:
    add_entries(path, H200, {dataclasses.replace(SCORE, shape=(151936, width)): ENTRY})


def test_processes_that_write_at_once_lose_nothing(tmp_path: Path) -> None:
    path, widths = tmp_path / "new" / "tune.json", range(1, 9)
    workers = [multiprocessing.get_context("fork").Process(target=_add_one, args=(path, width)) for width in widths]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert {problem.shape[1] for _, problem, _ in read_entries(path)} == set(widths)


def test_a_file_that_cannot_be_written_names_itself(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TuneFileError, match=r"file/tune\.json cannot be written"):
        add_entries(tmp_path / "file" / "tune.json", H200, {SCORE: ENTRY})


head_triton = pytest.importorskip("genssd.kernels.head_triton")


@pytest.mark.parametrize("operator", tune_file.HEAD_OPERATORS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("amd", "capability"), [(False, 80), (False, 89), (False, 90), (False, 100), (True, 0)])
def test_the_shipped_configurations_are_deterministic(
    operator: tune_file.Operator, dtype: torch.dtype, amd: bool, capability: int
) -> None:
    for deterministic in (True, False):
        choices = [
            head_triton.choose_shipped(
                operator, dtype, rows, amd=amd, capability=capability, deterministic=deterministic
            ).values()
            for rows in tune_file.SAMPLE_ROWS
        ]
        if deterministic:
            assert tuned.find_disagreement(operator, choices) is None
        assert [head_triton.HeadConfiguration.from_values(values).values() for values in choices] == choices


def test_hopper_ships_what_was_fastest_on_an_h200() -> None:
    def blocks(rows: int, deterministic: bool) -> tuple[int, int, int]:
        tiles = head_triton.choose_shipped(
            "score", torch.bfloat16, rows, amd=False, capability=90, deterministic=deterministic
        ).tiles
        return tiles.block_n, tiles.block_v, tiles.num_stages

    assert [blocks(rows, True) for rows in tune_file.SAMPLE_ROWS] == [
        (64, 256, 5), (128, 256, 4), (128, 256, 4), (128, 256, 3),
    ]  # fmt: skip
    assert blocks(300, False) == (256, 128, 4)


def test_a_launch_takes_what_was_tuned_and_else_what_ships(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card = SimpleNamespace(name="NVIDIA H200", major=9, minor=0, multi_processor_count=100)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    entry = Entry(deterministic=None, fastest=({**NARROW, "splits": 7, "per_multiprocessor": 2}, MANY, MANY, MANY))
    add_entries(path, H200, {dataclasses.replace(SCORE, shape=(500, 64)): entry})
    hidden, weight = torch.zeros(3, 64, dtype=torch.bfloat16), torch.zeros(500, 64, dtype=torch.bfloat16)
    monkeypatch.setattr(torch.Tensor, "device", CUDA)
    shipped = head_triton.choose_launch(hidden, weight, "score")
    assert (shipped.tiles, shipped.programs) == (head_triton.HOPPER_FEW, 100)
    with tuned.launch_mode(deterministic=False):
        launch = head_triton.choose_launch(hidden, weight, "score")
        assert (launch.tiles.block_v, launch.splits, launch.programs) == (128, 7, 200)
        # rows that no descriptor can describe
        skewed = head_triton.choose_launch(torch.zeros(3, 65, dtype=torch.bfloat16)[:, 1:], weight, "score")
        assert not skewed.tiles.descriptors
        assert head_triton.choose_launch(hidden, weight, "logits").tiles == head_triton.HOPPER_FEW
