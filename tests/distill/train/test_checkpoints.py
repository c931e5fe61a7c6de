"""Checkpoints that were damaged, torn or left over, and full disks: an error that names the place, never a model."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import resource
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import edit_state, edit_tensors, sign
from support.tiny_pair import TinyPair
from support.training_runs import ROWS, config_for, metrics, weights

from genssd.distill.train.build import Training, build_training, read_inputs
from genssd.distill.train.checkpoints import TrainerState, save_checkpoint
from genssd.distill.train.config import TrainConfig
from genssd.distill.train.distributed import World
from genssd.distill.train.reading import read_state
from genssd.distill.train.resume import fix_date, restore
from genssd.distill.train.trainer import run_train
from genssd.engine.common.errors import CheckpointError, InputError

Change = Callable[[dict[str, Any]], Any]
PARAMETER = "model.layers.0.mlp.up_proj.weight"


@dataclasses.dataclass(frozen=True)
class Finished:
    """A training of nine steps with checkpoints after every second one, and the same training before its first step."""

    config: TrainConfig
    training: Training

    @property
    def output_dir(self) -> Path:
        return Path(self.config.output_dir)


@pytest.fixture(scope="module")
def finished(tiny_pair: TinyPair, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    base = tmp_path_factory.mktemp("training")
    data = base / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    config = config_for(
        tiny_pair, data, base / "run", num_train_epochs=3, save_steps=2, save_total_limit=None, eval_data=(str(data),),
        allow_eval_overlap=True, eval_steps=3,
    )  # fmt: skip
    run_train(config)
    fixed = fix_date(dataclasses.replace(config, resume_from_checkpoint="last"))
    inputs = read_inputs(fixed)
    world = World.join(torch.device("cpu"), fsdp=False)
    return Finished(config, build_training(fixed, inputs, world, None))


@pytest.fixture
def copied(finished: Finished, tmp_path: Path) -> Path:
    """Return the output directory of a copy of the training."""
    shutil.copytree(finished.output_dir, tmp_path / "run")
    return tmp_path / "run"


def resumed(finished: Finished, output_dir: Path, **changes: Any) -> TrainConfig:
    return dataclasses.replace(
        finished.config, output_dir=str(output_dir), **{"resume_from_checkpoint": "last", **changes}
    )


def put(**values: Any) -> Change:
    return lambda fields: fields.update(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda fields: fields.pop("tokens"), "it has no tokens"),
        (lambda fields: fields.pop("settings"), "it has no settings"),
        (lambda fields: fields.pop("checksum"), "it has no checksum"),
        (put(more=1), "it has an unknown key 'more'"),
        (put(step=-1), "step must be an integer of at least 1, not -1"),
        (put(step="8"), "step must be an integer of at least 1, not '8'"),
        (put(epoch=1.5), r"epoch must be an integer of at least 0, not 1\.5"),
        (put(batch=True), "batch must be an integer of at least 1, not True"),
        (put(tokens=None), "tokens must be an integer of at least 1, not None"),
        (put(best_eval_loss=float("nan")), "best_eval_loss must be a finite number or null, not nan"),
        (put(settings=[]), "settings must be an object"),
        (put(files={"config.json": 3}), "files must be an object of checksums"),
        (put(tokens=7), "checksum is not that of the other keys, which were changed"),
    ],
)
def test_a_state_that_no_training_writes_is_named(copied: Path, change: Change, message: str) -> None:
    edit_state(copied / "checkpoint-8", change)
    earlier = f"resume from the checkpoint before it: --resume-from-checkpoint {copied / 'checkpoint-6'}"
    with pytest.raises(CheckpointError, match=rf"checkpoint-8/trainer_state\.json is damaged: {message}; {earlier}$"):
        read_state(copied / "checkpoint-8")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"step": 7}, "step is 7, but the directory is checkpoint-8"),
        ({"epoch": 1}, "step 8 is not batch 2 of epoch 1 with 3 steps"),
        ({"batch": 4}, "step 8 is not batch 4 of epoch 2 with 3 steps"),
        ({"tokens": 7}, r"tokens is 7, but \d+ after 8 steps"),
    ],
)
def test_progress_that_the_training_never_makes_is_named(
    finished: Finished, copied: Path, values: dict[str, int], message: str
) -> None:
    edit_state(copied / "checkpoint-8", put(**values), signed=True)
    with pytest.raises(CheckpointError, match=message):
        run_train(resumed(finished, copied))


def test_a_step_beyond_the_end_is_named(finished: Finished, copied: Path) -> None:
    (copied / "checkpoint-8").rename(copied / "checkpoint-11")
    edit_state(copied / "checkpoint-11", put(step=11, epoch=3, batch=2), signed=True)
    with pytest.raises(CheckpointError, match="step 11 is beyond the end of the training; resume from"):
        run_train(resumed(finished, copied))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{PARAMETER}/exp_avg"), rf"it has no {PARAMETER}/exp_avg"),
        (lambda t: t.update({"more": torch.zeros(1)}), "it has 'more', which this training does not have"),
        (lambda t: t.update({f"{PARAMETER}/exp_avg": torch.zeros(3)}), r"exp_avg has the shape \[3\], not \[96, 64\]"),
        (
            lambda t: t.update({f"{PARAMETER}/exp_avg": t[f"{PARAMETER}/exp_avg"].bfloat16()}),
            r"exp_avg is of torch\.bfloat16, not torch\.float32",
        ),
        (lambda t: t[f"{PARAMETER}/exp_avg"].view(-1)[5].fill_(float("nan")), "exp_avg holds NaN or infinity"),
        (lambda t: t[f"{PARAMETER}/exp_avg_sq"].view(-1)[5].fill_(-1.0), "exp_avg_sq holds a negative mean of squares"),
        (lambda t: t[f"{PARAMETER}/step"].fill_(-1.0), "step is -1, not a number of steps up to 8"),
        (lambda t: t[f"{PARAMETER}/step"].fill_(9.0), "step is 9, not a number of steps up to 8"),
        (lambda t: [v.fill_(7.0) for k, v in t.items() if k.endswith("/step")], "it is of step 7, .* of 8"),
    ],
)
def test_a_state_of_the_optimizer_that_no_training_writes_is_named(
    finished: Finished, copied: Path, change: Change, message: str
) -> None:
    path = copied / "checkpoint-8"
    edit_tensors(path, change)
    state = read_state(path)
    with pytest.raises(CheckpointError, match=rf"optimizer\.safetensors is damaged: .*{message}.*; resume from the"):
        restore(finished.training, path, state)


def test_a_changed_bit_is_found_and_the_checkpoint_before_gives_the_same_model(
    finished: Finished, copied: Path
) -> None:
    path = copied / "checkpoint-8"
    for name in ("optimizer.safetensors", "model.safetensors"):
        kept = (path / name).read_bytes()
        content = bytearray(kept)
        content[-100] ^= 1
        (path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=rf"checkpoint-8/{name} is damaged: its content has another checksum"):
            run_train(resumed(finished, copied))
        (path / name).write_bytes(kept[:-10])
        with pytest.raises(CheckpointError, match=rf"checkpoint-8/{name} is damaged"):
            run_train(resumed(finished, copied))
        (path / name).unlink()
        with pytest.raises(CheckpointError, match=rf"checkpoint-8/{name} is missing; resume from") as caught:
            run_train(resumed(finished, copied))
        (path / name).write_bytes(kept)
    remedy = str(caught.value).rpartition("--resume-from-checkpoint ")[2]
    (path / "model.safetensors").unlink()
    run_train(resumed(finished, copied, resume_from_checkpoint=remedy))
    expected, trained = weights(finished.output_dir), weights(copied)
    assert all(torch.equal(trained[name], expected[name]) for name in expected)


def test_what_a_killed_process_left_is_removed_and_never_taken(finished: Finished, copied: Path) -> None:
    for name in ("checkpoint-10.tmp", "checkpoint-4.old", "best.tmp", "final.tmp"):
        shutil.copytree(copied / "checkpoint-8", copied / name)
    shutil.rmtree(copied / "checkpoint-2")
    (copied / "checkpoint-6" / "trainer_state.json").unlink()  # what another program's removal leaves
    (copied / "best").rename(copied / "best.old")  # killed while a better model took its place
    (copied / "notes.tmp").mkdir()
    summary = run_train(resumed(finished, copied))
    assert summary.steps == 9
    assert {p.name for p in copied.iterdir() if p.is_dir()} == {
        "best", "checkpoint-4", "checkpoint-6", "checkpoint-8", "notes.tmp",
    }  # fmt: skip
    assert (copied / "best" / "best.json").read_bytes() == (finished.output_dir / "best" / "best.json").read_bytes()


@contextmanager
def full_disk(monkeypatch: pytest.MonkeyPatch, after: int) -> Iterator[list[int]]:
    """Let os.fsync raise ENOSPC after so many calls; yield the list of its calls."""
    calls: list[int] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) > after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        yield calls


def save_again(training: Training, output_dir: Path, step: int) -> None:
    state = TrainerState({}, step=step, batch=1, tokens=5)
    save_checkpoint(output_dir, training.trained, state, training.world)


def test_a_full_disk_leaves_the_checkpoint_before(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = finished.training
    save_again(training, tmp_path, 1)
    kept = {p.name: p.read_bytes() for p in (tmp_path / "checkpoint-1").iterdir()}
    with full_disk(monkeypatch, after=10_000) as calls:
        save_again(training, tmp_path, 2)
    assert len(calls) > len(kept)
    shutil.rmtree(tmp_path / "checkpoint-2")
    for after in range(len(calls) - 2):  # the last ones sync the directory after the rename
        with (
            full_disk(monkeypatch, after),
            pytest.raises(InputError, match=r"cannot be written: No space left .*; checkpoint-1 is kept") as caught,
        ):
            save_again(training, tmp_path, 2)
        assert "\n" not in str(caught.value)
        assert {p.name: p.read_bytes() for p in (tmp_path / "checkpoint-1").iterdir()} == kept
        assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-1"]


@pytest.mark.parametrize("size", [100, 3_000, 30_000, 400_000])
def test_a_file_that_the_disk_does_not_take_is_named(finished: Finished, tmp_path: Path, size: int) -> None:
    """The limit on the size of a file lets every writer fail: of weights, configs, tokenizers and JSON."""
    save_again(finished.training, tmp_path, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        with pytest.raises(InputError, match=r"checkpoint-2.* cannot be written: .*; checkpoint-1 is kept"):
            save_again(finished.training, tmp_path, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-1"]


def replace_first(path: Path, old: bytes, new: bytes) -> None:
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new, 1))


@pytest.mark.parametrize(
    ("damage", "changes", "message"),
    [
        (lambda run: replace_first(run / "metrics.jsonl", b'"step": 2', b'"step": 3'), {},
         r"metrics\.jsonl, line 2 is damaged"),
        (lambda run: replace_first(run / "best" / "best.json", b'"step"', b'"stop"'), {},
         r"best\.json is damaged: step"),
        (lambda run: None, {"report_to": "wandb"}, "report_to=wandb needs the package wandb"),
        (lambda run: None, {"learning_rate": 2e-3}, "was trained with learning_rate"),
    ],
)  # fmt: skip
def test_what_is_refused_is_refused_before_anything_is_written(
    finished: Finished,
    copied: Path,
    monkeypatch: pytest.MonkeyPatch,
    damage: Any,
    changes: dict[str, Any],
    message: str,
) -> None:
    """Also later checkpoints, which a resumed training removes, are left."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    earlier = min(copied.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    damage(copied)
    before = read_files(copied)
    with pytest.raises((InputError, CheckpointError), match=message):
        run_train(resumed(finished, copied, resume_from_checkpoint=str(earlier), **changes))
    assert read_files(copied) == before


