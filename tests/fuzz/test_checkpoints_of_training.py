"""Checkpoints of a training with any trainer_state.json or optimizer.safetensors: what was saved, or one line."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.fuzzing import fuzz_settings, mutated_bytes, mutated_file, succeeds_or_refuses
from support.tiny_pair import TinyPair
from support.training_runs import ROWS, config_for

from genssd.distill.train.build import Training, build_training, read_inputs
from genssd.distill.train.checkpoints import (
    OPTIMIZER,
    STATE,
    WEIGHTS,
    compute_checksum,
    compute_checksums,
    list_checkpoints,
)
from genssd.distill.train.distributed import World
from genssd.distill.train.reading import Checkpoint, read_checkpoint, read_state
from genssd.distill.train.resume import collect_settings, fix_date, read_progress
from genssd.distill.train.shards import SHARDS, save_shards
from genssd.distill.train.trainer import run_train

pytestmark = pytest.mark.fuzz


@dataclasses.dataclass(frozen=True)
class Saved:
    """A training, the directory of its last checkpoint, and the files that are mutated as they were written."""

    training: Training = dataclasses.field(repr=False)
    path: Path
    files: Mapping[str, bytes] = dataclasses.field(repr=False)

    def write(self, **changed: bytes) -> None:
        for name, content in {**self.files, **changed}.items():
            (self.path / name).write_bytes(content)

    def read(self) -> Checkpoint:
        """Read the checkpoint as a training does that is resumed from it, with all checks."""
        training = self.training
        settings = collect_settings(training.config, training.inputs, training.world)
        state = read_progress(training.config, training.inputs, training.world, self.path, settings)
        return read_checkpoint(self.path, training.trained, state)


@pytest.fixture(scope="module")
def saved(tiny_pair: TinyPair, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    base = tmp_path_factory.mktemp("training")
    (base / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    config = config_for(tiny_pair, base / "data.jsonl", base / "run", save_steps=2, threads=1)
    run_train(config)
    config = fix_date(dataclasses.replace(config, resume_from_checkpoint="last"))
    inputs = read_inputs(config)
    training = build_training(config, inputs, World.join(torch.device("cpu"), fsdp=False), None)
    path = list_checkpoints(base / "run")[-1]
    return Saved(training, path, {name: (path / name).read_bytes() for name in (STATE, OPTIMIZER)})


def sign(content: bytes, path: Path) -> bytes:
    """Return trainer_state.json with the checksum that its fields have, where it is an object."""
    try:
        fields = json.loads(content)
        del fields["checksum"]
        fields["files"] = compute_checksums(path)
        return json.dumps({**fields, "checksum": compute_checksum(fields)}).encode()
    except (ValueError, TypeError, KeyError, RecursionError):
        return content


@given(data=st.data())
@fuzz_settings(few=60, share=0.04)
def test_any_trainer_state(saved: Saved, data: st.DataObject) -> None:
    """With the checksum of what it holds, too: then the keys and numbers have to be those of a training."""
    original = json.loads(saved.files[STATE])
    content = data.draw(mutated_file(original, names=("step", "epoch", "batch", "tokens", "files", "optimizer")))
    if data.draw(st.booleans()):
        content = sign(content, saved.path)
    saved.write(**{STATE: content})
    message = succeeds_or_refuses(saved.read)
    if message is None:
        read = dataclasses.asdict(read_state(saved.path))
        assert {name: read[name] for name in read if name != "best_eval_loss"} == {
            name: original[name] for name in read if name != "best_eval_loss"
        }
    else:
        assert "\n" not in message


@given(data=st.data())
@fuzz_settings(few=40, share=0.02)
def test_any_state_of_the_optimizer(saved: Saved, data: st.DataObject) -> None:
    content = data.draw(mutated_bytes(saved.files[OPTIMIZER]))
    saved.write(**{OPTIMIZER: content})
    is_signed = data.draw(st.booleans())
    if is_signed:
        (saved.path / STATE).write_bytes(sign(saved.files[STATE], saved.path))
    message = succeeds_or_refuses(saved.read)
    if message is None:
        assert is_signed or content == saved.files[OPTIMIZER]
    else:
        assert "\n" not in message
        assert OPTIMIZER in message
        assert "resume from the checkpoint before it: --resume-from-checkpoint " in message


@pytest.fixture(scope="module")
def sharded(saved: Saved, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """Return the checkpoint as the one shard of a training whose weights are sharded."""
    saved.write()
    training = saved.training
    path = tmp_path_factory.mktemp("sharded") / saved.path.name
    (path / SHARDS).mkdir(parents=True)
    weights = {f"{WEIGHTS}{name}": p.detach() for name, p in training.trained.named_parameters()}
    save_shards(path / SHARDS, {**weights, **saved.read().tensors})
    (path / STATE).write_bytes(sign(saved.files[STATE], path))
    (shard,) = (path / SHARDS).iterdir()
    names = (STATE, f"{SHARDS}/{shard.name}")
    return Saved(training, path, {name: (path / name).read_bytes() for name in names})


@given(data=st.data())
@fuzz_settings(few=40, share=0.02)
def test_any_shard(sharded: Saved, data: st.DataObject) -> None:
    """With its checksum, too; and with other offsets in its header, which say where in a tensor its parts lie."""
    name = next(name for name in sharded.files if name.startswith(SHARDS))
    content = sharded.files[name]
    if data.draw(st.booleans()):
        wrong = data.draw(
            st.sampled_from([b"[0,-8]", b"[9, 0]", b"[0]   ", b"[null]", b"[9e9,0", b"{}    ", b"[[0]] "])
        )
        place = data.draw(st.integers(0, len(content) // 50))
        content = content[:place] + content[place:].replace(b"[0, 0]", wrong, 1)
    else:
        content = data.draw(mutated_bytes(content))
    sharded.write(**{name: content})
    is_signed = data.draw(st.booleans())
    if is_signed:
        (sharded.path / STATE).write_bytes(sign(sharded.files[STATE], sharded.path))
    message = succeeds_or_refuses(sharded.read)
    if message is None:
        assert is_signed or content == sharded.files[name]
    else:
        assert "\n" not in message
        assert SHARDS in message


def test_what_was_saved_is_taken(saved: Saved, sharded: Saved) -> None:
    saved.write()
    sharded.write()
    tensors: Mapping[str, Any] = saved.read().tensors
    assert len(tensors) % 3 == 0
    shards = sharded.read().tensors
    assert tensors.keys() < shards.keys()
    assert all(torch.equal(tensors[name], shards[name]) for name in tensors)
