"""What the options of Ray mean, and what is refused of them; Ray itself is not needed."""

from __future__ import annotations

from typing import Any

import pytest

from genssd.distill.pool.ray_options import (
    ActorRange,
    Address,
    Node,
    check_ray_options,
    choose_team,
    parse_actors,
    parse_address,
)
from genssd.engine.common.errors import InputError


def test_addresses() -> None:
    assert parse_address("local") == "local"
    assert parse_address(" auto ") == "auto"
    assert parse_address("head.example:6379") == Address("head.example", 6379)
    assert parse_address("[2001:db8::7]:6379") == Address("2001:db8::7", 6379)
    assert str(Address("2001:db8::7", 6379)) == "[2001:db8::7]:6379"
    assert str(Address("10.0.0.1", 6379)) == "10.0.0.1:6379"


@pytest.mark.parametrize(
    "text", ["", "head", "head:0", "head:99999", "http://head:6379", "a b:1", ":6379", "1.2.3.4:x"]
)
def test_no_addresses(text: str) -> None:
    with pytest.raises(InputError, match="ray must be local, auto, or the HOST:PORT that `ray start --head` prints"):
        parse_address(text)


def test_ray_client_is_refused_with_the_way_to_go() -> None:
    with pytest.raises(
        InputError, match=r"ray ray://head:10001 is the address of Ray Client.*start the command on a nod"
    ):
        parse_address("ray://head:10001")


def test_numbers_of_actors() -> None:
    assert parse_actors("4") == ActorRange(4, 4)
    assert parse_actors("2:16") == ActorRange(2, 16)
    for text in ("0", "3:2", "1:2:3", "many", "-1", "1:", "10001"):
        with pytest.raises(InputError, match="ray_actors must be"):
            parse_actors(text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cpus": 0}, "ray_cpus must be at least 1, not 0"),
        ({"actors": "x"}, "ray_actors must be a number such as 4, or MIN:MAX such as 2:16, not 'x'"),
        ({"device": "cuda:1"}, "device cuda:1: Ray gives each actor a GPU of its node; give device cuda or cpu"),
        ({"ray": "nowhere"}, "ray must be local"),
    ],
)
def test_options_that_no_cluster_could_follow(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_ray_options(**{"ray": "local", "actors": None, "cpus": None, "device": None, **options})


def test_every_gpu_has_an_actor() -> None:
    nodes = [Node(address="a", cpus=8, gpus=0), Node(address="b", cpus=32, gpus=4), Node(address="c", cpus=16, gpus=4)]
    team = choose_team(nodes, None, None, None, None)
    assert (team.range, team.gpus, team.cpus, team.threads) == (ActorRange(8, 8), 1, 1, 4)
    assert choose_team(nodes, None, None, "cpu", None).gpus == 0
    assert choose_team(nodes, None, 3, "cuda", 5).range == ActorRange(5, 5), "no more actors than prompts"
    assert choose_team(nodes, ActorRange(2, 30), 3, None, None).threads == 3


def test_nodes_without_gpus_have_an_actor_each_or_are_divided() -> None:
    nodes = [Node(address="a", cpus=8, gpus=0), Node(address="b", cpus=6, gpus=0), Node(address="head", cpus=0, gpus=0)]
    whole = choose_team(nodes, None, None, None, None)
    assert (whole.range, whole.cpus, whole.threads, whole.gpus) == (ActorRange(2, 2), 6, 6, 0)
    assert choose_team(nodes, ActorRange(7, 7), None, None, None).cpus == 2
    assert choose_team(nodes, ActorRange(40, 40), None, None, None).cpus == 1
    assert choose_team(nodes, None, 4, None, None).range == ActorRange(3, 3)
    assert choose_team(nodes, ActorRange(3, 9), None, None, 1).range == ActorRange(1, 1)


def test_a_cluster_that_has_nothing_yet_is_asked_for_nodes() -> None:
    empty = [Node(address="head", cpus=0, gpus=0)]
    with pytest.raises(InputError, match=r"the cluster has no GPUs now: give ray_actors, so that Ray's autoscaler"):
        choose_team(empty, None, None, "cuda", None)
    with pytest.raises(InputError, match="the cluster has no CPUs now"):
        choose_team([], None, None, None, None)
    team = choose_team(empty, ActorRange(1, 8), None, "cuda", None)
    assert (team.range, team.gpus, team.cpus) == (ActorRange(1, 8), 1, 1)
