"""Worker processes: the results of one process, whatever is killed; nothing lost, nothing done twice.

But for the last test the workers are forked: from a server (conftest.py), or from a command that is forked itself.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.pool_works import (
    SEARCH,
    FaultyWork,
    FragileRecipe,
    GreedyWork,
    SlowWork,
    collect,
    find_children,
    make_works,
    read_rows,
)
from support.small_runs import read_results
from support.tiny_pair import TinyPair
from support.toys import save_checkpoint

from genssd.cli import main
from genssd.distill.pool import hand_out, starting
from genssd.distill.pool.pool import Lost, OwnProcess, Work
from genssd.distill.pool.processes import ProcessPool
from genssd.distill.pool.remote_models import LocalTokens, RemoteModels
from genssd.distill.pool.worker import EngineRecipe
from genssd.distill.select.config import Calibrate, SelectConfig
from genssd.distill.select.generate import run_generate
from genssd.distill.select.generate_config import GenerateConfig
from genssd.distill.select.run import run_select
from genssd.engine.common.errors import InputError, WorkerError
from genssd.engine.common.model_choices import Role
from genssd.engine.engine import Engine
from genssd.engine.search.budget import Budget
from genssd.engine.texts.chat_options import ChatOptions

pytestmark = pytest.mark.usefixtures("forked_workers")


def read_tokens(pair: TinyPair) -> RemoteModels:
    roles: tuple[Role, Role] = ("teacher", "student")
    tokens = LocalTokens(tokenizers={role: pair.engine.tokenizer(role) for role in roles}, reader=pair.engine.reader)
    return RemoteModels([tokens])


def list_engine_arguments(pair: TinyPair) -> dict[str, Any]:
    limits = {"memory_bytes": 1 << 22, "max_num_seqs": 4, "threads": 1}
    return {"teacher": str(pair.teacher), "student": str(pair.student), **limits}


def make_pool(pair: TinyPair, size: int = 2, **arguments: Any) -> ProcessPool[Engine]:
    recipe = EngineRecipe(arguments={**list_engine_arguments(pair), **arguments}, chat=ChatOptions())
    return ProcessPool(read_tokens(pair), [recipe] * size)


@pytest.fixture(scope="module")
def pool(tiny_pair: TinyPair) -> Iterator[ProcessPool[Engine]]:
    with make_pool(tiny_pair) as pool:
        pool.open()
        yield pool


@pytest.mark.parametrize("command", ["select", "generate", "alternate", "relay", "score", "evaluate", "prefix"])
def test_results_are_those_of_one_process(
    tiny_pair: TinyPair, pool: ProcessPool[Engine], tmp_path: Path, command: str
) -> None:
    work = make_works(tiny_pair, tmp_path)[command]
    before = pool.models.usage
    results = collect(pool.run(work))
    assert results == collect(OwnProcess(tiny_pair.engine).run(work))
    assert all(isinstance(result, dict | list | tuple) for result in results.values()), "not one is an error"
    assert sorted(results) == sorted(work.items)
    usage = pool.models.usage
    assert usage.computed_tokens > before.computed_tokens
    if command not in ("score", "prefix"):
        assert usage.finished_prompts - before.finished_prompts == len(work.items)
        assert usage.planned_prompts == usage.finished_prompts
        assert usage.planned_tokens == usage.sampled_tokens


def test_killed_workers_are_replaced_and_their_prompts_done_again(
    tiny_pair: TinyPair, pool: ProcessPool[Engine], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    work = make_works(tiny_pair, tmp_path)["select"]
    expected = collect(OwnProcess(tiny_pair.engine).run(work))

    def kill_two() -> Iterator[tuple[int, Any]]:
        for count, outcome in enumerate(pool.run(work)):
            if count < 2:
                pids = [worker.process.pid for worker in pool._workers if worker.is_ready]
                assert pids[0] is not None
                os.kill(pids[0], signal.SIGKILL)
            yield outcome

    assert collect(kill_two()) == expected
    assert "was killed by SIGKILL (out of memory?); another one takes its place" in caplog.text


def test_an_item_that_ends_its_workers_is_given_up_alone(
    pool: ProcessPool[Engine], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    faults = {2: "killed", 5: "CUDA error: an illegal\nmemory access"}
    results = dict(pool.run(FaultyWork(items=tuple(range(8)), faults=faults)))
    lost = {item: result.reason for item, result in results.items() if isinstance(result, Lost)}
    assert {item: results[item] for item in results if item not in lost} == {i: i * i for i in (0, 1, 3, 4, 6, 7)}
    assert lost == {
        2: "the worker that did nothing else was killed by SIGKILL (out of memory?), the last of 3",
        5: "the worker that did nothing else failed (RuntimeError: CUDA error: an illegal memory access), the last of "
        "3",
    }
    assert caplog.text.count("another one takes its place") == 2 * hand_out.MAX_ENDS


@pytest.mark.parametrize("num_items", [2, 5, 8])
def test_few_items_are_divided_fairly(pool: ProcessPool[Engine], num_items: int) -> None:
    """A worker with room for all of them takes no more than its part at once, that of all workers that are ready."""
    pool.open()  # those of an earlier test may have been replaced
    results = dict(pool.run(GreedyWork(items=tuple(range(num_items)))))
    assert sorted(results) == list(range(num_items))
    assert max(results.values()) <= -(-num_items // pool.size)


def test_a_prompt_that_is_given_up_is_reported_like_one_that_is_too_long(
    tiny_pair: TinyPair, write_rows: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Losing(OwnProcess):
        def run(self, work: Work[Engine, Any], budget: Budget = Budget()) -> Iterator[tuple[int, Any]]:
            for item, outcome in super().run(work, budget):
                yield item, Lost(reason="no luck") if item == 1 else outcome

    monkeypatch.setattr("genssd.distill.runs.pools.OwnProcess", Losing)
    data = write_rows([{"question": f"{i}?"} for i in range(3)])
    models = {"teacher": str(tiny_pair.teacher), "student": str(tiny_pair.student), "data": str(data)}
    select = run_select(SelectConfig(**models, **SEARCH, output_dir=str(tmp_path / "s")), tiny_pair.engine)
    generate = run_generate(GenerateConfig(**models, max_tokens=4, output_dir=str(tmp_path / "g")), tiny_pair.engine)
    assert select.failures == select.bad_rows == generate.failures == (f"{data}, line 2: no luck",)
    assert select.prompts == generate.prompts == 2


def test_an_error_of_the_user_ends_the_run(tiny_pair: TinyPair) -> None:
    pool = make_pool(tiny_pair)
    work = FaultyWork(items=(0, 1, 2), faults={1: "refused"})
    with pytest.raises(InputError, match=r"^item 1 cannot be squared$"), pool:
        list(pool.run(work))
    assert not any(worker.process.is_alive() for worker in pool._workers)


def test_models_that_do_not_load_are_refused_as_in_one_process(tiny_pair: TinyPair) -> None:
    pool = make_pool(tiny_pair, size=1, dtype="float64")
    with pytest.raises(InputError, match=r"^dtype 'float64' is not one of auto"), pool:
        pool.open()


def test_workers_that_never_load_end_the_run(tiny_pair: TinyPair) -> None:
    pool = make_pool(tiny_pair, size=1, no_such_argument=1)
    message = r"a worker process failed \(TypeError: .*\) while it loaded the models, 3 times"
    with pytest.raises(WorkerError, match=message), pool:
        pool.open()


def test_a_device_that_is_lost_is_left_out(
    tiny_pair: TinyPair, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The others go on, and do what it had begun. A pool that has no others ends with the same words."""
    lost = tmp_path / "lost"
    first, second = (
        FragileRecipe(
            arguments={**list_engine_arguments(tiny_pair), "device": "cpu"}, chat=ChatOptions(), visible_device=device,
            lost=str(lost),
        )
        for device in ("GPU-0", "GPU-1")
    )  # fmt: skip
    said = (
        r"a worker process on device GPU-1 failed \(RuntimeError: CUDA error: device is lost\) while it loaded the "
        "models, 3 times one after the other"
    )
    with ProcessPool(read_tokens(tiny_pair), [first, second]) as pool:
        pool.open()
        done = 0
        for item, result in pool.run(SlowWork(items=tuple(range(3000)))):
            assert result == item**2
            if not lost.exists():
                lost.touch()
                pool._workers[1].process.kill()
            done += len(pool._workers) == 1
            if done == 50:
                break
        assert "a worker process on device GPU-1 was killed by SIGKILL" in caplog.text
        assert re.search(said + "; going on with 1 worker", caplog.text)
    with pytest.raises(WorkerError, match=f"^{said}$"), ProcessPool(read_tokens(tiny_pair), [second]) as pool:
        pool.open()


