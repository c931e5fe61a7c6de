"""Joining a Ray cluster that runs already: what is found out before Ray tries, and what its failures mean."""

from __future__ import annotations

import importlib
import os
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from genssd.distill.pool.ray_options import Address
from genssd.engine.common.errors import InputError
from genssd.engine.common.quoting import one_line

PATIENCE = 5.0
"""Seconds within which the head of a cluster must answer."""
HTTP2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + b"\x04" + bytes(5)
"""The first bytes of a client of gRPC, which the head of a cluster speaks: the preface, and an empty SETTINGS frame."""
SETTINGS_FRAME = 4
"""Type of the frame with which a server of HTTP/2 begins: the fourth byte of its answer."""


def check_answers(address: Address, patience: float = PATIENCE) -> None:
    """Raise InputError where nothing answers at an address, or something that is no head of a Ray cluster.

    Ray itself waits for minutes. patience: seconds to wait.
    """
    hint = "start a cluster there with `ray start --head`, or run --ray local"
    try:
        with socket.create_connection((address.host, address.port), patience) as connection:
            connection.settimeout(patience)
            connection.sendall(HTTP2_PREFACE)
            answer = connection.recv(9)
    except socket.gaierror:
        raise InputError(f"ray {address}: there is no host {address.host}") from None
    except TimeoutError:
        raise InputError(f"ray {address}: nothing answers within {patience:g} s; {hint}") from None
    except OSError as error:
        raise InputError(f"ray {address}: nothing answers there ({error.strerror or error}); {hint}") from None
    if len(answer) < 4 or answer[3] != SETTINGS_FRAME:
        raise InputError(f"ray {address}: what answers there is no head of a Ray cluster; {hint}")


@contextmanager
def collect_stderr() -> Iterator[Callable[[], str]]:
    """Keep what Ray's compiled parts print on stderr, a line for every attempt to connect; yield what returns it."""
    with tempfile.TemporaryFile() as file:

        def read() -> str:
            file.seek(0)
            return file.read().decode(errors="replace")

        sys.stderr.flush()
        kept = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield read
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)


def explain(error: Exception, printed: str) -> str:
    """Return why a cluster, whose head answers or is looked for, could not be joined, and what to do.

    printed: what Ray has printed.
    """
    own = error if error.__cause__ is None else error.__cause__
    text = one_line(own)[:300]
    if "AuthToken" in f"{printed}{text}" or "Unauthenticated" in f"{printed}{text}":
        return (
            "the cluster asks for another token than this process has: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or "
            "RAY_AUTH_TOKEN_PATH as they are where `ray start` runs"
        )
    if "ind any running Ray instance" in text:
        return "no cluster is found from here; start one with `ray start --head`, or run --ray local"
    if "possible node ids" in text or "No node info found" in text:
        return (
            "none of the cluster's nodes runs on this machine: run the command on one of them, or let this machine "
            "join with `ray start --address`"
        )
    return (
        f"the cluster cannot be joined: {text}; the command must run on one of its nodes, with the versions of Python "
        "and Ray that they have"
    )


@contextmanager
def keep_loopback(is_kept: bool) -> Iterator[None]:
    """Let Ray, which is imported already, take the loopback address as it is while the block runs, if `is_kept`.

    It would put an outward address in its place, at which a cluster of the loopback address does not listen.
    """
    constants: Any = importlib.import_module("ray._private.ray_constants")
    before = constants.ENABLE_RAY_CLUSTER
    constants.ENABLE_RAY_CLUSTER = before and not is_kept
    try:
        yield
    finally:
        constants.ENABLE_RAY_CLUSTER = before
