"""The body of a Ray actor: an engine in a thread, and a mailbox that the process of the command empties and fills."""

from __future__ import annotations

import dataclasses
import os
import pickle
import threading
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from genssd.distill.pool.mailbox import Letter, Mailbox
from genssd.distill.pool.messages import Begin, Placed, Refused
from genssd.distill.pool.ray_cluster import import_ray
from genssd.distill.pool.worker import EngineRecipe, forward_log, serve
from genssd.engine.common.errors import InputError
from genssd.engine.engine import Engine
from genssd.engine.host.machine import available_memory

PAUSE = 2.0
"""Seconds after which a call that waits for letters returns without any."""


class EngineActor:
    """An engine on some node of a cluster. Its calls may be made in parallel, and again."""

    def __init__(self, recipe: bytes, cpus: int, package_version: str) -> None:
        """Begin to load the engine.

        recipe: pickle of an `EngineRecipe`. cpus: number of the node's CPUs that the actor has reserved, with which a
        part of the node's memory comes on a CPU. package_version: version of genssd in the process of the command.
        """
        node = import_ray().util.get_node_ip_address()
        self._mail = Mailbox()
        self._work = b""
        place = f"node {node}: "
        own = version("genssd")
        self._mail.post(Placed(node=node, pid=os.getpid()))
        if own != package_version:
            text = f"{place}genssd {own} is installed here, and {package_version} where the command runs; install one"
            self._mail.post(Refused(InputError, text))
            return
        inbox = Inbox(self)
        forward_log(inbox.post)
        threading.Thread(
            target=serve, args=(inbox, lambda: _open(pickle.loads(recipe), cpus), place), daemon=True
        ).start()

    def exchange(
        self, confirmed: int, letters: Sequence[Letter], work: bytes | None = None
    ) -> tuple[int, list[Letter]]:
        """Take letters of the command and return those for it; both ends say what they have.

        It waits a while where there are none, unless another call comes. confirmed: number of the last letter that the
        command has. work: pickle of the work that the letters begin, if they begin one. Returns the number of the last
        letter that is here as well.
        """
        if work is not None and letters[-1][0] > self._mail.num_received:
            self._work = work
        self._mail.take_in(confirmed, letters)
        posted = self._mail.await_posted(PAUSE)
        return self._mail.num_received, posted


class Inbox:
    """The `Channel` of the engine's thread: the mailbox, in which the pickle of a work is put into its `Begin`."""

    def __init__(self, actor: EngineActor) -> None:
        self._actor = actor

    def post(self, message: object) -> None:
        """Keep a message until the command has it."""
        self._actor._mail.post(message)

    def receive(self) -> object:
        """Wait for a message and return it."""
        message = self._actor._mail.receive()
        return Begin(self._actor._work) if isinstance(message, Begin) else message

    def poll(self, timeout: float) -> bool:
        """Return whether a message has arrived, after waiting for one for at most `timeout` seconds."""
        return self._actor._mail.poll(timeout)


def _open(recipe: EngineRecipe, cpus: int) -> Engine:
    """Load the models on this node. Raises the errors of `Engine.from_pretrained`."""
    if recipe.arguments["device"] == "cpu":
        resources = _find_resources()
        fraction = min(1.0, cpus / max(1.0, resources.get("CPU", 1.0)))
        memory = int(min(available_memory(), fraction * resources.get("memory", available_memory())))
        recipe = dataclasses.replace(recipe, memory=memory)
    return recipe.open()


def _find_resources() -> dict[str, float]:
    """Return what the node of this actor gives to Ray."""
    ray: Any = import_ray()
    own = ray.get_runtime_context().get_node_id()
    return next((node["Resources"] for node in ray.nodes() if node["NodeID"] == own), {})
