"""Ray itself, on this machine: the results of one process, whatever is killed, and data of a directory.

One cluster is started for all tests. An actor takes six seconds to import what it needs, so there are few of them.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.data_directories import write_directory
from support.pool_works import SEARCH, collect, find_children, make_works
from support.small_runs import read_results
from support.tiny_pair import TinyPair

from genssd.cli import main
from genssd.distill.data.problems import read_usable_problems
from genssd.distill.files.cluster_files import read_with
from genssd.distill.files.ray_rows import RayRows
from genssd.distill.files.rows import hash_content
from genssd.distill.pool.pool import OwnProcess
from genssd.distill.pool.ray_cluster import RayCluster
from genssd.distill.pool.ray_options import ActorRange, choose_team
from genssd.distill.pool.ray_pool import RayPool
from genssd.distill.pool.remote_models import LocalTokens, RemoteModels
from genssd.distill.pool.worker import EngineRecipe
from genssd.distill.select.config import SelectConfig
from genssd.distill.select.run import run_select
from genssd.engine.common.errors import InputError
from genssd.engine.common.model_choices import Role
from genssd.engine.texts.chat_options import ChatOptions

pytest.importorskip("ray")
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("forked_workers")]


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    handler = signal.getsignal(signal.SIGTERM)
    cluster = RayCluster("local", "4", 1)
    try:
        cluster.connect()
        assert signal.getsignal(signal.SIGTERM) is handler
        yield cluster
    finally:
        cluster.close()


def find_actors() -> set[int]:
    """Numbers of the processes of actors that a child of this process, such as the raylet, has started."""
    children = (pid for child in find_children(os.getpid()) for pid in find_children(child))
    return {pid for pid in children if b"EngineActor" in read_command(pid)}


def read_command(pid: int) -> bytes:
    """The command of a process; nothing where it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def open_pool(pair: TinyPair, cluster: RayCluster) -> RayPool:
    engine = pair.engine
    roles: tuple[Role, Role] = ("teacher", "student")
    tokens = LocalTokens(tokenizers={role: engine.tokenizer(role) for role in roles}, reader=engine.reader)
    arguments = {
        "teacher": str(pair.teacher), "student": str(pair.student), "memory_bytes": 1 << 22, "max_num_seqs": 4,
        "device": "cpu", "threads": 1,
    }  # fmt: skip
    team = choose_team(cluster.list_nodes(), ActorRange(2, 2), cluster.cpus, "cpu", None)
    recipe = EngineRecipe(arguments=arguments, chat=ChatOptions())
    return RayPool(RemoteModels([tokens]), cluster.connect(), recipe, team, engine.fingerprints)


