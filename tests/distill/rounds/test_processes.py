"""`genssd distill` with several processes: the rows of one, its student but for rounding, whatever ends on the way.

The processes are forked from one that has imported everything, which takes no time.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.small_runs import VARYING
from support.tiny_pair import TinyPair
from support.training_runs import metrics, weights

from genssd.distill.pool.placing import Place
from genssd.distill.rounds import training as round_training
from genssd.distill.rounds.config import DistillConfig
from genssd.distill.rounds.run import run_distill
from genssd.distill.runs.progress import Progress
from genssd.distill.select.config import SelectSettings
from genssd.distill.train.config import TrainSettings
from genssd.engine.common.errors import InputError, NumericsError, WorkerError
from genssd.engine.decoding.chunk import Chunk

Write = Callable[..., Path]
ROWS = [{"question": f"{i}+{i}?", "answer": str(2 * i)} for i in range(9)]


pytestmark = pytest.mark.usefixtures("forked_workers")


@pytest.fixture(autouse=True, scope="module")
def two_threads() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "2")
        yield


def config_for(pair: TinyPair, data: Path, out: Path, **options: Any) -> DistillConfig:
    """A round of five steps with two examples each, but for the last one."""
    select = SelectSettings(candidates=2, chunk=Chunk(tokens=3, until=None), max_tokens=6, memory_bytes=1 << 22)
    train = TrainSettings(
        per_device_train_batch_size=2, learning_rate=1e-3, statuses=("finished", "length"), save_steps=1,
        logging_steps=1, lora_dropout=0.0,
    )  # fmt: skip
    base = DistillConfig(
        teacher=str(pair.teacher), student=str(pair.student), data=str(data), output_dir=str(out), select=select,
        train=train, require_correct=False, rounds=1,
    )  # fmt: skip
    return dataclasses.replace(base, **options)


class Killer(Progress):
    """Kills a training process once a step is done."""

    def __init__(self, step: int, rank: int) -> None:
        self.step, self.rank = step, rank
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def __call__(self, done: float, total: float, detail: str = "") -> None:
        if detail.startswith(f"step {self.step},"):
            pid = sorted(multiprocessing.active_children(), key=lambda process: process.name)[self.rank].pid
            assert pid is not None
            os.kill(pid, signal.SIGKILL)


@dataclasses.dataclass(frozen=True)
class Whole:
    """Runs that nothing interrupted."""

    one: DistillConfig
    two: DistillConfig


@pytest.fixture(scope="module")
def whole(tiny_pair: TinyPair, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    root = tmp_path_factory.mktemp("whole")
    (root / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    one = config_for(tiny_pair, root / "data.jsonl", root / "one")
    two = dataclasses.replace(one, output_dir=str(root / "two"), processes=2)
    for config in (one, two):
        list(run_distill(config))
    return Whole(one, two)


def train_directory(config: DistillConfig) -> Path:
    return Path(config.output_dir) / "round-1" / "train"


def without_times(value: Any) -> Any:
    """A row without what differs from run to run."""
    if isinstance(value, dict):
        return {name: without_times(part) for name, part in value.items() if name not in VARYING}
    return [without_times(part) for part in value] if isinstance(value, list) else value


def read_rows(config: DistillConfig) -> list[Any]:
    """The rows that are trained on; each names the file of its problem in the output directory."""
    text = (Path(config.output_dir) / "round-1" / "kept.jsonl").read_text().replace(config.output_dir, "")
    return [without_times(json.loads(line)) for line in text.splitlines()]


def assert_same_student(one: DistillConfig, other: DistillConfig, *, exactly: bool) -> None:
    expected, trained = (weights(train_directory(config)) for config in (one, other))
    for name, value in expected.items():
        if exactly:
            assert torch.equal(value, trained[name]), name
        else:  # Adam's first steps are lr * sign(gradient): where the gradient is nearly 0 rounding decides
            assert ((value - trained[name]).abs() < 1e-5).float().mean() > 0.99, name


def test_two_processes_select_and_train_what_one_does(whole: Whole) -> None:
    rows = read_rows(whole.one)
    assert rows == read_rows(whole.two)
    assert [row["index"] for row in rows] == list(range(len(ROWS)))
    one, two = train_directory(whole.one), train_directory(whole.two)
    losses = [[(row["step"], row["tokens"], row["loss"]) for row in metrics(d)] for d in (one, two)]
    assert [row[:2] for row in losses[0]] == [row[:2] for row in losses[1]]
    assert [row[2] for row in losses[0]] == pytest.approx([row[2] for row in losses[1]], rel=1e-4)
    assert_same_student(whole.one, whole.two, exactly=False)
    records = [json.loads((d / "checkpoint-5" / "trainer_state.json").read_text()) for d in (one, two)]
    settings = [record["settings"] for record in records]
    names = ("processes", "per_device_train_batch_size", "gradient_accumulation_steps", "threads")
    assert [[setting[name] for name in names] for setting in settings] == [[1, 2, 1, 2], [2, 1, 1, 1]]


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_killed_process_ends_the_round_and_the_training_goes_on(whole: Whole, tmp_path: Path, rank: int) -> None:
    """It goes on with two processes even where none are asked for any more."""
    config = dataclasses.replace(whole.two, output_dir=str(tmp_path / "run"))
    message = (
        rf"^training process {rank + 1} of 2 was killed by SIGKILL \(out of memory\?\), and the others were ended; "
        r"in .*/round-1/train the training goes on from checkpoint-"
    )
    with pytest.raises(WorkerError, match=message):
        list(run_distill(config, report=Killer(3, rank)))
    assert not multiprocessing.active_children()
    assert not (train_directory(config) / "finished.json").exists()
    list(run_distill(dataclasses.replace(config, processes=None, resume=True)))
    assert_same_student(whole.two, config, exactly=True)


@pytest.mark.slow
def test_a_killed_process_before_the_first_checkpoint_begins_again(whole: Whole, tmp_path: Path) -> None:
    train = dataclasses.replace(whole.two.train, save_steps=None)
    config = dataclasses.replace(whole.two, output_dir=str(tmp_path / "run"), train=train)
    with pytest.raises(WorkerError, match=r"the training goes on from its beginning: it has no checkpoint yet$"):
        list(run_distill(config, report=Killer(2, 1)))
    killer = Killer(-1, 0)
    list(run_distill(dataclasses.replace(config, processes=3, resume=True), report=killer))
    assert "2 of 3 processes train: so many divide the 2 examples of a step evenly" in killer.notes
    assert_same_student(whole.two, config, exactly=True)


@pytest.mark.slow
def test_weights_may_be_sharded(whole: Whole, tmp_path: Path) -> None:
    train = dataclasses.replace(whole.two.train, fsdp=True)
    config = dataclasses.replace(whole.two, output_dir=str(tmp_path / "run"), train=train)
    list(run_distill(config))
    assert_same_student(whole.one, config, exactly=False)


def test_an_error_in_a_process_is_the_error_of_the_command(whole: Whole, tmp_path: Path) -> None:
    train = dataclasses.replace(whole.two.train, learning_rate=1e30, max_grad_norm=1e30)
    config = dataclasses.replace(whole.two, output_dir=str(tmp_path / "run"), train=train)
    with pytest.raises(NumericsError, match=r"the loss is .* at step 2 .*lower learning_rate"):
        list(run_distill(config))
    assert (train_directory(config) / "bad_batch.jsonl").exists()
    assert not multiprocessing.active_children()


def see_gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


@pytest.mark.parametrize(
    ("options", "gpus", "message"),
    [
        ({"processes": 2, "devices": "all"}, 0, "give processes, which divide a CPU, or devices, which are GPUs, not"),
        ({"devices": "all"}, 0, "devices names GPUs, and torch finds none here"),
        ({"devices": "0,5"}, 4, "there is no device 5: torch finds 4 devices, 0 to 3"),
        ({"processes": 2}, 4, "processes divides the cores of a CPU, and the models run on cuda"),
        ({"processes": 1, "train": TrainSettings(fsdp=True)}, 0, r"train\.fsdp shards .*, and one trains: give proc"),
        (
            {"processes": 2, "train": TrainSettings(fsdp=True, per_device_train_batch_size=1)}, 0,
            r"train\.fsdp shards the model over several processes, and one trains",
        ),
    ],
)  # fmt: skip
def test_refused_before_anything_is_done(
    whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], gpus: int, message: str
) -> None:
    see_gpus(monkeypatch, gpus)
    config = dataclasses.replace(whole.one, output_dir=str(tmp_path / "run"), **options)
    with pytest.raises(InputError, match=message):
        next(run_distill(config))
    assert not (tmp_path / "run").exists()


def test_fewer_devices_than_a_training_was_begun_with_are_refused(
    whole: Whole, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The training is resumed on one GPU, the search on the CPU."""
    own = dataclasses.replace(whole.two.select, processes=1)
    directory = train_directory(whole.two)
    monkeypatch.setattr(round_training, "choose_gpus", lambda *arguments: [Place(device="cuda", threads=1)])
    (directory / "finished.json").rename(directory / "kept.json")
    try:
        journal = Path(whole.two.output_dir) / "rounds.jsonl"
        lines = journal.read_bytes()
        journal.write_bytes(b"")
        with pytest.raises(
            InputError, match=r"/train was begun by 2 processes, and this run has 1 device: name 2 with"
        ):
            list(run_distill(dataclasses.replace(whole.two, processes=None, devices="1", select=own, resume=True)))
        journal.write_bytes(lines)
    finally:
        (directory / "kept.json").rename(directory / "finished.json")


def test_the_search_may_have_processes_of_its_own(whole: Whole) -> None:
    base = DistillConfig(teacher="t", student="s", data="d", processes=2)
    assert base.make_select_settings().processes == 2
    own = dataclasses.replace(base, select=SelectSettings(devices="0"))
    assert own.make_select_settings() == own.select
