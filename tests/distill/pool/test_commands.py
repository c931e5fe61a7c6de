"""`genssd leaf` and `genssd diagnose` in several processes: the rows of one, whatever is killed, also when resumed."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.pool_works import DeadlyLeafWork
from support.small_runs import read_results
from support.tiny_pair import TinyPair

from genssd.distill.diagnose.config import DiagnoseConfig
from genssd.distill.diagnose.run import run_diagnose
from genssd.distill.diagnose.works import ForcingWork, LikeliestWork, LogprobWork, RolloutWork
from genssd.distill.pool.placing import Place
from genssd.distill.pool.pool import Lost, OwnProcess, Work
from genssd.distill.pool.processes import ProcessPool
from genssd.distill.runs import pools
from genssd.distill.score.leaf import run_leaf
from genssd.distill.score.leaf_config import LeafConfig
from genssd.distill.score.prefix import run_prefix
from genssd.distill.score.prefix_config import PrefixConfig
from genssd.engine.common.errors import InputError, WorkerError
from genssd.engine.engine import Engine
from genssd.engine.search.budget import Budget

pytestmark = pytest.mark.usefixtures("forked_workers")

Write = Callable[..., Path]
QUESTIONS = [{"question": f"{i % 3}+{i % 3}?", "answer": str(2 * i), "hint": f"add {i}"} for i in range(5)]
"""Some are equal, so that what is drawn depends on how many equal ones come before."""
TRACES = [
    {"question": f"Tom has {i} and {i + 1} pens. How many?", "response": f"{i} + {i + 1} = {2 * i + 1}. " * (i % 4 + 1)}
    for i in range(7)
]


def configure_leaf(pair: TinyPair, data: Path, output_dir: Path, **options: Any) -> LeafConfig:
    models = {"teacher": str(pair.teacher), "student": str(pair.student)}
    return LeafConfig(**models, data=(str(data),), share=0.2, output_dir=str(output_dir), **options)


def configure_diagnose(pair: TinyPair, data: Path, output_dir: Path, **options: Any) -> DiagnoseConfig:
    return DiagnoseConfig(
        student=str(pair.student), teacher=(str(pair.teacher),), contexts=("hint",), data=str(data), max_tokens=8,
        rollouts=2, completions=2, budget=24, top_k=2, memory_bytes=1 << 22, max_num_seqs=4, output_dir=str(output_dir),
        **options,
    )  # fmt: skip


def read_unordered(output_dir: Path) -> dict[str, Any]:
    """What a run has written, without the page, whose plots are compared by the rows that they show."""
    return {name: content for name, content in read_results(output_dir).items() if not name.endswith(".html")}


class Killer:
    """Kills a worker of a pool at each of the first results."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, kills: int) -> None:
        self.left = kills
        run = ProcessPool.run

        def run_and_kill(
            pool: ProcessPool[Any], work: Work[Any, Any], budget: Budget = Budget()
        ) -> Iterator[tuple[int, Any]]:
            for outcome in run(pool, work, budget):
                pids = [worker.process.pid for worker in pool._workers if worker.is_ready and not worker.is_idle]
                if self.left and pids and pids[0] is not None:
                    self.left -= 1
                    os.kill(pids[0], signal.SIGKILL)
                yield outcome

        monkeypatch.setattr(ProcessPool, "run", run_and_kill)


@pytest.mark.parametrize("command", ["leaf", "diagnose"])
def test_rows_are_those_of_one_process_whatever_is_killed_and_resumed(
    tiny_pair: TinyPair,
    write_rows: Write,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    command: str,
) -> None:
    data = write_rows(TRACES if command == "leaf" else QUESTIONS)
    start: Callable[[Any], Any] = run_leaf if command == "leaf" else run_diagnose
    configure: Callable[..., Any] = configure_leaf if command == "leaf" else configure_diagnose
    start(configure(tiny_pair, data, tmp_path / "one", threads=1))
    expected = read_unordered(tmp_path / "one")
    killer = Killer(monkeypatch, 2)
    config = configure(tiny_pair, data, tmp_path / "two", threads=2, processes=2)
    assert start(config).bad_rows == ()
    assert killer.left == 0
    assert "was killed by SIGKILL (out of memory?); another one takes its place" in caplog.text
    assert read_unordered(tmp_path / "two") == expected
    records = [json.loads((tmp_path / run / "run.json").read_text()) for run in ("one", "two")]
    assert records[0]["settings"] == records[1]["settings"]
    journal = tmp_path / "two" / ("journal.jsonl" if command == "leaf" else "questions.jsonl")
    journal.write_text("".join(journal.read_text().splitlines(keepends=True)[:2]))
    start(dataclasses.replace(config, resume=True, processes=3))
    assert read_unordered(tmp_path / "two") == expected
    journal.write_text("".join(journal.read_text().splitlines(keepends=True)[1:]))
    start(dataclasses.replace(config, resume=True, processes=None))
    assert read_unordered(tmp_path / "two") == expected


