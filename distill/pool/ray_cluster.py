"""The Ray cluster of a command: reached or started when it is first needed, kept quiet, and left or ended afterwards.

Ray is an optional package, which is imported here alone, when a command asks for it.
"""

from __future__ import annotations

import importlib
import logging
import os
import re
import secrets
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from genssd.distill.pool.ray_joining import check_answers, collect_stderr, explain, keep_loopback
from genssd.distill.pool.ray_options import Address, Node, parse_actors, parse_address
from genssd.engine.common.errors import InputError, WorkerError
from genssd.engine.common.quoting import one_line
from genssd.engine.host.machine import available_cores

EXTRA = "pip install 'genssd[ray]'"
REMOVAL_TIME = 5.0
"""Seconds for which files are removed that processes which are ending still write."""
START_TIME = 300
"""Seconds that the processes of a cluster have to start: a busy machine may need more than the half minute of Ray's."""
RAYLET = b"/raylet/raylet"
"""End of the name of the program that is a node's main process."""
START_SETTINGS = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_prestart_worker_first_driver": "0",
    "RAY_gcs_server_port_wait_time_s": f"{START_TIME}",
    "RAY_raylet_start_wait_time_s": f"{START_TIME}",
    "RAY_agent_register_timeout_ms": f"{START_TIME}000",
    "RAY_worker_register_timeout_seconds": f"{START_TIME}",
    "RAY_actor_graceful_shutdown_timeout_ms": "1000",
    "RAY_worker_niceness": "0",
}
"""Settings of the environment with which a cluster is started here. The first one keeps it at the loopback address, for
which Ray would otherwise put one that other machines reach; the second one starts no workers that nothing needs yet;
the last two end actors whose command was killed, and let actors have the priority of the command, which on a busy
machine the niceness of 15 that Ray gives them would starve; the others are its patience with its own processes."""
OBJECT_STORE = 128 << 20
"""Bytes of shared memory of a cluster that is started here: prompts on their way out, rows on their way back. What does
not fit goes through files."""
TEMPORARY = "genssd-ray-"
"""Beginning of the directory of a cluster that is started here, before the number of the process that started it."""
LONGEST_DIRECTORY = 107 - len(
    "/genssd-ray-1234567-abcdefgh/session_2026-01-01_00-00-00_000000_1234567/sockets/plasma_store"
)
"""Number of characters in the directory above that one: a socket's name has 107 bytes at most."""
JOIN_TIME = 15
"""Seconds that the head of a cluster which runs already has for each answer, instead of Ray's minute."""
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
}
"""Settings of the environment with which Ray reports no usage and prints nothing of its own."""
LOOPBACK = "127.0.0.1"
"""Address of a cluster that is started here, at which no other machine reaches it."""
AUTH = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE")
"""Variables of the environment with the token that processes of a cluster show each other, its file, and whether they
do. Where none is set, Ray would leave a token in the home directory. A process keeps the first one that it has read."""


def import_ray(**settings: str) -> Any:
    """Return the package Ray. Raises InputError where it is not installed.

    settings: variables of the environment that Ray reads when it is imported, besides those that keep it quiet.
    """
    for name, value in (QUIET | settings).items():
        os.environ.setdefault(name, value)
    try:
        return importlib.import_module("ray")
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise InputError(f"ray needs a package that is not installed here: {EXTRA}") from None


class RayCluster:
    """The cluster of a command. Nothing is started or reached before `connect`."""

    def __init__(self, ray: str, actors: str | None, cpus: int | None) -> None:
        """Raises InputError on options that cannot be read. The arguments are those of `PoolOptions`."""
        self.address = parse_address(ray)
        self.actors = None if actors is None else parse_actors(actors)
        self.cpus = cpus
        self._ray: Any = None
        self._is_ours = False
        self._temporary: Path | None = None

    def connect(self) -> Any:
        """Return the package Ray, connected with the cluster.

        A program that is connected already stays so. Raises InputError where Ray is not installed, or the address does
        not answer.
        """
        if self._ray is not None:
            return self._ray
        patience = START_TIME if self.address == "local" else JOIN_TIME
        ray = import_ray(RAY_gcs_server_request_timeout_seconds=f"{patience}")
        _silence()
        if not ray.is_initialized():
            self._is_ours = True  # from now on, also where a signal ends the next line
            with _own_signal_handlers():
                self._initialise(ray)
        self._ray = ray
        return ray

    def list_nodes(self) -> list[Node]:
        """Return what the nodes of the cluster give to Ray now."""
        nodes = [node for node in self.connect().nodes() if node["Alive"]]
        return [
            Node(
                address=node["NodeManagerAddress"],
                cpus=int(node["Resources"].get("CPU", 0)),
                gpus=int(node["Resources"].get("GPU", 0)),
            )
            for node in nodes
        ]

    def close(self) -> None:
        """Leave the cluster, or end it where it was started here, and remove its files."""
        if self._is_ours:
            with suppress(Exception):  # what ended the command is more important than what Ray says of it
                import_ray().shutdown()
        if self._temporary is not None:
            _remove(self._temporary)
        self._ray, self._is_ours, self._temporary = None, False, None

    def _initialise(self, ray: Any) -> None:
        quiet = {"log_to_driver": False, "logging_level": logging.CRITICAL, "configure_logging": False}
        if self.address == "local":
            self._start_here(ray, quiet)
            return
        named = self.address if isinstance(self.address, Address) else None
        if named is not None:
            check_answers(named)
        with collect_stderr() as read_printed, keep_loopback(named is not None and named.is_loopback):
            try:
                ray.init(address=str(self.address), **quiet)
                return
            except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
                reason = explain(error, read_printed())
        raise InputError(f"ray {self.address}: {reason}")

    def _start_here(self, ray: Any, quiet: Mapping[str, Any]) -> None:
        """Start a cluster of this machine alone. Its files are in a directory of its own, its token is in no file."""
        directory = _choose_directory()
        _remove_leftovers(directory)
        most = 1 if self.actors is None else self.actors.most
        self._temporary = Path(tempfile.mkdtemp(prefix=f"{TEMPORARY}{os.getpid()}-", dir=directory))
        if not {*AUTH} & os.environ.keys():
            os.environ[AUTH[0]] = secrets.token_hex(32)
        options = {
            "address": "local",
            "num_cpus": max(available_cores(), most * (self.cpus or 1)),
            "include_dashboard": False,
            "object_store_memory": OBJECT_STORE,
            "_node_ip_address": LOOPBACK,
            "_temp_dir": str(self._temporary),
        }
        end = time.monotonic() + START_TIME
        while True:
            try:
                with _starting_here(self._temporary, end):
                    ray.init(**options, **quiet)
                return
            except Exception as error:  # Ray has no class of its own for this
                ray.shutdown()
                _end_processes(self._temporary)
                if isinstance(error, RayletEnded) and time.monotonic() < end:
                    continue
                raise WorkerError(
                    f"Ray could not be started here: {one_line(error)[:300]}; is the machine too busy, or its memory "
                    "full?"
                ) from None


