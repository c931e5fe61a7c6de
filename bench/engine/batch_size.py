"""Rate and time to the first row against max_num_seqs: what does a smaller batch cost, how much sooner do rows land?

    python -m bench.engine.batch_size --teacher DIR --student DIR --data FILE [--prompts 128] [--max-tokens 48]

FILE has one JSON object per line with a `question` or a `problem`. The batch sizes take turns in every round. Rates are
tokens per second of the process's own CPU time, so that other jobs on the machine count little; the first row and the
whole run are given in the same seconds.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from statistics import median

import torch
from bench.engine.peers.machine import describe_machine

from genssd import Engine
from genssd.engine.texts.text import Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One run over all prompts; seconds are CPU time."""

    command: str
    max_num_seqs: int
    tokens: int
    first_row_seconds: float
    seconds: float

    @property
    def rate(self) -> float:
        """Number of tokens sampled per second."""
        return self.tokens / self.seconds


def measure(
    command: str, engine: Engine, prompts: Sequence[Prompt], max_tokens: int, candidates: int, max_num_seqs: int
) -> Measurement:
    """Run one search or plain generation over the prompts."""
    before, started = engine.usage.sampled_tokens, time.process_time()
    if command == "select":
        rows = iter(engine.iter_select_expand(prompts, max_tokens=max_tokens, candidates=candidates))
    else:
        rows = iter(engine.iter_generate(prompts, max_tokens=max_tokens))
    next(rows)
    first = time.process_time() - started
    for _ in rows:
        pass
    return Measurement(
        command=command,
        max_num_seqs=max_num_seqs,
        tokens=engine.usage.sampled_tokens - before,
        first_row_seconds=first,
        seconds=time.process_time() - started,
    )


def print_table(measured: Sequence[Measurement]) -> None:
    """Print the medians of every command and batch size; rates as a fraction of the command's best one as well."""
    groups: dict[tuple[str, int], list[Measurement]] = {}
    for one in measured:
        groups.setdefault((one.command, one.max_num_seqs), []).append(one)
    rates = {key: median(one.rate for one in group) for key, group in groups.items()}
    print(f"{'command':<10}{'max_num_seqs':>14}{'tokens/s':>10}{'of best':>9}{'first row':>11}{'whole':>9}")
    for (command, size), group in groups.items():
        best = max(rate for (other, _), rate in rates.items() if other == command)
        rate = rates[command, size]
        first, whole = (median(getattr(one, name) for one in group) for name in ("first_row_seconds", "seconds"))
        print(f"{command:<10}{size:>14}{rate:>10.0f}{rate / best:>9.0%}{first:>9.1f} s{whole:>7.1f} s")


def main() -> None:
    """Measure, print the table, and write the measurements."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--student", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("--candidates", type=int, default=4)
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 16, 32, 64, 128, 256])
    parser.add_argument("--commands", nargs="+", choices=["generate", "select"], default=["generate", "select"])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with options.data.open() as file:
        rows = [json.loads(line) for line in islice(file, options.prompts)]
    prompts: list[Prompt] = [[{"role": "user", "content": row.get("question") or row["problem"]}] for row in rows]
    measured = []
    for _ in range(options.rounds):
        for command in options.commands:
            for size in options.batches:
                engine = Engine.from_pretrained(
                    options.teacher, options.student, memory_bytes=1 << 30, max_num_seqs=size
                )
                one = measure(command, engine, prompts, options.max_tokens, options.candidates, size)
                measured.append(one)
                print(json.dumps(asdict(one)), flush=True)
    print_table(measured)
    if options.json is not None:
        text = json.dumps(
            {"machine": describe_machine(torch.get_num_threads()), "measurements": [asdict(one) for one in measured]},
            indent=1,
        )
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
