"""Served teacher: what do requests to a server cost, beside the same teacher in this process?

    python -m bench.engine.served --url http://127.0.0.1:8000/v1 [--teacher DIR --student DIR] [--json FILE]

The server runs the directory of the teacher in float32 on this machine; the default directories are the small pair.
The arms take turns in every round, with the same prompts and options. Tokens per second are of wall time: the server
computes beside this process. `client_seconds` is the CPU time of this process per 1000 sampled tokens: for a served
teacher without a student (generate) it is what requests, answers and JSON cost.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from bench.engine.peers.machine import describe_machine

from genssd import Engine
from genssd.distill import small_pair
from genssd.distill.small_pair.problems import make_problems
from genssd.engine.decoding.chunk import Chunk
from genssd.engine.models.sampling import Sampling
from genssd.engine.served.options import ServerOptions
from genssd.engine.texts.text import Prompt

PAIR = Path(next(iter(small_pair.__path__)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One run of one command over all prompts."""

    command: str
    arm: str
    tokens: int
    discarded: int
    requests: int
    seconds: float
    cpu_seconds: float

    @property
    def rate(self) -> float:
        """Number of tokens sampled per second of wall time."""
        return self.tokens / self.seconds

    @property
    def client_seconds(self) -> float:
        """CPU seconds of this process per 1000 tokens."""
        return 1000.0 * self.cpu_seconds / self.tokens


def measure(
    command: str, arm: str, engine: Engine, prompts: Sequence[Prompt], options: argparse.Namespace
) -> Measurement:
    """Run one command over all prompts."""
    use, asked = engine.usage, 0 if engine.server is None else engine.server.requests
    tokens, discarded = use.sampled_tokens, use.discarded_tokens
    wall, cpu = time.perf_counter(), time.process_time()
    if command == "select":
        chunk = Chunk(tokens=options.chunk, until="\n")
        engine.select_expand(prompts, candidates=options.candidates, chunk=chunk, max_tokens=options.max_tokens)
    else:
        engine.generate(prompts, n=options.candidates, max_tokens=options.max_tokens, sampling=Sampling())
    return Measurement(
        command=command,
        arm=arm,
        tokens=use.sampled_tokens - tokens,
        discarded=use.discarded_tokens - discarded,
        requests=0 if engine.server is None else engine.server.requests - asked,
        seconds=time.perf_counter() - wall,
        cpu_seconds=time.process_time() - cpu,
    )


def print_table(measured: Sequence[Measurement]) -> None:
    """Print the medians of every command and arm."""
    groups: dict[tuple[str, str], list[Measurement]] = {}
    for one in measured:
        groups.setdefault((one.command, one.arm), []).append(one)
    print(f"{'command':<10}{'arm':<12}{'tokens/s':>10}{'requests':>10}{'discarded':>11}{'CPU s per 1000 tokens':>23}")
    for (command, arm), group in groups.items():
        rate, cost = median(one.rate for one in group), median(one.client_seconds for one in group)
        last = group[-1]
        print(f"{command:<10}{arm:<12}{rate:>10.0f}{last.requests:>10}{last.discarded:>11}{cost:>23.3f}")


def main() -> None:
    """Measure all commands and arms in every round."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True)
    parser.add_argument("--teacher", type=Path, default=PAIR / "teacher")
    parser.add_argument("--student", type=Path, default=PAIR / "student")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--candidates", type=int, default=4)
    parser.add_argument("--chunk", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--in-flight", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    common = {"dtype": "float32", "memory_bytes": 1 << 28, "threads": options.threads}
    server = ServerOptions(in_flight=options.in_flight)
    engines = {
        "here": Engine.from_pretrained(options.teacher, options.student, **common),
        "served": Engine.from_pretrained(
            options.url, options.student, teacher_tokenizer=options.teacher, server=server, **common
        ),
    }
    prompts: list[Prompt] = [[{"role": "user", "content": p.question}] for p in make_problems(options.prompts, seed=1)]
    measured = [
        measure(command, arm, engine, prompts, options)
        for _ in range(options.rounds)
        for command in ("generate", "select")
        for arm, engine in engines.items()
    ]
    print_table(measured)
    if options.json is not None:
        settings = {name: value for name, value in vars(options).items() if isinstance(value, int)}
        content = {
            "machine": describe_machine(options.threads),
            "settings": settings,
            "measurements": [asdict(one) for one in measured],
        }
        options.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