def read_files(directory: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}


def test_auto_begins_where_there_is_no_checkpoint(finished: Finished, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    for name in ("run.json", "metrics.jsonl"):  # of a training that was killed before its first checkpoint
        shutil.copy(finished.output_dir / name, run_dir / name)
    shutil.copytree(finished.output_dir / "best", run_dir / "best")
    with pytest.raises(InputError, match="holds a model already"):
        run_train(resumed(finished, run_dir, resume_from_checkpoint=None))
    with pytest.raises(InputError, match=r"was begun with learning_rate=0\.001, not 0\.002"):
        run_train(resumed(finished, run_dir, resume_from_checkpoint="auto", learning_rate=2e-3))
    summary = run_train(resumed(finished, run_dir, resume_from_checkpoint="auto", save_steps=None, save_total_limit=2))
    assert summary.steps == 9
    assert [row["step"] for row in metrics(run_dir) if "loss" in row] == list(range(1, 10))
    expected, trained = weights(finished.output_dir), weights(run_dir)
    assert all(torch.equal(trained[name], expected[name]) for name in expected)
    with pytest.raises(InputError, match="holds a finished model, and no checkpoint to resume from"):
        run_train(resumed(finished, run_dir, resume_from_checkpoint="auto"))


def test_auto_takes_the_newest_checkpoint(finished: Finished, copied: Path) -> None:
    logged = (copied / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (copied / "metrics.jsonl").write_bytes(logged[0])
    run_train(resumed(finished, copied, resume_from_checkpoint="auto"))
    assert [row["step"] for row in metrics(copied) if "loss" in row] == [1, 9]


def test_a_final_model_is_complete_or_has_no_config(
    finished: Finished, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed while the final model takes its place: what is there loads nowhere, and the training can be resumed."""
    real = os.replace

    def dies(source: Path, target: Path) -> None:
        if Path(source).parent.name == "final.tmp" and Path(source).name.startswith("model"):
            raise KeyboardInterrupt
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", dies)
        with pytest.raises(KeyboardInterrupt):
            run_train(resumed(finished, copied))
    assert not (copied / "config.json").exists()
    run_train(resumed(finished, copied))
    expected, trained = weights(finished.output_dir), weights(copied)
    assert all(torch.equal(trained[name], expected[name]) for name in expected)
    assert not (copied / "final.tmp").exists()


def test_signing_makes_a_checkpoint_that_is_taken(finished: Finished, copied: Path) -> None:
    """The other tests fail by what they change, not by the checksums that they write."""
    path = copied / "checkpoint-8"
    save_file(load_file(path / "optimizer.safetensors"), path / "optimizer.safetensors", metadata={"a": "b"})
    sign(path)
    assert run_train(resumed(finished, copied)).steps == 9
