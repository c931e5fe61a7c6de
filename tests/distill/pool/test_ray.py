"""Ray itself, on this machine: the results of one process, whatever is killed, and data of a directory.

One cluster is started for all tests, and its two actors are those of several tests.
"""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.pool_works import SEARCH, collect, find_children, make_works, read_rows
from support.small_runs import read_results
from support.tiny_pair import TinyPair

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
pytestmark = pytest.mark.slow


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


@pytest.fixture(scope="module")
def pool(tiny_pair: TinyPair, cluster: RayCluster) -> Iterator[RayPool]:
    engine = tiny_pair.engine
    roles: tuple[Role, Role] = ("teacher", "student")
    tokens = LocalTokens(tokenizers={role: engine.tokenizer(role) for role in roles}, reader=engine.reader)
    arguments = {
        "teacher": str(tiny_pair.teacher), "student": str(tiny_pair.student), "memory_bytes": 1 << 22,
        "max_num_seqs": 4, "device": "cpu", "threads": 1,
    }  # fmt: skip
    team = choose_team(cluster.list_nodes(), ActorRange(2, 2), cluster.cpus, "cpu", None)
    recipe = EngineRecipe(arguments=arguments, chat=ChatOptions())
    with RayPool(RemoteModels([tokens]), cluster.connect(), recipe, team, engine.fingerprints) as pool:
        pool.open()
        yield pool


@pytest.mark.parametrize("command", ["generate", "relay", "score", "evaluate", "prefix"])
def test_results_are_those_of_one_process(tiny_pair: TinyPair, pool: RayPool, tmp_path: Path, command: str) -> None:
    work = make_works(tiny_pair, tmp_path)[command]
    assert collect(pool.run(work)) == collect(OwnProcess(tiny_pair.engine).run(work))