def test_the_process_of_a_single_device_has_work_that_can_be_sent(
    tiny_pair: TinyPair, write_rows: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run on one GPU has one worker, in a process of its own. This test runs that case on the CPU."""
    data, traces = write_rows(QUESTIONS[:2]), write_rows(TRACES[:3], "traces.jsonl")
    diagnose = configure_diagnose(tiny_pair, data, tmp_path / "diagnose")
    prefix = PrefixConfig(
        student=str(tiny_pair.student), data=(str(traces),), batch=2, judge_tokens=4, max_tokens=4,
        memory_bytes=1 << 22, output_dir=str(tmp_path / "prefix"),
    )  # fmt: skip
    leaf = configure_leaf(tiny_pair, traces, tmp_path / "leaf")
    runs: list[tuple[Callable[[Any], Any], Any]] = [(run_diagnose, diagnose), (run_prefix, prefix), (run_leaf, leaf)]
    expected = []
    for start, config in runs:
        start(config)
        expected.append(read_unordered(Path(config.output_dir)))
    monkeypatch.setattr(pools, "choose_gpus", lambda *_: [Place(device="cpu", threads=1)])
    for (start, config), results in zip(runs, expected, strict=True):
        output_dir = Path(f"{config.output_dir}-device")
        start(dataclasses.replace(config, devices="0", output_dir=str(output_dir)))
        assert read_unordered(output_dir) == results


def test_every_process_of_leaf_has_the_number_of_threads_that_the_run_was_begun_with(
    tiny_pair: TinyPair, write_rows: Write, tmp_path: Path
) -> None:
    """Gradients depend on it by their rounding."""
    config = configure_leaf(tiny_pair, write_rows(TRACES), tmp_path / "run", threads=3, processes=2)
    run_leaf(config)
    record = tmp_path / "run" / "run.json"
    assert json.loads(record.read_text())["threads"] == 1
    journal = tmp_path / "run" / "journal.jsonl"
    journal.write_text(journal.read_text().splitlines(keepends=True)[0])
    run_leaf(dataclasses.replace(config, resume=True, processes=None, threads=2))
    assert json.loads(record.read_text())["threads"] == 1


@pytest.mark.parametrize("phase", [RolloutWork, LikeliestWork, LogprobWork, ForcingWork])
def test_a_question_that_is_given_up_in_any_phase_is_reported_and_tried_again(
    tiny_pair: TinyPair, write_rows: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, phase: type
) -> None:
    class Losing(OwnProcess):
        def run(self, work: Work[Engine, Any], budget: Budget = Budget()) -> Iterator[tuple[int, Any]]:
            for item, outcome in super().run(work, budget):
                yield item, Lost(reason="no luck") if item == 1 and isinstance(work, phase) else outcome

    data = write_rows(QUESTIONS[:3])
    config = configure_diagnose(tiny_pair, data, tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr("genssd.distill.runs.pools.OwnProcess", Losing)
        summary = run_diagnose(config)
    assert summary.bad_rows == (f"{data}, line 2: no luck",)
    assert summary.diagnosis.questions == 2
    whole = run_diagnose(dataclasses.replace(config, resume=True))
    assert (whole.bad_rows, whole.diagnosis.questions) == ((), 3)


def test_a_trace_that_ends_its_processes_is_named(
    tiny_pair: TinyPair, write_rows: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The third trace kills every process that begins it."""
    data = write_rows(TRACES)
    config = configure_leaf(tiny_pair, data, tmp_path / "run", processes=2)
    monkeypatch.setattr("genssd.distill.score.leaf.LeafWork", DeadlyLeafWork)
    summary = run_leaf(config)
    reason = "the worker that did nothing else was killed by SIGKILL (out of memory?), the last of 3"
    assert summary.bad_rows == (f"{data}, line 3: {reason}",)
    assert summary.traces == len(TRACES) - 1
    assert (tmp_path / "run" / "bad_rows.txt").read_text() == f"{data}, line 3: {reason}\n"
    monkeypatch.undo()
    assert run_leaf(dataclasses.replace(config, resume=True, processes=None)).traces == len(TRACES)


def test_when_nothing_could_be_done_the_command_fails(
    tiny_pair: TinyPair, write_rows: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Losing(OwnProcess):
        def run(self, work: Work[Engine, Any], budget: Budget = Budget()) -> Iterator[tuple[int, Any]]:
            yield from ((item, Lost(reason="no luck")) for item in work.items)

    monkeypatch.setattr("genssd.distill.runs.pools.OwnProcess", Losing)
    with pytest.raises(WorkerError, match=r"no question could be diagnosed; .*bad_rows.txt says why"):
        run_diagnose(configure_diagnose(tiny_pair, write_rows(QUESTIONS), tmp_path / "run"))
    assert "no luck" in (tmp_path / "run" / "bad_rows.txt").read_text()


def test_functions_of_this_process_and_processes_that_cannot_be_are_refused(
    tiny_pair: TinyPair, write_rows: Write, tmp_path: Path
) -> None:
    data, traces = write_rows(QUESTIONS), write_rows(TRACES, "traces.jsonl")
    config = configure_diagnose(tiny_pair, data, tmp_path / "run", processes=2)
    with pytest.raises(InputError, match="processes: load is given, which works in this process; leave one of them"):
        run_diagnose(config, lambda model, role: tiny_pair.engine)
    config = configure_diagnose(tiny_pair, data, tmp_path / "run", devices="all")
    with pytest.raises(InputError, match="devices: verify is given, which works in this process"):
        run_diagnose(config, verify=lambda text, answer: pytest.fail("called"))
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"processes": 0}, "processes must be in"),
        ({"devices": "0", "processes": 2}, "give processes, which divide a CPU, or devices"),
        ({"devices": "all"}, "devices names GPUs, and torch finds none here"),
    ]
    for options, message in wrong:
        with pytest.raises(InputError, match=message):
            run_diagnose(configure_diagnose(tiny_pair, data, tmp_path / "run", **options))
        with pytest.raises(InputError, match=message):
            run_leaf(configure_leaf(tiny_pair, traces, tmp_path / "run", **options))
    assert not (tmp_path / "run").exists()
