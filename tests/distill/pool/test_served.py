"""A served teacher in several processes: the rows of one, one record of the server, and no other model in between."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.pool_works import FaultyWork
from support.small_runs import VARYING
from support.stub_server import StubServer
from support.tiny_pair import TinyPair
from support.toys import save_checkpoint
from transformers import AutoModelForCausalLM

from genssd.distill.pool.processes import ProcessPool
from genssd.distill.runs.chat_settings import read_clock
from genssd.distill.runs.pools import open_pool
from genssd.distill.select.config import SelectConfig
from genssd.distill.select.run import run_select
from genssd.engine.common.errors import InputError, ServerError
from genssd.engine.decoding.chunk import Chunk
from genssd.engine.served.options import ServerOptions

pytestmark = pytest.mark.usefixtures("forked_workers")

Write = Callable[..., Path]


@pytest.fixture(scope="module")
def stub(tiny_pair: TinyPair) -> Iterator[StubServer]:
    model = AutoModelForCausalLM.from_pretrained(tiny_pair.teacher).eval()
    with StubServer(tiny_pair.teacher, model).running() as server:
        yield server


def configure(stub: StubServer, pair: TinyPair, data: Path, output_dir: Path, **options: Any) -> SelectConfig:
    given: dict[str, Any] = {
        "teacher": stub.url, "teacher_tokenizer": str(pair.teacher), "student": str(pair.student), "data": str(data),
        "output_dir": str(output_dir), "candidates": 2, "chunk": Chunk(tokens=3, until="a", limit=5), "max_tokens": 8,
        "memory_bytes": 1 << 22, "max_num_seqs": 4, "server": ServerOptions(timeout=30.0, patience=30.0, in_flight=8),
    }  # fmt: skip
    return SelectConfig(**given | options)


def without_times(value: Any) -> Any:
    """A row without what differs from run to run, at any depth."""
    if isinstance(value, dict):
        return {name: without_times(part) for name, part in value.items() if name not in VARYING}
    return [without_times(part) for part in value] if isinstance(value, list) else value


def read_rows(output_dir: Path, name: str) -> list[dict[str, Any]]:
    """The rows of a run in the order of the data, without times."""
    rows = [without_times(json.loads(line)) for line in (output_dir / name).read_text().splitlines()]
    return sorted(rows, key=lambda row: int(row["index"]))


@pytest.mark.parametrize("is_team", [False, True])
def test_rows_and_requests_are_those_of_one_process(
    stub: StubServer, tiny_pair: TinyPair, write_rows: Write, tmp_path: Path, is_team: bool
) -> None:
    data = write_rows([{"question": f"{i % 3}+{i % 3}?", "answer": str(2 * i)} for i in range(6)])
    options: dict[str, Any] = {}
    if is_team:
        save_checkpoint(tmp_path / "other", seed=77, scale=8.0)
        options["teacher"] = (stub.url, str(tmp_path / "other"))
    sent: list[list[str]] = []
    for run, more in (("one", {}), ("two", {"processes": 2})):
        stub.requests.clear()
        run_select(configure(stub, tiny_pair, data, tmp_path / run, **options, **more))
        sent.append(sorted(json.dumps(request, sort_keys=True) for request in stub.requests))
    for name in ("selections.jsonl", "decisions.jsonl"):
        assert read_rows(tmp_path / "two", name) == read_rows(tmp_path / "one", name)
    assert set(sent[0]) == set(sent[1]), "the same prompts with the same seeds"
    records = [json.loads((tmp_path / run / "run.json").read_text()) for run in ("one", "two")]
    assert records[0]["server"] == records[1]["server"]
    assert records[0]["settings"] == records[1]["settings"]
    summaries = [json.loads((tmp_path / run / "summary.json").read_text()) for run in ("one", "two")]
    probes = len(sent[1]) - len(sent[0])
    assert probes > 0, "each process tries the server"
    assert summaries[1]["server"]["requests"] == summaries[0]["server"]["requests"] + probes == len(sent[1])


def open_served(stub: StubServer, pair: TinyPair, size: int) -> Any:
    config = configure(stub, pair, Path("x"), Path("x"), processes=size)
    chat = config.make_chat_options(read_clock().isoformat())
    return open_pool(config, None, chat, teacher=config.teacher, student=config.student)


def listen_for_ever(pool: ProcessPool[Any]) -> None:
    while True:
        pool._listen()


def test_processes_divide_the_requests_that_wait_at_once(stub: StubServer, tiny_pair: TinyPair) -> None:
    with open_served(stub, tiny_pair, 2) as pool:
        assert isinstance(pool, ProcessPool)
        for worker in pool._workers:
            assert worker.recipe.arguments["server"].in_flight == 4  # type: ignore[attr-defined]


def test_requests_of_a_process_that_ended_are_counted_and_another_model_is_refused(
    stub: StubServer, tiny_pair: TinyPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that takes the place of another one asks the server again, which serves another model by then."""
    with open_served(stub, tiny_pair, 2) as pool:
        before = pool.models.server
        assert before is not None
        assert before.requests == 2 * 3
        monkeypatch.setattr(stub.manners, "name", "another")
        pid = pool._workers[0].process.pid
        os.kill(pid, signal.SIGKILL)
        refusal = r"other models than the ones before \(.*another .*tiny .*: they were replaced"
        with pytest.raises(InputError, match=refusal):
            listen_for_ever(pool)
        assert pool.models.server.requests == before.requests
        pool.models.remove(pool._workers[1])
        assert pool.models.server.requests == before.requests


def test_a_server_that_is_not_there_is_refused(tiny_pair: TinyPair, stub: StubServer) -> None:
    absent = StubServer(tiny_pair.teacher, stub.model, port=1)
    with pytest.raises(ServerError, match="is not there"), open_served(absent, tiny_pair, 2):
        pass


def test_a_pool_without_a_server_has_none(tiny_pair: TinyPair) -> None:
    config = SelectConfig(teacher=str(tiny_pair.teacher), student=str(tiny_pair.student), data="x", processes=2,
                          memory_bytes=1 << 22)  # fmt: skip
    chat = config.make_chat_options(read_clock().isoformat())
    with open_pool(config, None, chat, teacher=config.teacher, student=config.student) as pool:
        assert pool.models.server is None
        assert list(pool.run(FaultyWork(items=(3,), faults={}))) == [(3, 9)]
