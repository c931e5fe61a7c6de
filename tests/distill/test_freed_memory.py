"""What a command has loaded is free when it ends, without the garbage collector, which may run minutes later.

`distill` and `reproduce` run commands one after the other in one process: caches take most of the memory that is free,
and what is left of an earlier command is missing to the next one.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_pair import TinyPair
from support.training_runs import ROWS

from genssd.distill.evaluate.config import EvaluateConfig
from genssd.distill.evaluate.run import run_evaluate
from genssd.distill.score.config import ScoreConfig
from genssd.distill.score.prefix import run_prefix
from genssd.distill.score.prefix_config import PrefixConfig
from genssd.distill.score.run import run_score
from genssd.distill.select.config import SelectConfig
from genssd.distill.select.generate import run_generate
from genssd.distill.select.generate_config import GenerateConfig
from genssd.distill.select.run import run_select
from genssd.distill.train.config import TrainConfig
from genssd.distill.train.rollout_options import RolloutOptions
from genssd.distill.train.trainer import run_train
from genssd.engine.cache import page_list
from genssd.engine.engine import Engine

MEMORY = 1 << 22


@pytest.fixture
def uncollected() -> Iterator[Callable[[], list[torch.Tensor]]]:
    """Return a function that returns the tensors which only the collector has freed since the test began."""
    gc.collect()
    gc.disable()
    try:

        def collect() -> list[torch.Tensor]:
            gc.set_debug(gc.DEBUG_SAVEALL)
            gc.collect()
            return [held for held in gc.garbage if isinstance(held, torch.Tensor)]

        yield collect
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
        gc.collect()


def run(command: str, pair: TinyPair, directory: Path) -> None:
    teacher, student, out = str(pair.teacher), str(pair.student), str(directory / command)
    problems, rows = directory / "problems.jsonl", directory / "rows.jsonl"
    problems.write_text("".join(json.dumps({"question": f"{i}+1?", "answer": str(i + 1)}) + "\n" for i in range(3)))
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS[:4]))
    search: dict[str, Any] = {"candidates": 2, "max_tokens": 6, "memory_bytes": MEMORY}
    trained: dict[str, Any] = {
        "model_name_or_path": student, "data": (str(rows),), "output_dir": out, "max_steps": 2, "kd_ratio": 0.5,
        "teacher_model_name_or_path": teacher, "per_device_train_batch_size": 2,
    }  # fmt: skip
    match command:
        case "select":
            run_select(SelectConfig(teacher=teacher, student=student, data=str(problems), output_dir=out, **search))
        case "select from two teachers":
            both = (teacher, student)
            run_select(SelectConfig(teacher=both, student=student, data=str(problems), output_dir=out, **search))
        case "generate":
            run_generate(
                GenerateConfig(
                    teacher=teacher, student=student, data=str(problems), output_dir=out, method="rsd", max_tokens=6,
                    memory_bytes=MEMORY,
                )
            )  # fmt: skip
        case "evaluate":
            run_evaluate(
                EvaluateConfig(model=student, data=str(problems), output_dir=out, max_tokens=6, memory_bytes=MEMORY)
            )
        case "score":
            run_score(ScoreConfig(student=student, data=(str(rows),), output_dir=out, memory_bytes=MEMORY))
        case "prefix":
            run_prefix(
                PrefixConfig(student=student, data=(str(rows),), output_dir=out, max_tokens=6, memory_bytes=MEMORY)
            )
        case "train":
            run_train(TrainConfig(**trained))
        case "train on-policy":
            run_train(TrainConfig(**trained, lmbda=1.0, rollout=RolloutOptions(memory_bytes=MEMORY, max_tokens=5)))


COMMANDS = (
    "select", "select from two teachers", "generate", "evaluate", "score", "prefix", "train", "train on-policy",
)  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_leaves_nothing_to_the_collector(
    command: str, tiny_pair: TinyPair, tmp_path: Path, uncollected: Callable[[], list[torch.Tensor]]
) -> None:
    before = {*page_list._lists}
    run(command, tiny_pair, tmp_path)
    assert {*page_list._lists} == before
    assert not uncollected()


def test_an_engine_ends_with_its_last_reference(
    tiny_pair: TinyPair, uncollected: Callable[[], list[torch.Tensor]]
) -> None:
    before = {*page_list._lists}
    engine = Engine.from_pretrained(tiny_pair.teacher, tiny_pair.student, memory_bytes=MEMORY)
    assert engine.teachers == (engine,)
    engine.select_expand(["1+1?"], max_tokens=4)
    assert {*page_list._lists} != before
    del engine
    assert {*page_list._lists} == before
    assert not uncollected()
