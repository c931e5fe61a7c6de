"""Data parallel training: two processes on the CPU, started by torchrun or with its variables, train what one does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.rank_jobs import make_config
from support.ranks import Ranks
from support.tiny_pair import TinyPair
from support.training_runs import ROWS, config_for, metrics, weights

from genssd.distill.train.config import TrainConfig
from genssd.distill.train.distributed import World
from genssd.distill.train.rollout_options import RolloutOptions
from genssd.distill.train.trainer import run_train
from genssd.engine.common.errors import InputError

Write = Callable[..., Path]


def flags_of(options: dict[str, Any]) -> list[str]:
    flags: list[str] = []
    for name, value in options.items():
        if isinstance(value, bool):
            flags.append(f"--{'' if value else 'no-'}{name}")
        else:
            flags += [f"--{name}", *(map(str, value) if isinstance(value, tuple) else [str(value)])]
    return flags


def run_process(words: list[str]) -> str:
    """Run Python with arguments; return its standard output."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, env=environment, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


TORCHRUN = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "-m", "genssd", "train"]


@pytest.mark.slow
@pytest.mark.parametrize("use_peft", [False, True])
def test_two_processes_train_what_one_trains(
    tiny_pair: TinyPair, write_rows: Write, tmp_path: Path, ranks: Ranks, use_peft: bool
) -> None:
    """The global batch is the same; in the last batch of an epoch one process has no examples. Resuming works, too.

    Adapters begin as the same ones in both processes, and their dropout is that of one process.
    """
    held_out = write_rows(ROWS[:3], "held.jsonl")
    options = {
        "model_name_or_path": str(tiny_pair.student), "data": [str(write_rows(ROWS[:9]))], "layout": "tree",
        "eval_data": [str(held_out)], "allow_eval_overlap": True, "kd_ratio": 0.5, "save_steps": 2,
        "teacher_model_name_or_path": str(tiny_pair.teacher), "learning_rate": 1e-3, "num_train_epochs": 2.0,
        "per_device_train_batch_size": 2, "logging_steps": 1, "save_total_limit": None,
    }  # fmt: skip
    if use_peft:
        options |= {"use_peft": True, "lora_dropout": 0.2, "learning_rate": 1e-2}
    one = {**options, "gradient_accumulation_steps": 4, "output_dir": str(tmp_path / "one")}
    two = {**options, "gradient_accumulation_steps": 2, "output_dir": str(tmp_path / "two")}
    run_train(make_config(one))
    (tmp_path / "resumed").mkdir()
    (tmp_path / "resumed" / "checkpoint-2").symlink_to(tmp_path / "two" / "checkpoint-2")
    resuming = {**two, "output_dir": str(tmp_path / "resumed"), "resume_from_checkpoint": "last"}
    ranks.results(2, "train", two, resuming)
    curves = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert len(curves[0]) == len(curves[1])
    for a, b in zip(*curves, strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() - {"tokens_per_second"}:
            assert a[name] == pytest.approx(b[name], rel=1e-4), name
    expected, trained, resumed = (weights(tmp_path / name) for name in ("one", "two", "resumed"))
    for name, value in expected.items():
        # Adam's first steps are lr * sign(gradient): where the gradient is nearly 0 rounding decides
        assert ((value - trained[name]).abs() < 1e-5).float().mean() > 0.99, name
    assert all(torch.equal(resumed[name], trained[name]) for name in trained)
    state = json.loads((tmp_path / "two" / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["settings"]["processes"] == 2


@pytest.mark.slow
def test_two_processes_write_what_one_writes(tiny_pair: TinyPair, write_rows: Write, tmp_path: Path) -> None:
    """The training is on-policy, and every prompt occurs twice."""
    shared = {
        "model_name_or_path": str(tiny_pair.student), "data": (str(write_rows([*ROWS[:3], *ROWS[:3]])),),
        "teacher_model_name_or_path": str(tiny_pair.teacher), "kd_ratio": 1.0, "lmbda": 1.0, "save_steps": 1,
        "per_device_train_batch_size": 3, "logging_steps": 1, "num_train_epochs": 2,
    }  # fmt: skip
    memory = {"rollout.memory_bytes": 1 << 22, "rollout.max_tokens": 5}
    run_process([*TORCHRUN, *flags_of({**shared, **memory, "output_dir": str(tmp_path / "two")})])
    rollout = RolloutOptions(memory_bytes=1 << 22, max_tokens=5)
    options: Any = {**shared, "rollout": rollout, "output_dir": str(tmp_path / "one")}
    run_train(TrainConfig(**{**options, "gradient_accumulation_steps": 2}))
    for a, b in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert a["tokens"] == b["tokens"]
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)


def test_every_part_is_counted_in_one_process_and_all_compute_equally_many() -> None:
    for size in (1, 2, 3):
        for count in (1, 2, 5, 6):
            worlds = [World(rank=rank, size=size, device=torch.device("cpu"), mesh=None) for rank in range(size)]
            shards = [world.shard(list(range(count))) for world in worlds]
            assert len({len(shard) for shard in shards}) == 1
            assert sorted(part for shard in shards for part, counted in shard if counted) == list(range(count))


def test_splitting_needs_several_processes(tiny_pair: TinyPair, write_rows: Write, tmp_path: Path) -> None:
    config = config_for(tiny_pair, write_rows(ROWS), tmp_path / "run", fsdp=True)
    with pytest.raises(InputError, match="start it with torchrun"):
        run_train(config)