def test_a_killed_actor_is_replaced_and_its_prompts_done_again(
    tiny_pair: TinyPair,
    pool: RayPool,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    work = make_works(tiny_pair, tmp_path)["select"]
    expected = collect(OwnProcess(tiny_pair.engine).run(work))

    def kill_one() -> Iterator[tuple[int, Any]]:
        for count, outcome in enumerate(pool.run(work)):
            if count == 1:
                pid = pool._workers[0].pid
                assert pid is not None
                os.kill(pid, signal.SIGKILL)
            yield outcome

    assert collect(kill_one()) == expected
    assert "a Ray actor on node 127.0.0.1 ended (" in caplog.text
    assert "another one takes its place" in caplog.text
    assert capfd.readouterr() == ("", ""), "Ray prints nothing of its own"


def write_directory(directory: Path) -> None:
    """Two Parquet files, a compressed one and a note, and a row that is no problem."""
    import pyarrow
    from pyarrow import parquet

    directory.mkdir()
    for name, first in (("b.parquet", 0), ("c.parquet", 3)):
        rows = [{"question": f"{i % 4}?", "answer": str(i)} for i in range(first, first + 3)]
        parquet.write_table(pyarrow.Table.from_pylist(rows), directory / name)
    lines = [{"question": "7?", "answer": 7}, {"nothing": 1}, {"question": "8?"}]
    (directory / "a.jsonl.gz").write_bytes(gzip.compress("\n\n".join(map(json.dumps, lines)).encode()))
    (directory / "README.md").write_text("no rows")
    (directory / "_SUCCESS").write_text("")


def test_a_directory_is_read_with_the_names_of_its_files(cluster: RayCluster, tmp_path: Path) -> None:
    write_directory(tmp_path / "d")
    name = str(tmp_path / "d")
    with pytest.raises(InputError, match="is a directory, not a data file"):
        read_usable_problems(name)
    with read_with(RayRows(cluster.connect)):
        problems = read_usable_problems(name)
        content = hash_content(name)
    assert [(problem.prompt[-1]["content"], problem.answer) for problem in problems.problems] == [
        ("7?", "7"), ("8?", None), *((f"{i % 4}?", str(i)) for i in range(6))
    ]  # fmt: skip
    assert [problem.where for problem in problems.problems[:3]] == [
        f"{name}/a.jsonl.gz, line 1", f"{name}/a.jsonl.gz, line 5", f"{name}/b.parquet, row 1"
    ]  # fmt: skip
    assert problems.problems[-1].where == f"{name}/c.parquet, row 3"
    assert problems.list_bad_rows()[0].startswith(f"{name}/a.jsonl.gz, line 3: ")
    (tmp_path / "d/b.parquet").unlink()
    with read_with(RayRows(cluster.connect)):
        assert hash_content(name) != content


def test_what_cannot_be_read_is_named(cluster: RayCluster, tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "e").mkdir()
    (tmp_path / "e/x.parquet").write_bytes(b"PAR1 and then nothing")
    with read_with(RayRows(cluster.connect)):
        with pytest.raises(InputError, match=r"d holds no data files \("):
            read_usable_problems(tmp_path / "d")
        with pytest.raises(InputError, match="nosuch://bucket/x cannot be listed: "):
            read_usable_problems("nosuch://bucket/x")
        with pytest.raises(InputError, match=r"e cannot be read through Ray Data: .*[Pp]arquet"):
            read_usable_problems(tmp_path / "e")


def test_a_killed_command_takes_its_actors_along_and_is_resumed(
    tiny_pair: TinyPair, cluster: RayCluster, tmp_path: Path
) -> None:
    """The data are a directory, which the cluster reads, and the command reaches the cluster by its address."""
    write_directory(tmp_path / "d")
    for number in range(10):
        (tmp_path / f"d/x{number}.jsonl").write_text(f'{{"question": "{number}+1?"}}\n' * 4)
    models = ["--teacher", str(tiny_pair.teacher), "--student", str(tiny_pair.student)]
    search = ["--candidates", "3", "--chunk.tokens", "4", "--chunk.until", "None", "--max-tokens", "16"]
    flags = [*models, "--data", str(tmp_path / "d"), *search, "--memory-bytes", "4194304", "--max-num-seqs", "2"]
    address = cluster.connect().get_runtime_context().gcs_address
    command = [sys.executable, "-m", "genssd", "select", *flags, "--ray", address, "--ray-actors", "1"]
    command += ["--ray-cpus", "1", "--output-dir", str(tmp_path / "out")]
    # the cluster is at the loopback address, for which Ray takes an outward one, unless it is told otherwise
    environment = {**os.environ, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    others = find_actors()
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        journal = tmp_path / "out/selections.jsonl"
        until = time.monotonic() + 120
        while (
            process.poll() is None
            and time.monotonic() < until
            and not (journal.exists() and journal.read_bytes().count(b"\n") > 1)
        ):
            time.sleep(0.02)
        actors = find_actors() - others
        process.kill()
        assert process.stderr is not None
        said = process.stderr.read()
        assert process.wait() == -9, said
    assert actors
    assert "Traceback" not in said
    until = time.monotonic() + 120
    while find_actors() - others:
        assert time.monotonic() < until, find_actors() - others
        time.sleep(0.05)
    assert 0 < journal.read_bytes().count(b"\n") < 48
    done = subprocess.run([*command, "--resume"], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 2, done.stderr  # a row of the data is no problem
    rows = read_rows(journal)
    assert len(rows) == 48
    assert len({row["index"] for row in rows}) == 48
    assert not [word for word in ("raylet", "WARNING", "INFO") if word in done.stderr], done.stderr


def test_the_command_on_a_cluster_that_a_program_has_reached(
    tiny_pair: TinyPair, cluster: RayCluster, tmp_path: Path
) -> None:
    """The cluster of the program is used, and stays; the rows and settings are those of one process."""
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"question": f"{i % 3}?"}) + "\n" for i in range(6)))
    config: dict[str, Any] = {
        "teacher": str(tiny_pair.teacher), "student": str(tiny_pair.student), "data": str(data), **SEARCH,
        "memory_bytes": 1 << 22, "max_num_seqs": 4,
    }  # fmt: skip
    ours = SelectConfig(**config, ray="local", ray_actors="1", ray_cpus=1, output_dir=str(tmp_path / "ray"))
    assert run_select(ours).prompts == 6
    assert cluster.connect().is_initialized()
    run_select(SelectConfig(**config, output_dir=str(tmp_path / "one")), tiny_pair.engine)
    results = [read_results(tmp_path / name) for name in ("ray", "one")]
    for name in ("selections.jsonl", "decisions.jsonl"):
        assert sorted(results[0][name], key=json.dumps) == sorted(results[1][name], key=json.dumps)
    records = [json.loads((tmp_path / name / "run.json").read_text()) for name in ("ray", "one")]
    assert records[0]["settings"] == records[1]["settings"]


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