class RayletEnded(Exception):
    """The main process of a node has ended while it started. It gives one of its agents 15 s, whatever is set."""


@contextmanager
def _own_signal_handlers() -> Iterator[None]:
    """Put the handlers of signals back, which Ray replaces when it connects."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _starting_here(directory: Path, end: float) -> Iterator[None]:
    """Give Ray, which is imported already, and the processes that it starts, the settings of a start on this machine.

    For one wait Ray has no setting: half a minute from the start of its raylet until the head knows it is a number in
    the code of its `Node`, and RAY_raylet_start_wait_time_s is for the workers of a raylet alone. Its processes for an
    autoscaler and for lines of logs are not started: they would take time from those that are waited for.

    directory: that of the cluster. end: time of the monotonic clock until which the start may take. In the block,
    `ray.init` raises RayletEnded where the raylet has ended.
    """
    services: Any = importlib.import_module("ray._private.services")
    node: Any = importlib.import_module("ray._private.node").Node
    get_node, starts = services.get_node, (node.start_monitor, node.start_log_monitor)
    before = {name: os.environ.get(name) for name in START_SETTINGS}

    def await_node(address: str, node_id: str) -> Any:
        state = importlib.import_module("ray._private.state").GlobalState()
        options = importlib.import_module("ray._raylet").GcsClientOptions
        state._initialize_global_state(
            options.create(address, None, allow_cluster_id_nil=True, fetch_cluster_id_if_nil=False)
        )
        while not any(found["NodeID"] == node_id for found in state.node_table()):  # get_node itself waits for minutes
            if not any(RAYLET in command for _, command in _iter_processes(directory)):
                raise RayletEnded("the main process of its node ends while it starts")
            if time.monotonic() > end:
                raise RuntimeError("the node is not known to the head yet")
            time.sleep(0.1)
        return get_node(address, node_id)

    services.get_node = await_node
    node.start_monitor = node.start_log_monitor = lambda _: None
    for name, value in START_SETTINGS.items():
        os.environ.setdefault(name, value)
    try:
        with keep_loopback(True):
            yield
    finally:
        services.get_node = get_node
        node.start_monitor, node.start_log_monitor = starts
        for name, was in before.items():
            if was is None:
                os.environ.pop(name, None)


def _silence() -> None:
    """Turn off what Ray would print of workers that end, which the pool reports in its own words."""
    worker = sys.modules.get("ray._private.worker")
    if hasattr(worker, "print_to_stdstream"):
        worker.print_to_stdstream = lambda *_, **__: None  # type: ignore[union-attr]
    logging.getLogger("ray").setLevel(logging.CRITICAL)


def _choose_directory() -> Path:
    """Return the directory for the files of a cluster: TMPDIR, or /tmp where names of sockets would become too long."""
    chosen = tempfile.gettempdir()
    return Path(chosen if len(chosen) <= LONGEST_DIRECTORY else "/tmp")


def _remove(path: Path) -> None:
    """Remove a directory in which processes that are ending may still write."""
    until = time.monotonic() + REMOVAL_TIME
    while path.exists() and time.monotonic() < until:
        shutil.rmtree(path, ignore_errors=True)
        time.sleep(0.02)


def _iter_processes(directory: Path) -> Iterator[tuple[int, bytes]]:
    """Yield number and command of the processes of this one that work in a directory and have not ended."""
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended meanwhile
            parent = int((path / "stat").read_text().rsplit(")", 1)[1].split()[1])
            if parent == os.getpid() and str(directory).encode() in (command := (path / "cmdline").read_bytes()):
                yield int(path.name), command


def _end_processes(directory: Path) -> None:
    """End the processes of this one that work in a directory: Ray leaves those of a start that has failed."""
    for pid, _ in _iter_processes(directory):
        with suppress(OSError):
            os.kill(pid, signal.SIGKILL)


def _remove_leftovers(directory: Path) -> None:
    """Remove the files of clusters whose process was killed before it could remove them."""
    for path in directory.glob(f"{TEMPORARY}*"):
        match = re.fullmatch(rf"{TEMPORARY}(\d+)-\w+", path.name)
        if match is not None and not Path(f"/proc/{match[1]}").exists():
            shutil.rmtree(path, ignore_errors=True)
