"""How many prompts per second do one worker process and several search, and how much memory do they take?

    python -m bench.commands.processes [--teacher DIRECTORY --student DIRECTORY] --json bench/results/processes.json

Pools of one worker with all threads, and of several that divide them, run the same search over problems of the small
pair in turns, so that a change of the machine's load meets both. The models are loaded before the time begins. The
processor time of the workers for a prompt depends little on the load: its ratio is what several cost, and bounds what
they can gain where all cores are busy. Memory is that of the workers alone after their last run: the anonymous part,
which no two processes share.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import time
from contextlib import ExitStack
from pathlib import Path

from bench.engine.peers.machine import describe_machine

from genssd.distill import small_pair
from genssd.distill.data.problems import ProblemRow
from genssd.distill.pool.processes import ProcessPool
from genssd.distill.pool.remote_models import LocalTokens, RemoteModels
from genssd.distill.pool.worker import EngineRecipe
from genssd.distill.select.work import SearchWork
from genssd.distill.small_pair.problems import make_problems
from genssd.engine.engine import Engine
from genssd.engine.host.machine import available_cores
from genssd.engine.search.search_options import SearchOptions
from genssd.engine.setup.loading import choose_reader
from genssd.engine.texts.chat_options import ChatOptions
from genssd.engine.texts.text import Tokenizer

PAIR = Path(next(iter(small_pair.__path__)))
SIZES = (1, 2)


def open_pool(options: argparse.Namespace, size: int, threads: int) -> ProcessPool[Engine]:
    """Return a pool of so many workers, which divide the threads."""
    teacher, student = Tokenizer(Path(options.teacher)), Tokenizer(Path(options.student))
    reader = choose_reader(teacher, student, "teacher", "student")
    arguments = {
        "teacher": options.teacher, "student": options.student, "device": "cpu", "dtype": options.dtype,
        "memory_bytes": 1 << 28, "threads": max(1, threads // size),
    }  # fmt: skip
    tokens = LocalTokens(tokenizers={"teacher": teacher, "student": student}, reader=reader)
    recipe = EngineRecipe(arguments=arguments, chat=ChatOptions())
    return ProcessPool(RemoteModels([tokens]), [recipe] * size)


def read_anonymous_bytes(pid: int) -> int:
    """Return the memory of a process that is not of files."""
    match = re.search(r"^RssAnon:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert match is not None
    return int(match[1]) * 1024


def read_processor_seconds(pool: ProcessPool[Engine]) -> float:
    """Return the processor time of all threads of a pool's workers so far."""
    ticks = 0
    for worker in pool._workers:
        fields = Path(f"/proc/{worker.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default=str(PAIR / "teacher"), help="directory of the teacher")
    parser.add_argument("--student", default=str(PAIR / "student"), help="directory of the student")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--prompts", type=int, default=96, help="number of problems")
    parser.add_argument("--max-tokens", type=int, default=96, help="maximum number of tokens in a response")
    parser.add_argument("--rounds", type=int, default=3, help="number of runs of every pool")
    parser.add_argument("--json", type=Path, help="file of the result")
    options = parser.parse_args()
    cores, load = available_cores(), os.getloadavg()[0]
    problems = [
        ProblemRow(prompt=[{"role": "user", "content": p.question}], answer=p.answer, line=i + 1, where=f"{i}", index=i)
        for i, p in enumerate(make_problems(options.prompts, 0))
    ]
    work = SearchWork(
        problems=problems, items=range(len(problems)), options=SearchOptions(max_tokens=options.max_tokens),
        threshold=None, data="", teachers=[options.teacher], student=options.student,
    )  # fmt: skip
    rates: dict[int, list[float]] = {size: [] for size in SIZES}
    costs: dict[int, list[float]] = {size: [] for size in SIZES}
    with ExitStack() as stack:
        pools = {size: stack.enter_context(open_pool(options, size, cores)) for size in SIZES}
        for pool in pools.values():
            pool.open()
        for _ in range(options.rounds):
            for size, pool in pools.items():
                started, before = time.perf_counter(), read_processor_seconds(pool)
                count = sum(1 for _ in pool.run(work))
                rates[size].append(round(count / (time.perf_counter() - started), 3))
                costs[size].append(round((read_processor_seconds(pool) - before) / count, 4))
        memory = {
            size: [
                read_anonymous_bytes(worker.process.pid) for worker in pool._workers if worker.process.pid is not None
            ]
            for size, pool in pools.items()
        }
    for size in SIZES:
        total = sum(memory[size]) / 2**20
        print(f"{size} workers: {statistics.median(rates[size]):.2f} prompts/s {rates[size]}, {total:.0f} MiB")
        print(f"  {statistics.median(costs[size]):.3f} s of processor time for a prompt {costs[size]}")
    ratio = statistics.median(b / a for a, b in zip(rates[SIZES[0]], rates[SIZES[1]], strict=True))
    print(f"ratio {ratio:.2f}")
    if options.json:
        command = (
            f"python -m bench.commands.processes --prompts {options.prompts} --max-tokens {options.max_tokens} "
            f"--rounds {options.rounds}"
        )
        result = {
            "command": command, "load_before": load, "load_after": os.getloadavg()[0], **describe_machine(cores),
            "prompts_per_second": rates, "median_ratio": round(ratio, 3),
            "processor_seconds_per_prompt": costs, "anonymous_bytes": memory,
        }  # fmt: skip
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
