"""Prompts after the same few-shot examples: how much work and time is saved when what they share is computed once?

    python -m bench.engine.shared_prefix --json bench/results/shared_prefix.json

Two random Llamas search, generate and score after 64 prompts of 800 shared and about 40 own tokens, in float32 on one
thread, in turn with the sharing and without it. Seconds are CPU time of the process, so that other jobs on the machine
count little. The results of both must be the same to the last bit.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from unittest.mock import patch

import torch
from bench.engine.peers.machine import describe_machine
from bench.engine.scoring import save_model

from genssd import Chunk, Engine
from genssd.kernels.logprob import STATISTICS


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One job, with what prompts share computed once or by every prompt itself."""

    job: str
    is_shared: bool
    prefill_tokens: int
    """Number of tokens of prompts that both models computed; `score` does not count them."""
    computed_tokens: int
    """Number of tokens of all kinds that both models computed."""
    seconds: float
    """CPU time."""


@contextmanager
def without_sharing() -> Iterator[None]:
    """Let every prompt compute all of its tokens itself."""
    with patch("genssd.engine.decoding.shared_prefixes.find_prefix_spans", lambda prompts, unit: [None] * len(prompts)):
        yield


def make_jobs(num_prompts: int, num_shared: int, num_tokens: int) -> Mapping[str, Callable[[Engine], object]]:
    """Return the work that is timed, by name; each returns all of its numbers."""
    generator = torch.Generator().manual_seed(0)

    def draw(count: int) -> list[int]:
        return torch.randint(5, 500, (count,), generator=generator).tolist()

    examples = draw(num_shared)
    prompts = [[*examples, *draw(20 + i * 40 // num_prompts)] for i in range(num_prompts)]
    responses = [draw(num_tokens) for _ in prompts]

    def select(engine: Engine) -> object:
        chunk = Chunk(tokens=16, until=None)
        found = engine.select_expand(prompts, candidates=4, chunk=chunk, max_tokens=num_tokens)
        return [[(r.token_ids, r.verdict, r.score, r.teacher_logprob.tolist()) for r in s.tree] for s in found]

    def score(engine: Engine) -> object:
        scores = engine.score(prompts, responses)
        return [[getattr(stats, name).tolist() for name in STATISTICS] for stats in scores]

    return {
        "select": select,
        "generate": lambda engine: engine.generate(prompts, max_tokens=num_tokens),
        "score": score,
    }


def measure(name: str, job: Callable[[Engine], object], engine: Engine, is_shared: bool) -> tuple[Measurement, object]:
    """Run a job once; return the measurement and the job's numbers."""
    usage = engine.usage
    prefill, computed, started = usage.prefill_tokens, usage.computed_tokens, time.process_time()
    numbers = job(engine)
    measurement = Measurement(
        job=name,
        is_shared=is_shared,
        prefill_tokens=usage.prefill_tokens - prefill,
        computed_tokens=usage.computed_tokens - computed,
        seconds=time.process_time() - started,
    )
    return measurement, numbers


def print_table(measured: Sequence[Measurement]) -> None:
    """Print the medians of every job, and what sharing saves."""
    print(f"{'':<12}{'tokens apart':>14}{'shared':>10}{'seconds apart':>16}{'shared':>10}{'times as fast':>16}")
    for job in dict.fromkeys(one.job for one in measured):
        shared, apart = (
            [one for one in measured if one.job == job and one.is_shared is is_shared] for is_shared in (True, False)
        )
        fast, slow = (median(one.seconds for one in ones) for ones in (shared, apart))
        tokens = f"{apart[0].computed_tokens:>14,}{shared[0].computed_tokens:>10,}"
        print(f"{job:<12}{tokens}{slow:>14.2f} s{fast:>8.2f} s{slow / fast:>16.1f}")


def main() -> None:
    """Measure, print the table, and write the measurements."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--shared", type=int, default=800, help="number of tokens that all prompts begin with")
    parser.add_argument("--tokens", type=int, default=32, help="number of tokens in a response")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    measured = []
    with tempfile.TemporaryDirectory() as directory:
        teacher, student = Path(directory) / "teacher", Path(directory) / "student"
        save_model(teacher, 6, 256, 8192)
        save_model(student, 3, 128, 8192)
        engine = Engine.from_pretrained(teacher, student, dtype="float32", memory_bytes=1 << 30, threads=1)
        jobs = make_jobs(options.prompts, options.shared, options.tokens)
        for _ in range(options.rounds):
            for name, job in jobs.items():
                shared, numbers = measure(name, job, engine, is_shared=True)
                with without_sharing():
                    apart, others = measure(name, job, engine, is_shared=False)
                if numbers != others:
                    sys.exit(f"{name}: the results with and without sharing differ")
                measured += [shared, apart]
                print(json.dumps([asdict(shared), asdict(apart)]), flush=True)
    print_table(measured)
    if options.json is not None:
        shape = {name: getattr(options, name) for name in ("prompts", "shared", "tokens", "rounds")}
        rows = [asdict(one) for one in measured]
        text = json.dumps({"machine": describe_machine(1), "shape": shape, "measurements": rows}, indent=1)
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