def test_results_are_those_of_one_process_also_where_an_actor_is_killed(
    tiny_pair: TinyPair,
    cluster: RayCluster,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    works = make_works(tiny_pair, tmp_path)
    own = OwnProcess(tiny_pair.engine)

    def kill_one(pool: RayPool, outcomes: Iterator[tuple[int, Any]]) -> Iterator[tuple[int, Any]]:
        for count, outcome in enumerate(outcomes):
            if count == 1:
                pid = pool._workers[0].pid
                assert pid is not None
                os.kill(pid, signal.SIGKILL)
            yield outcome

    with open_pool(tiny_pair, cluster) as pool:
        pool.open()
        for name in ("generate", "relay", "score", "evaluate", "prefix"):
            assert collect(pool.run(works[name])) == collect(own.run(works[name])), name
        assert collect(kill_one(pool, pool.run(works["select"]))) == collect(own.run(works["select"]))
    assert "a Ray actor on node 127.0.0.1 ended (" in caplog.text
    assert "another one takes its place" in caplog.text
    assert capfd.readouterr() == ("", ""), "Ray prints nothing of its own"


def test_an_object_storage_is_read_with_the_names_of_its_files(cluster: RayCluster, tmp_path: Path) -> None:
    """The URL of a directory stands for one. Ray's own reader of Parquet fails on so many tables without aiohttp."""
    write_directory(tmp_path / "d", num_tables=12)
    (tmp_path / "d/empty.jsonl").write_text("")
    name, url = str(tmp_path / "d"), f"file://{tmp_path}/d"
    with read_with(RayRows(cluster.connect)):
        problems, stored = (read_usable_problems(one) for one in (name, url))
        assert hash_content(name) == hash_content(url)
        with pytest.raises(InputError, match="nosuch://bucket/x cannot be listed: "):
            read_usable_problems("nosuch://bucket/x")
    assert len(stored.problems) == 2 + 3 * 12
    assert [problem.prompt for problem in stored.problems] == [problem.prompt for problem in problems.problems]
    assert [problem.where for problem in stored.problems] == [f"file://{p.where}" for p in problems.problems]
    assert stored.list_bad_rows()[0].startswith(f"{url}/a.jsonl.gz, line 3: ")


def run_forked_command(words: list[str], log: str) -> None:
    """The body of a process: run a command whose output is a file."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    main(words)


def test_a_killed_command_takes_its_actors_along_and_is_resumed(
    tiny_pair: TinyPair, cluster: RayCluster, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The command reaches the cluster by its address; a program that has reached it already goes on.

    The data are a directory, which the cluster reads. The cluster of the program stays.
    """
    write_directory(tmp_path / "d")
    for number in range(10):
        (tmp_path / f"d/x{number}.jsonl").write_text(f'{{"question": "{number}+1?"}}\n' * 4)
    models = ["--teacher", str(tiny_pair.teacher), "--student", str(tiny_pair.student)]
    search = ["--candidates", "3", "--chunk.tokens", "4", "--chunk.until", "None", "--max-tokens", "16"]
    flags = [*models, "--data", str(tmp_path / "d"), *search, "--memory-bytes", "4194304", "--max-num-seqs", "4"]
    address = cluster.connect().get_runtime_context().gcs_address
    assert address.startswith("127.0.0.1:")
    words = ["select", *flags, "--ray", address, "--ray-actors", "1", "--ray-cpus", "1"]
    words += ["--output-dir", str(tmp_path / "out")]
    others, journal, log = find_actors(), tmp_path / "out/selections.jsonl", tmp_path / "log"
    process = multiprocessing.get_context("forkserver").Process(target=run_forked_command, args=(words, str(log)))
    process.start()
    until = time.monotonic() + 300
    while process.is_alive() and not (journal.exists() and journal.read_bytes().count(b"\n") > 1):
        assert time.monotonic() < until, log.read_text()
        time.sleep(0.005)
    actors = find_actors() - others
    process.kill()
    process.join()
    assert process.exitcode == -9, log.read_text()
    assert actors
    assert "Traceback" not in log.read_text()
    until = time.monotonic() + 120
    while find_actors() & actors:
        assert time.monotonic() < until, find_actors() - others
        time.sleep(0.05)
    assert 0 < journal.read_bytes().count(b"\n") < 48
    config: dict[str, Any] = {
        "teacher": str(tiny_pair.teacher), "student": str(tiny_pair.student), **SEARCH, "memory_bytes": 1 << 22,
        "max_num_seqs": 4,
    }  # fmt: skip
    resumed = {"data": str(tmp_path / "d"), "output_dir": str(tmp_path / "out"), "resume": True}
    summary = run_select(SelectConfig(**config, **resumed, ray="local", ray_actors="1", ray_cpus=1))
    assert (summary.prompts, len(summary.bad_rows)) == (48, 1), "a row of the data is no problem"
    assert cluster.connect().is_initialized()
    assert capfd.readouterr() == ("", "")
    rows = tmp_path / "rows.jsonl"
    with read_with(RayRows(cluster.connect)):
        problems = read_usable_problems(str(tmp_path / "d")).problems
    lines = [{"question": problem.prompt[-1]["content"], "answer": problem.answer} for problem in problems]
    lines.insert(1, {"nothing": None})  # the row that is no problem has its number, too
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run_select(SelectConfig(**config, data=str(rows), output_dir=str(tmp_path / "one")), tiny_pair.engine)
    results = [read_results(tmp_path / name) for name in ("out", "one")]
    for name in ("selections.jsonl", "decisions.jsonl"):
        assert len(results[0][name]) == 48
        for row in (*results[0][name], *results[1][name]):
            row.pop("source", None)  # where it stands in its file
        assert sorted(results[0][name], key=json.dumps) == sorted(results[1][name], key=json.dumps)
    records = [json.loads((tmp_path / name / "run.json").read_text())["settings"] for name in ("out", "one")]
    assert {name for name in records[0] if records[0][name] != records[1][name]} <= {"data"}


def test_nothing_is_left_of_the_cluster(cluster: RayCluster) -> None:
    """Last: it ends the cluster of the tests above, of which some may have been left out."""
    files = cluster._temporary
    assert files is not None
    assert files.is_dir()
    children = find_children(os.getpid())
    assert any(str(files).encode() in read_command(pid) for pid in children)
    cluster.close()
    assert not files.exists()
    until = time.monotonic() + 30
    while left := {pid for pid in children if str(files).encode() in read_command(pid)}:
        assert time.monotonic() < until, left
        time.sleep(0.05)
