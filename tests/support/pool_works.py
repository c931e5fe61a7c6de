"""Works for pools: those of the commands over tiny models, and some whose items end their worker,
are refused, are slow, or are taken by as many as there are."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from support.small_runs import VARYING
from support.tiny_pair import TinyPair

from genssd.distill.data.problems import ProblemRow
from genssd.distill.data.traces import read_usable_traces
from genssd.distill.evaluate.config import EvaluateConfig
from genssd.distill.evaluate.run import EvaluationWork
from genssd.distill.pool.pool import Work
from genssd.distill.pool.worker import EngineRecipe
from genssd.distill.score.features import ScoreWork
from genssd.distill.score.leaf_work import GradientModels, LeafWork, find_spans
from genssd.distill.score.prefix import PrefixWork
from genssd.distill.score.prefix_config import PrefixConfig
from genssd.distill.select.config import SelectConfig
from genssd.distill.select.generate import GenerationWork, WrittenPrompt
from genssd.distill.select.generate_config import GenerateConfig
from genssd.distill.select.two_writer_options import Alternation, Relay
from genssd.distill.select.work import SearchedPrompt, SearchWork
from genssd.engine.common.errors import InputError
from genssd.engine.decoding.chunk import Chunk
from genssd.engine.decoding.feed import Feed
from genssd.engine.engine import Engine
from genssd.engine.search.budget import Budget

SEARCH: dict[str, Any] = {"candidates": 3, "chunk": Chunk(tokens=4, until=None), "max_tokens": 16}
PROBLEMS = tuple(
    ProblemRow(prompt=f"{i % 5}+{i % 5}=", answer=str(i), line=i + 1, where=f"data, line {i + 1}", index=i)
    for i in range(14)
)
"""Several are equal, so that what is drawn depends on how many equal ones come before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultyWork:
    """Squares numbers. faults: what happens instead, by item."""

    items: tuple[int, ...]
    faults: Mapping[int, str]

    most_tokens: ClassVar[int] = 0

    def run(self, engine: Engine, feed: Feed | None, budget: Budget) -> Iterator[tuple[int, Any]]:
        assert feed is not None
        while (item := feed.take(wait=True)) is not None:
            fault = self.faults.get(item)
            if fault == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            elif fault == "refused":
                raise InputError("item 1 cannot be squared")
            elif fault is not None:
                raise RuntimeError(fault)
            yield item, item**2


@dataclass(frozen=True, slots=True, kw_only=True)
class SlowWork:
    """Squares numbers, a hundredth of a second for each."""

    items: tuple[int, ...]

    most_tokens: ClassVar[int] = 0

    def run(self, engine: Engine, feed: Feed | None, budget: Budget) -> Iterator[tuple[int, Any]]:
        assert feed is not None
        while (item := feed.take(wait=True)) is not None:
            time.sleep(0.01)
            yield item, item**2


@dataclass(frozen=True, slots=True, kw_only=True)
class GreedyWork:
    """Takes all items that it is given before it does them; a result is how many it had at once."""

    items: tuple[int, ...]

    most_tokens: ClassVar[int] = 0

    def run(self, engine: Engine, feed: Feed | None, budget: Budget) -> Iterator[tuple[int, int]]:
        assert feed is not None
        while (first := feed.take(wait=True)) is not None:
            held = [first]
            while (item := feed.take(wait=False)) is not None:
                held.append(item)
            for item in held:
                yield item, len(held)


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadlyLeafWork(LeafWork):
    """The work of `genssd leaf`; a process that begins the third trace is killed."""

    def run(self, models: GradientModels, feed: Feed | None, budget: Budget) -> Iterator[tuple[int, list[list[int]]]]:
        assert feed is not None
        while (item := feed.take(wait=True)) is not None:
            if item == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            yield item, find_spans(models, self.traces[item], self.share)


@dataclass(frozen=True, kw_only=True)
class FragileRecipe(EngineRecipe):
    """An engine that does not load any more once a file is there, as on a device that is lost."""

    lost: str

    def load(self) -> Engine:
        if Path(self.lost).exists():
            raise RuntimeError("CUDA error: device is lost")
        return super().load()


def make_works(pair: TinyPair, directory: Path) -> dict[str, Work[Engine, Any]]:
    models = {"teacher": str(pair.teacher), "student": str(pair.student)}
    items = [place for place in range(len(PROBLEMS)) if place != 6]
    generate = GenerateConfig(**models, data="x", max_tokens=12, teacher_states="bfloat16")
    relay = Relay(threshold=2.0, teacher="chunk", chunk=Chunk(tokens=4))
    evaluate = EvaluateConfig(model=models["student"], data="x", samples=2, max_tokens=12)
    two_writers: dict[str, Any] = {**models, "data": "x", "n": 2, "max_tokens": 12}
    path = directory / "traces.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{i}", "completion": "So it is. " * i}) + "\n" for i in range(1, 9)))
    traces, _ = read_usable_traces([path], pair.engine.tokenizer("student"), max_length=200, limit=None)
    return {
        "select": SearchWork(
            problems=PROBLEMS, items=items, options=SelectConfig(**models, data="x", teacher_topk=2, **SEARCH),
            teacher_states="float32", threshold=None, data="x", teachers=[models["teacher"]], student=models["student"],
        ),
        "generate": GenerationWork(problems=PROBLEMS, items=items, config=generate),
        "alternate": GenerationWork(
            problems=PROBLEMS, items=items,
            config=GenerateConfig(**two_writers, method="alternate", alternate=Alternation(chunk=Chunk(tokens=4))),
        ),
        "relay": GenerationWork(
            problems=PROBLEMS, items=items,
            config=GenerateConfig(**two_writers, method="relay", relay=relay),
        ),
        "score": ScoreWork(
            traces=dict(enumerate(traces)), criteria=("ppl", "lalp(steps=1)"), has_teacher=False, verify=True
        ),
        "evaluate": EvaluationWork(problems=PROBLEMS, items=items, config=evaluate),
        "prefix": PrefixWork(
            traces=traces, items=(0, 3, 6),
            config=PrefixConfig(student=models["student"], data=("x",), batch=3, judge_tokens=4, max_tokens=8),
        ),
    }  # fmt: skip


def collect(outcomes: Iterator[tuple[int, Any]]) -> dict[int, Any]:
    """The outcomes by item, with the numbers of tensors."""
    results: dict[int, Any] = {}
    for item, outcome in outcomes:
        assert item not in results, "done twice"
        if isinstance(outcome, SearchedPrompt):
            assert outcome.topk is not None
            topk = outcome.topk.ids.tolist(), outcome.topk.logprob.view(torch.int32).tolist()
            assert outcome.states is not None
            outcome = (outcome.begun, outcome.decisions, topk, outcome.states.tolist())
        if isinstance(outcome, WrittenPrompt):
            outcome = (outcome.begun, outcome.verdicts, None if outcome.states is None else outcome.states.tolist())
        results[item] = outcome
    return results


def without_times(value: Any) -> Any:
    """A row without what differs from run to run."""
    if isinstance(value, dict):
        return {name: without_times(part) for name, part in value.items() if name not in VARYING}
    return [without_times(part) for part in value] if isinstance(value, list) else value


def read_rows(path: Path) -> list[Any]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [without_times(row) for row in sorted(rows, key=lambda row: int(row["index"]))]


def find_children(pid: int) -> list[int]:
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[1]) == pid and fields[0] != "Z":
            found.append(int(status.parent.name))
    return found
