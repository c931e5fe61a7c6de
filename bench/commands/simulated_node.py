"""How far does one driver reach? `genssd select` over simulated devices, which sleep and return rows of real size.

    python -m bench.commands.simulated_node [--devices 2 8 64] [--json bench/results/simulated_node.json]

The command's process is the real one: `run_select` with its pool of worker processes, the queue, the messages over
pipes, the journals with their fsyncs, the summary. The workers are processes too, with the real body of a worker, but
their engine loads no model: it holds some prompts at a time and finishes each after a time. A real search of one prompt
on the small pair is stretched to `--tokens` tokens; every prompt gets it, under its own index.

paced       a device finishes a prompt in the time in which an H200 was measured to write its candidates
saturated   the devices are as fast as the driver takes their results

What counts is the driver's processor time, which the load of the machine hardly changes. The workers' processor time
is theirs: on a real node other cores do it.
"""

from __future__ import annotations

import argparse
import cProfile
import dataclasses
import json
import multiprocessing
import os
import pickle
import pstats
import resource
import shutil
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar
from unittest.mock import patch
from zlib import crc32

from bench.engine.peers.machine import describe_machine

from genssd.distill import small_pair
from genssd.distill.data.problems import ProblemRow
from genssd.distill.pool import starting
from genssd.distill.pool.messages import Finished
from genssd.distill.pool.pool import OwnProcess
from genssd.distill.pool.worker import EngineRecipe
from genssd.distill.runs import pools
from genssd.distill.runs.journal import begin_line, make_line
from genssd.distill.select import run as select_run
from genssd.distill.select.config import SelectConfig
from genssd.distill.select.run import run_select
from genssd.distill.select.work import SearchedPrompt, SearchWork
from genssd.distill.small_pair.problems import make_problems
from genssd.engine.common.usage import CacheUse, Usage
from genssd.engine.decoding.chunk import Chunk
from genssd.engine.decoding.feed import Feed
from genssd.engine.engine import Engine
from genssd.engine.host.machine import available_cores
from genssd.engine.search.budget import Budget
from genssd.engine.search.search_options import SearchOptions
from genssd.engine.texts.chat_options import ChatOptions

PAIR = Path(next(iter(small_pair.__path__)))
CANDIDATES = 4
CHUNK = Chunk(tokens=16, until=None)
AT_ONCE = 64
"""Number of prompts that a device has at a time."""
TOKENS_PER_SECOND = 16_036
"""Candidates' tokens that a device writes in a second: bench/results/h200-search.json."""
INDEX = b'{"index": '
"""Beginning of a line of decisions.jsonl."""


class SimulatedEngine:
    """What a worker says of its engine, with counts and without models."""

    threads, launches, server = 1, None, None
    cache_use = CacheUse(held_pages=0, pages=1 << 20, held_bytes=0, bytes=1 << 37)

    def __init__(self, fingerprints: dict[str, str]) -> None:
        self.fingerprints, self.usage = fingerprints, Usage()
        self.teachers = [self]

    def positions(self, model: str) -> int:
        return 1 << 17

    def vocabulary(self, model: str) -> int:
        return 1 << 17

    def max_sequence_length(self, model: str) -> int:
        return 1 << 17


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedRecipe(EngineRecipe):
    """A recipe that loads nothing."""

    fingerprints: ClassVar[dict[str, str]] = {"teacher": "0" * 16, "student": "1" * 16}

    def open(self) -> Any:
        return SimulatedEngine(dict(self.fingerprints))


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedWork:
    """A search that takes `seconds` for each prompt and returns the template under the prompt's index."""

    items: Sequence[int]
    template: Template
    seconds: float
    problems: Sequence[ProblemRow]
    """All problems, as the real work has them: every worker gets them."""

    most_tokens: ClassVar[int] = CANDIDATES * 4096

    def run(self, engine: Any, feed: Feed | None, budget: Budget) -> Iterator[tuple[int, SearchedPrompt]]:
        assert feed is not None
        due: deque[tuple[float, int]] = deque()
        is_open = True
        while is_open or due:
            while is_open and len(due) < AT_ONCE:
                item = feed.take(wait=not due)
                if item is None:
                    is_open = bool(due)  # at the moment, or for good
                    break
                # prompts that are there at once take turns, so that they end one after the other
                last = due[-1][0] if due else time.monotonic()
                due.append((last + self.seconds, item))
            if due:
                moment, item = due.popleft()
                time.sleep(max(0.0, moment - time.monotonic()))
                engine.usage.sampled_tokens += self.template.outcome.tokens_sampled
                is_open = True
                yield item, self.template.rename(item, self.problems[item])


