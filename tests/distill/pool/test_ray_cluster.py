"""Reaching a Ray cluster: what is said within seconds where Ray or the cluster is not there, and what is left over."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest

from genssd.distill.pool import ray_cluster
from genssd.distill.pool.ray_cluster import RayCluster
from genssd.distill.pool.ray_joining import check_answers, collect_stderr, explain
from genssd.distill.pool.ray_options import Address
from genssd.engine.common.errors import InputError, WorkerError


@contextmanager
def answering(answer: bytes | None) -> Iterator[Address]:
    """A server that answers each connection with some bytes, or says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            with connection, suppress(ConnectionError):
                connection.recv(1000)
                if answer is not None:
                    connection.sendall(answer)
                connection.recv(1000)

        threading.Thread(target=serve, daemon=True).start()
        yield Address("127.0.0.1", server.getsockname()[1])


def test_a_package_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(
        InputError, match=r"^ray needs a package that is not installed here: pip install 'genssd\[ray\]'$"
    ):
        RayCluster("local", None, None).connect()


def test_an_address_at_which_nothing_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = Address("127.0.0.1", server.getsockname()[1])
    with pytest.raises(
        InputError, match=rf"ray {address}: nothing answers there \(Connection refused\); start a cluster"
    ):
        check_answers(address)


def test_a_host_that_is_not_there() -> None:
    with pytest.raises(InputError, match=r"ray no-host\.invalid:6379: there is no host no-host\.invalid"):
        check_answers(Address("no-host.invalid", 6379))


def test_an_address_that_says_nothing() -> None:
    with answering(None) as address, pytest.raises(InputError, match=r"nothing answers within 0\.2 s; start a cluster"):
        check_answers(address, patience=0.2)


def test_an_address_of_something_else() -> None:
    with (
        answering(b"HTTP/1.1 400 Bad Request\r\n\r\n") as address,
        pytest.raises(InputError, match="what answers there is no head of a Ray cluster"),
    ):
        check_answers(address)


def test_a_server_of_grpc_is_taken() -> None:
    with answering(b"\x00\x00\x12\x04\x00\x00\x00\x00\x00" + bytes(18)) as address:
        check_answers(address)


@pytest.mark.parametrize(
    ("cause", "printed", "reason"),
    [
        (
            "Failed to get cluster ID from GCS server",
            "gcs_client.cc:210: Unauthenticated: RPC error: InvalidAuthToken: Authentication token is missing",
            "the cluster asks for another token than this process has: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or "
            "RAY_AUTH_TOKEN_PATH as they are where `ray start` runs",
        ),
        (
            "No node info found matching attributes: '' when trying to resolve node to connect to.",
            "",
            "none of the cluster's nodes runs on this machine: run the command on one of them, or let this machine "
            "join with `ray start --address`",
        ),
        (
            "Version mismatch: The cluster was started with:\n    Ray: 2.50.0",
            "",
            "the cluster cannot be joined: Version mismatch: The cluster was started with: Ray: 2.50.0; the command "
            "must run on one of its nodes, with the versions of Python and Ray that they have",
        ),
    ],
)
def test_what_failures_to_join_mean(cause: str, printed: str, reason: str) -> None:
    error = ConnectionError("Failed to connect to Ray cluster at 10.0.0.1:6379")
    error.__cause__ = RuntimeError(cause)
    assert explain(error, printed) == reason


def test_a_cluster_that_is_looked_for_and_not_found() -> None:
    error = ConnectionError("Could not find any running Ray instance. Please specify the one to connect to by setting")
    assert explain(error, "") == "no cluster is found from here; start one with `ray start --head`, or run --ray local"


def test_what_compiled_parts_print_is_kept(capfd: pytest.CaptureFixture[str]) -> None:
    with collect_stderr():
        os.write(2, b"W gcs_client.cc: no\n")
    os.write(2, b"after\n")
    assert capfd.readouterr().err == "after\n"
    with collect_stderr() as read:
        os.write(2, b"one\n")
        assert read() == "one\n"


def test_files_of_a_cluster_whose_process_was_killed_are_removed(tmp_path: Path) -> None:
    with subprocess.Popen(["sleep", "60"]) as process:
        alive, ours = tmp_path / f"genssd-ray-{process.pid}-abc", tmp_path / f"genssd-ray-{os.getpid()}-abc"
        other = tmp_path / "genssd-ray-notes"
        for path in (alive, ours, other):
            path.mkdir()
        process.kill()
        process.wait()
        until = time.monotonic() + 30
        while Path(f"/proc/{process.pid}").exists():
            assert time.monotonic() < until
            time.sleep(0.01)
        ray_cluster._remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([ours.name, other.name])


def test_the_names_of_sockets_are_short_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", "/tmp")
    assert ray_cluster._choose_directory() == Path("/tmp")
    monkeypatch.setattr("tempfile.tempdir", "/scratch")
    assert ray_cluster._choose_directory() == Path("/scratch")
    monkeypatch.setattr("tempfile.tempdir", "/a/long/directory/of/a/batch/system")
    assert ray_cluster._choose_directory() == Path("/tmp")


def test_processes_of_a_start_that_has_failed_are_ended(tmp_path: Path) -> None:
    with subprocess.Popen(["sleep", "60"]) as other, subprocess.Popen(["tail", "-f", "/dev/null", tmp_path]) as ours:
        ray_cluster._end_processes(tmp_path)
        assert ours.wait(30) == -signal.SIGKILL
        assert other.poll() is None
        other.kill()


class StartingRay:
    """Ray whose node ends while it starts, so many times."""

    def __init__(self, failures: int) -> None:
        self.failures, self.calls = failures, list[str]()

    def init(self, **options: Any) -> None:
        self.calls.append("init")
        if self.calls.count("init") <= self.failures:
            raise ray_cluster.RayletEnded("the main process of its node ends while it starts")

    def shutdown(self) -> None:
        self.calls.append("shutdown")


@pytest.fixture
def near_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(ray_cluster, "_starting_here", lambda *_: nullcontext())
    monkeypatch.setenv("RAY_AUTH_TOKEN", "x")


@pytest.mark.usefixtures("near_start")
def test_a_start_whose_node_ends_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = StartingRay(failures=2)
    RayCluster("local", None, None)._start_here(ray, {})
    assert ray.calls == ["init", "shutdown", "init", "shutdown", "init"]
    monkeypatch.setattr(ray_cluster, "START_TIME", 0.0)
    with pytest.raises(WorkerError, match="could not be started here: the main process of its node ends while it"):
        RayCluster("local", None, None)._start_here(StartingRay(failures=2), {})


def test_the_main_process_of_a_node_is_known_by_its_program(tmp_path: Path) -> None:
    words = ["/site/ray/raylet/raylet", "-f", "/dev/null", str(tmp_path)]

    def is_alive() -> bool:
        return any(ray_cluster.RAYLET in command for _, command in ray_cluster._iter_processes(tmp_path))

    with subprocess.Popen(words, executable="/usr/bin/tail") as raylet:
        until = time.monotonic() + 30
        while not is_alive():  # it has the program of this process until it runs its own
            assert time.monotonic() < until
        raylet.kill()
        while is_alive():  # it is not waited for, as by Ray
            assert time.monotonic() < until
