"""Training from stored hidden states of the teacher, from its stored top k, and from the teacher in memory.

    python -m bench.training.stored_states [--steps 12] [--json bench/results/stored_states.json]

Two pairs: the small pair that ships with genssd, on selections of its problems, and random models of Qwen3's kind of
which the teacher is much larger than the student, on responses of the teacher. The same rows are trained on in every
way, each in a process of its own on one thread: reverse KL to the teacher, the loss of every step, CPU time per step
after the first one, and the memory at its largest less what the process has before it loads anything.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from bench.engine.peers.machine import describe_machine
from bench.engine.peers.model import save_model
from bench.engine.peers.workloads import SIZES, ModelShape

from genssd.distill import small_pair
from genssd.distill.select.config import SelectConfig
from genssd.distill.select.generate import run_generate
from genssd.distill.select.generate_config import GenerateConfig
from genssd.distill.select.run import run_select
from genssd.distill.small_pair.problems import make_problems
from genssd.distill.train.config import TrainConfig
from genssd.distill.train.trainer import TrainProgress, run_train
from genssd.engine.decoding.chunk import Chunk

PAIR = Path(next(iter(small_pair.__path__)))
LARGE = ModelShape(layers=12, width=512, inner=1536, heads=8, kv_heads=2, head_dim=64, vocabulary=8192)
SMALL = ModelShape(layers=2, width=256, inner=768, heads=4, kv_heads=2, head_dim=64, vocabulary=8192)
TOPK = 16
WAYS: dict[str, dict[str, Any]] = {
    "teacher in memory": {},
    "states in bfloat16": {"kd_states": True},
    "top k, bucket": {"teacher_model_name_or_path": None},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """The rows of a pair, and its models."""

    name: str
    teacher: Path
    student: Path
    data: Path
    has_topk: bool


def make_small_rows(folder: Path) -> Rows:
    """Let the small pair select, and keep states and top k."""
    problems = folder / "problems.jsonl"
    rows = [{"question": p.question, "answer": str(p.answer)} for p in make_problems(48, seed=3)]
    problems.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = SelectConfig(
        teacher=str(PAIR / "teacher"), student=str(PAIR / "student"), data=str(problems), candidates=2, max_tokens=96,
        chunk=Chunk(tokens=1, limit=64), teacher_states="bfloat16", teacher_topk=TOPK, memory_bytes=1 << 27, threads=1,
        output_dir=str(folder / "small"),
    )  # fmt: skip
    data = run_select(config).path
    return Rows(name="small pair", teacher=PAIR / "teacher", student=PAIR / "student", data=data, has_topk=True)


def make_random_rows(folder: Path) -> Rows:
    """Let a random teacher write, and keep its states."""
    for name, shape in (("teacher", LARGE), ("student", SMALL)):
        save_model(folder / name, replace(SIZES["small"], model=shape))
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"{i} and {i * i}: "}) + "\n" for i in range(48)))
    config = GenerateConfig(
        teacher=str(folder / "teacher"), student=str(folder / "student"), data=str(prompts), max_tokens=64,
        teacher_states="bfloat16", memory_bytes=1 << 27, dtype="float32", threads=1, output_dir=str(folder / "random"),
    )  # fmt: skip
    run_generate(config)
    data = folder / "random" / "responses.jsonl"
    return Rows(name="random models", teacher=folder / "teacher", student=folder / "student", data=data, has_topk=False)


def train(rows: Rows, way: str, steps: int, output_dir: Path) -> dict[str, Any]:
    """Train in this process, which does nothing else; return the losses, the time and the memory."""
    torch.set_num_threads(1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    marks: list[tuple[float, float]] = []

    def note(progress: TrainProgress) -> None:
        marks.append((time.process_time(), progress.loss))

    options = {"teacher_model_name_or_path": str(rows.teacher), **WAYS[way]}
    run_train(
        TrainConfig(
            model_name_or_path=str(rows.student), data=(str(rows.data),), output_dir=str(output_dir), kd_ratio=1.0,
            kd_loss="reverse_kl", statuses=("finished", "length"), max_steps=steps, learning_rate=5e-4, threads=1,
            device="cpu", per_device_train_batch_size=4, **options,
        ),
        note,
    )  # fmt: skip
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = [after - earlier for (earlier, _), (after, _) in pairwise(marks)]
    return {
        "pair": rows.name,
        "way": way,
        "seconds_per_step": round(sorted(seconds)[len(seconds) // 2], 4),
        "peak_mib": round((peak - before) / 1024, 1),
        "losses": [round(loss, 6) for _, loss in marks],
    }


def in_process(work: Callable[[], Any]) -> Any:
    """Return what a function returns in a process of its own."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=lambda: theirs.send(work()))
    process.start()
    theirs.close()
    result = ours.recv()
    process.join()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    results: list[dict[str, Any]] = []
    with TemporaryDirectory() as name:
        for number, make in enumerate((make_small_rows, make_random_rows)):
            folder = Path(name, str(number))
            folder.mkdir()
            rows: Rows = in_process(lambda make=make, folder=folder: make(folder))
            ways = [way for way in WAYS if rows.has_topk or "top k" not in way]
            first: dict[str, Any] | None = None
            for index, way in enumerate(ways):
                out = folder / f"out-{index}"
                one = in_process(lambda rows=rows, way=way, out=out: train(rows, way, options.steps, out))
                first = first or one
                worst = max(abs(a - b) / b for a, b in zip(one["losses"], first["losses"], strict=True))
                results.append({**one, "largest_difference": round(worst, 6)})
                print(
                    f"{rows.name:14} {way:19} {one['seconds_per_step']:.3f} s per step, {one['peak_mib']:.0f} MiB, "
                    f"loss {one['losses'][0]:.4f} -> {one['losses'][-1]:.4f}, differs by at most {worst:.2%}",
                    flush=True,
                )
    if options.json is not None:
        report = {
            "command": f"python -m bench.training.stored_states --steps {options.steps}",
            "machine": {**describe_machine(1), "load": [round(load, 1), round(os.getloadavg()[0], 1)]},
            "teacher": asdict(LARGE),
            "student": asdict(SMALL),
            "rows": results,
        }
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