def test_a_total_budget_ends_all_workers_and_a_resumed_run_needs_none(
    tiny_pair: TinyPair, write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    data = write_rows([{"question": f"{i % 7}?"} for i in range(40)])
    config: dict[str, Any] = {
        "teacher": str(tiny_pair.teacher), "student": str(tiny_pair.student), "data": str(data), **SEARCH,
        "memory_bytes": 1 << 22, "max_num_seqs": 4, "output_dir": str(tmp_path / "out"),
    }  # fmt: skip
    first = run_select(SelectConfig(**config, processes=2, total_budget=Budget(tokens=600)))
    assert first.stopped_by == "total_budget.tokens"
    assert 0 < first.prompts < 40
    assert first.prompts + first.unfinished == 40
    second = run_select(SelectConfig(**config, resume=True), tiny_pair.engine)
    assert (second.prompts, second.stopped_by) == (40, None)
    run_select(SelectConfig(**{**config, "output_dir": str(tmp_path / "whole")}), tiny_pair.engine)
    ours, whole = (read_results(tmp_path / name) for name in ("out", "whole"))
    assert {name: ours[name] for name in ours if name.endswith("jsonl")} == {
        name: whole[name] for name in whole if name.endswith("jsonl")
    }


def test_several_teachers_in_two_processes_write_what_they_write_in_one(
    tiny_pair: TinyPair, write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    """With a calibration, which the first teacher samples for, and a student that reads other teachers' chunks."""
    other = tmp_path / "other"
    save_checkpoint(other, seed=77, scale=8.0)
    data = write_rows([{"question": f"{i % 5}?", "answer": "1"} for i in range(9)])
    held = tmp_path / "held.jsonl"
    held.write_text("".join(json.dumps({"question": f"{i}+1?"}) + "\n" for i in range(3)))
    config: dict[str, Any] = {
        "teacher": (str(tiny_pair.teacher), str(other)), "student": str(tiny_pair.student), "data": str(data),
        **SEARCH, "drop_teacher_after": 2, "teacher_topk": 2, "memory_bytes": 1 << 22, "max_num_seqs": 4,
        "calibrate": Calibrate(data=str(held)), "on_unlearnable": "accept_best",
    }  # fmt: skip
    two = run_select(SelectConfig(**config, processes=2, output_dir=str(tmp_path / "two")))
    one = run_select(SelectConfig(**config, output_dir=str(tmp_path / "one")))
    assert two.prompts == one.prompts == 9
    for name in ("selections.jsonl", "decisions.jsonl"):
        rows = [read_rows(tmp_path / run / name) for run in ("two", "one")]
        if name == "selections.jsonl":
            assert {chunk["teacher"] for row in rows[0] for chunk in row["chunks"]} == set(config["teacher"])
            assert all(row.pop("teacher_topk") is not None for run in rows for row in run)  # places follow the order
        assert rows[0] == rows[1]
    records = [json.loads((tmp_path / run / "run.json").read_text()) for run in ("two", "one")]
    assert records[0]["settings"] == records[1]["settings"]
    thresholds = [json.loads((tmp_path / run / "calibration.json").read_text()) for run in ("two", "one")]
    assert thresholds[0] == thresholds[1]


def run_forked_command(words: list[str], log: str) -> None:
    """The body of a process: run a command whose output is a file, and whose workers are forked from it."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    starting.START_METHOD = "fork"
    try:
        main(words)
    except SystemExit as stop:
        os._exit(stop.code if isinstance(stop.code, int) else 1)
    os._exit(0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_workers_end_with_the_command(
    tiny_pair: TinyPair, write_rows: Callable[..., Path], tmp_path: Path, number: signal.Signals
) -> None:
    """The command is stopped while it runs, or killed while its workers start; no process is left."""
    data = write_rows([{"question": f"{i}?"} for i in range(3000)])
    flags = ["--teacher", str(tiny_pair.teacher), "--data", str(data), "--max-tokens", "100", "--processes", "2"]
    words = ["generate", *flags, "--threads", "2", "--output-dir", str(tmp_path / "out")]
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=run_forked_command, args=(words, str(tmp_path / "log")))
    process.start()
    assert process.pid is not None
    journal = tmp_path / "out/responses.jsonl"
    while process.is_alive() and not (
        len(find_children(process.pid)) >= 2 if number == signal.SIGKILL else journal.exists()
    ):
        time.sleep(0.002)
    children = find_children(process.pid)
    os.kill(process.pid, number)
    process.join()
    said = (tmp_path / "log").read_text()
    assert process.exitcode == (143 if number == signal.SIGTERM else -9), said
    assert len(children) >= 2
    assert_all_end(children)
    if number == signal.SIGTERM:
        assert "terminated; " in said
        assert "Traceback" not in said


def test_started_interpreters_end_with_the_process_that_started_them() -> None:
    """Workers of a command are interpreters of their own, which are spawned and not forked. These still import."""
    program = (
        "import sys, time, support.waiting\n"
        "from genssd.distill.pool.starting import START_METHOD, start_process\n"
        "assert START_METHOD == 'spawn'\n"
        "pids = [start_process(support.waiting.wait)[0].pid for _ in range(2)]\n"
        "print(*pids, flush=True)\n"
        "time.sleep(600)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        pids = [int(word) for word in process.stdout.readline().split()]
        assert len(pids) == 2
        assert {*pids} < {*find_children(process.pid)}, "the third is the resource tracker"
        process.kill()
    assert_all_end(pids)


def assert_all_end(pids: list[int]) -> None:
    until = time.monotonic() + 60
    while left := [pid for pid in pids if Path(f"/proc/{pid}").exists()]:
        assert time.monotonic() < until, f"processes are left: {left}"
        time.sleep(0.005)
