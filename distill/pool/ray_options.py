"""What the options of Ray mean: an address, the number of actors, and what each is given of its node. Without Ray."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from genssd.engine.common.errors import InputError

LOCAL, AUTO = "local", "auto"
MAX_ACTORS = 10_000
_HOST_AND_PORT = re.compile(r"\[?([\w.:-]+?)\]?:(\d{1,5})")


@dataclass(frozen=True, slots=True)
class Address:
    """The head of a Ray cluster."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class ActorRange:
    """How many actors a command has: never fewer than `least`, and up to `most` where the cluster has room."""

    least: int
    most: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """What a node of a cluster gives to Ray."""

    address: str
    cpus: int
    gpus: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Team:
    """The actors of a command."""

    range: ActorRange
    cpus: int
    """CPUs that each reserves."""
    gpus: int
    """GPUs that each reserves, 0 or 1."""
    threads: int
    """CPU threads that each computes with."""

    def describe_each(self) -> str:
        """Return what each actor is given, in words."""
        cpus = f"{self.cpus} CPU{'s' if self.cpus > 1 else ''}"
        return f"1 GPU and {cpus}" if self.gpus else cpus


def parse_address(text: str) -> Address | Literal["local", "auto"]:
    """Return what `ray` names. Raises InputError on what is no address of a cluster."""
    text = text.strip()
    if text == LOCAL:
        return "local"
    if text == AUTO:
        return "auto"
    if text.startswith("ray://"):
        raise InputError(
            f"ray {text} is the address of Ray Client, whose driver is outside of the cluster: start the command on a "
            "node of the cluster (ssh, or ray job submit) with --ray auto, or with --ray HOST:PORT"
        )
    match = _HOST_AND_PORT.fullmatch(text)
    if match is None or not 0 < int(match[2]) < 1 << 16:
        raise InputError(
            f"ray must be local, auto, or the HOST:PORT that `ray start --head` prints (its port is 6379 unless "
            f"chosen), not {text!r}"
        )
    return Address(match[1], int(match[2]))


def parse_actors(text: str) -> ActorRange:
    """Return the numbers of `ray_actors`, MIN or MIN:MAX. Raises InputError on anything else."""
    parts = text.split(":")
    if len(parts) > 2 or not all(re.fullmatch(r"\s*\d{1,6}\s*", part) for part in parts):
        raise InputError(f"ray_actors must be a number such as 4, or MIN:MAX such as 2:16, not {text!r}")
    least, most = int(parts[0]), int(parts[-1])
    if not 1 <= least <= most <= MAX_ACTORS:
        raise InputError(f"ray_actors must be MIN:MAX with 1 <= MIN <= MAX <= {MAX_ACTORS}, not {text!r}")
    return ActorRange(least, most)


def check_ray_options(ray: str | None, actors: str | None, cpus: int | None, device: str | None) -> None:
    """Raise InputError on options of Ray that no cluster could follow. Nothing is checked where `ray` is None."""
    if ray is None:
        return
    parse_address(ray)
    if actors is not None:
        parse_actors(actors)
    if cpus is not None and cpus < 1:
        raise InputError(f"ray_cpus must be at least 1, not {cpus}")
    if device not in (None, "cpu", "cuda"):
        raise InputError(
            f"device {device}: Ray gives each actor a GPU of its node; give device cuda or cpu, or leave it out"
        )


def choose_team(
    nodes: Sequence[Node], actors: ActorRange | None, cpus: int | None, device: str | None, items: int | None
) -> Team:
    """Return how many actors a command has, and what each is given.

    nodes: those that the cluster has now. cpus: CPUs of each; None: with GPUs 1, without them those of a whole node, or
    fewer where the smallest number of actors would not fit. device: None for a GPU where a node has one. items: number
    of things to do, where it is known: more actors than that have nothing to do. Raises InputError where the cluster
    has none of what is needed, and nothing says how many actors it is to wait for.
    """
    with_gpus = [node for node in nodes if node.gpus]
    use_gpus = device == "cuda" or (device is None and bool(with_gpus))
    useful = [node for node in (with_gpus if use_gpus else nodes) if node.cpus]
    if actors is None:
        if not useful:
            raise InputError(
                f"the cluster has no {'GPUs' if use_gpus else 'CPUs'} now: give ray_actors, so that Ray's autoscaler "
                "is asked for nodes, or start nodes (ray start --address)"
            )
        number = sum(node.gpus for node in useful) if use_gpus else _count_places(useful, cpus)
        actors = ActorRange(number, number)
    if use_gpus:
        per_gpu = min((node.cpus // node.gpus for node in useful), default=1)
        reserved, threads = cpus or 1, cpus or max(1, per_gpu)
    else:
        smallest = min((node.cpus for node in useful), default=1)
        together = sum(node.cpus for node in useful)
        reserved = threads = cpus or max(1, min(smallest, together // actors.least))
    most = actors.most if items is None else min(actors.most, max(1, items))
    return Team(range=ActorRange(min(actors.least, most), most), cpus=reserved, gpus=int(use_gpus), threads=threads)


def _count_places(nodes: Sequence[Node], cpus: int | None) -> int:
    """Return how many actors fit on nodes without GPUs: one for each node where `cpus` is None."""
    if cpus is None:
        return len(nodes)
    return max(1, sum(node.cpus // cpus for node in nodes))
