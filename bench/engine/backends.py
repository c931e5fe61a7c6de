"""The own decoder beside transformers' class behind the same interface: how much slower is the second backend?

    python -m bench.engine.backends --json bench/results/backends.json

A random Llama is generated from and scored by both backends in turn, in float32 on one thread. Seconds are CPU time of
the process, so that other jobs on the machine count little.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from bench.engine.peers.machine import describe_machine
from bench.engine.scoring import save_model

from genssd import Engine, Sampling
from genssd.engine.common.model_choices import Backend

BACKENDS: tuple[Backend, ...] = ("genssd", "transformers")
PROMPT = 128
"""Number of tokens in a prompt."""


def jobs(tokens: int) -> dict[str, Callable[[Engine], Any]]:
    """Return the work that is timed, by name. tokens: number of tokens in a response."""
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(5, 500, (PROMPT,), generator=generator).tolist() for _ in range(16)]
    responses = [torch.randint(5, 500, (4 * tokens,), generator=generator).tolist() for _ in range(16)]
    sampling = Sampling()

    def generate(engine: Engine, n: int, count: int) -> None:
        engine.generate(prompts[:count], model="student", n=n, sampling=sampling, max_tokens=tokens)

    return {
        "generate, 1 sequence": lambda engine: generate(engine, 1, 1),
        "generate, 16 prompts": lambda engine: generate(engine, 1, 16),
        "generate, 16 of 1 prompt": lambda engine: generate(engine, 16, 1),
        "score, 16 responses": lambda engine: engine.score(prompts, responses),
    }


def main() -> None:
    """Measure, print a table of medians and ratios, and write the measurements."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    seconds: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as directory:
        save_model(Path(directory), options.layers, options.width, options.vocabulary)
        engines = {
            backend: Engine.from_pretrained(
                student=directory, dtype="float32", memory_bytes=1 << 29, threads=1, backend=backend
            )
            for backend in BACKENDS
        }
        for _ in range(options.rounds):
            for name, job in jobs(options.tokens).items():
                for backend, engine in engines.items():
                    started = time.process_time()
                    job(engine)
                    row = seconds.setdefault(name, {}).setdefault(backend, [])
                    row.append(time.process_time() - started)
    print(f"{'':<28}{'genssd':>10}{'transformers':>14}{'ratio':>8}")
    for name, measured in seconds.items():
        own, other = (median(measured[backend]) for backend in BACKENDS)
        print(f"{name:<28}{own:>8.2f} s{other:>12.2f} s{other / own:>8.1f}")
    if options.json is not None:
        shape = {name: getattr(options, name) for name in ("layers", "width", "vocabulary", "tokens", "rounds")}
        text = json.dumps({"machine": describe_machine(1), "shape": shape, "seconds": seconds}, indent=1)
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
