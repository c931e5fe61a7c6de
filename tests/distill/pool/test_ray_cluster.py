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
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from genssd.distill.pool import ray_cluster
from genssd.distill.pool.ray_cluster import RayCluster, check_answers
from genssd.distill.pool.ray_options import Address
from genssd.engine.common.errors import InputError


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