def make_problem() -> ProblemRow:
    """Return the problem of the search that is stretched."""
    question = make_problems(1, seed=0)[0]
    prompt = [{"role": "user", "content": question.question}]
    return ProblemRow(prompt=prompt, answer=question.answer, line=1, where="x", index=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Template:
    """A result that every prompt gets."""

    outcome: SearchedPrompt
    row: dict[str, Any]
    """Its line of selections.jsonl."""

    def rename(self, index: int, problem: ProblemRow) -> SearchedPrompt:
        """Return the result as that of a prompt; its line of decisions gets its checksum."""
        line = self.outcome.decisions
        assert line.startswith(INDEX)
        body = INDEX + str(index).encode() + line[line.index(b",") : line.rindex(b', "checksum"')]
        decisions = body + b', "checksum": "%08x"}\n' % crc32(body)
        row = {**self.row, "index": index, "prompt": problem.prompt, "answer": problem.answer}
        return dataclasses.replace(self.outcome, begun=begin_line(row), decisions=decisions)


def make_template(tokens: int) -> Template:
    """Return the result of a real search, with its rows stretched to a response of so many tokens."""
    problem = make_problem()
    engine = Engine.from_pretrained(PAIR / "teacher", PAIR / "student", memory_bytes=1 << 26, device="cpu")
    options = SearchOptions(candidates=CANDIDATES, chunk=CHUNK, max_tokens=96)
    work = SearchWork(
        problems=[problem], items=[0], options=options, threshold=None, data="x", teachers=["t"], student="s"
    )
    ((_, outcome),) = OwnProcess(engine.with_chat(ChatOptions())).run(work)
    assert isinstance(outcome, SearchedPrompt)
    decisions = json.loads(outcome.decisions)
    decisions.pop("checksum")
    row = json.loads(outcome.begun + b"}")
    factor = -(-tokens // len(row["completion_ids"]))
    for name in ("rounds", "candidates"):
        decisions[name] = decisions[name] * factor
    for name in ("chunks", "completion_ids", "teacher_logprobs"):
        row[name] = row[name] * factor
    sampled = sum(len(candidate["token_ids"]) for candidate in decisions["candidates"])
    row |= {"tokens_sampled": sampled, "completion": stretch(row["completion"], factor)}
    row["messages"] = [*row["messages"][:-1], *row["completion"]]
    outcome = dataclasses.replace(outcome, decisions=make_line(decisions), tokens_sampled=sampled)
    return Template(outcome=outcome, row=row)


def stretch(messages: Sequence[dict[str, str]], factor: int) -> list[dict[str, str]]:
    """Return messages whose text is so many times as long."""
    return [{**message, "content": message["content"] * factor} for message in messages]


@dataclass(slots=True)
class Watch:
    """Samples of the driver's memory while it works."""

    peak: int = 0
    stopped: threading.Event = dataclasses.field(default_factory=threading.Event)

    def run(self) -> None:
        """Take samples until the end; the body of a thread."""
        while not self.stopped.wait(0.5):
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            self.peak = max(self.peak, pages * os.sysconf("SC_PAGE_SIZE"))


def measure(
    devices: int, prompts: int, template: Template, seconds: float, root: Path, *, profile: bool, is_read: bool
) -> dict[str, Any]:
    """Run the command over so many devices; return what its process took. is_read: whether the run is resumed as well,
    although nothing is left to do, to measure how long its journals take to read."""
    data = root / f"problems-{prompts}.jsonl"
    data.write_text("".join(json.dumps({"question": f"{i}+{i}?", "answer": f"{2 * i}"}) + "\n" for i in range(prompts)))
    output_dir = root / f"run-{devices}-{prompts}-{seconds}"
    config = SelectConfig(
        teacher=str(PAIR / "teacher"), student=str(PAIR / "student"), data=str(data), output_dir=str(output_dir),
        candidates=CANDIDATES, chunk=CHUNK, max_tokens=4096, processes=devices, threads=devices, device="cpu",
        total_budget=Budget(tokens=1 << 60),
    )  # fmt: skip

    def make_work(*, problems: Sequence[ProblemRow], items: Sequence[int], **_: Any) -> SimulatedWork:
        started.append((time.perf_counter(), os.times()))
        return SimulatedWork(problems=problems, items=items, template=template, seconds=seconds)

    started: list[tuple[float, os.times_result]] = []
    watch, profiler = Watch(), cProfile.Profile() if profile else None
    thread = threading.Thread(target=watch.run, daemon=True)
    with patch.object(pools, "EngineRecipe", SimulatedRecipe), patch.object(select_run, "SearchWork", make_work):
        thread.start()
        if profiler is not None:
            profiler.enable()
        summary = run_select(config)
        if profiler is not None:
            profiler.disable()
    watch.stopped.set()
    thread.join()
    wall, own = time.perf_counter() - started[0][0], os.times()
    driver = own.user + own.system - started[0][1].user - started[0][1].system
    assert summary.prompts == prompts
    if profiler is not None:
        pstats.Stats(profiler).sort_stats("tottime").print_stats(18)
    written = sum(path.stat().st_size for path in output_dir.glob("*.jsonl"))
    row: dict[str, Any] = {}
    if is_read:
        resumed_from = time.process_time()
        run_select(dataclasses.replace(config, resume=True, processes=None, devices=None))
        row["reading_ms_per_prompt"] = round(1000 * (time.process_time() - resumed_from) / prompts, 2)
    shutil.rmtree(output_dir)
    return row | {
        "devices": devices, "prompts": prompts, "seconds_per_prompt_and_device": seconds, "seconds": round(wall, 2),
        "driver_seconds": round(driver, 2), "driver_share": round(driver / wall, 3),
        "driver_ms_per_prompt": round(1000 * driver / prompts, 2), "prompts_per_second": round(prompts / wall, 1),
        "driver_prompts_per_second": round(prompts / driver, 1), "written_mb": round(written / 1e6, 1),
        "driver_peak_mb": round(watch.peak / 1e6),
    }  # fmt: skip


def time_syncs(root: Path, size: int) -> float:
    """Return the median milliseconds of writing and syncing so many bytes at the end of a file."""
    times, content = [], os.urandom(size)
    with (root / "syncs").open("wb", buffering=0) as stream:
        for _ in range(20):
            begun = time.perf_counter()
            stream.write(content)
            os.fsync(stream.fileno())
            times.append(1000 * (time.perf_counter() - begun))
    return round(statistics.median(times), 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--devices", type=int, nargs="+", default=[2, 8, 64], help="numbers of simulated devices, two at least"
    )
    parser.add_argument("--prompts", type=int, default=192, help="number of prompts of a saturated run")
    parser.add_argument("--tokens", type=int, default=4096, help="number of tokens of a response")
    parser.add_argument("--saturated", action="store_true", help="leave the paced runs out")
    parser.add_argument("--profile", action="store_true", help="print where the driver's time goes")
    parser.add_argument("--json", type=Path, help="file of the result")
    options = parser.parse_args()
    modules = ["genssd.distill.pool.worker", "bench.commands.simulated_node"]
    multiprocessing.get_context("forkserver").set_forkserver_preload(modules)
    os.environ["PYTHONWARNINGS"] = "ignore::RuntimeWarning"  # every worker has this file twice: preloaded, and as main
    template = make_template(options.tokens)
    outcome = template.rename(0, make_problem())
    paced = outcome.tokens_sampled / TOKENS_PER_SECOND
    message = pickle.dumps(Finished(0, outcome), protocol=pickle.HIGHEST_PROTOCOL)
    print(f"a result of {outcome.tokens_sampled:,} sampled tokens is a message of {len(message):,} bytes", flush=True)
    rows: list[dict[str, Any]] = []
    with TemporaryDirectory(prefix="genssd-node-") as name, patch.object(starting, "START_METHOD", "forkserver"):
        syncs = time_syncs(Path(name), len(outcome.decisions))
        for seconds in (0.0,) if options.saturated else (0.0, paced):
            for devices in options.devices:
                prompts = 8 * devices if seconds else options.prompts
                rows.append(
                    measure(devices, prompts, template, seconds, Path(name), profile=options.profile, is_read=not rows)
                    | {"load": round(os.getloadavg()[0], 1)}
                )
                print(rows[-1], flush=True)
    result = {
        "command": " ".join(["python -m bench.commands.simulated_node", *sys.argv[1:]]),
        **describe_machine(available_cores()), "bytes_of_a_message": len(message), "ms_of_a_sync": syncs,
        "tokens_sampled_per_prompt": outcome.tokens_sampled, "tokens_per_second_and_device": TOKENS_PER_SECOND,
        "peak_mb_of_the_process": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3), "rows": rows,
    }  # fmt: skip
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
