"""Which arms a task has, and which a run takes. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final

from genssd.distill.reproduce.arm_table import CORE, LOSSES, ORACLE, POST_HOC, VARIANTS
from genssd.distill.reproduce.arms import Arm

SMALL_WORLDS: Final[Mapping[str, str]] = {
    "uniform": "styles equally frequent",
    "one-style": "style drawn once per solution",
    "cold-other": "another cold start",
    "cold-long": "a longer cold start",
}
"""Changed worlds of the small pair, and what is other in each."""
APART_WORLDS: Final[Mapping[str, str]] = {"early": "a cold start that was stopped earlier"}
"""Changed worlds of the task `apart`, and what is other in each."""
WORLD_ARMS: Final = ("cold-start", "standard", "gen-ssd", "gen-ssd-random", "grape")
"""Arms of every changed world of the small pair."""

APART_ARMS: Final = (
    "cold-start", "standard", "gen-ssd", "gen-ssd-random", "random-of-n", "grape", "standard-4x", "longest", "shortest",
    "gen-ssd-longest", "gen-ssd-shortest", "gen-ssd-teacher", "teacher-logprob", "oracle", "teacher",
)  # fmt: skip
"""Arms of the tasks in which style, length and the teacher's liking are taken apart."""
EARLY_ARMS: Final = (
    "cold-start", "standard", "gen-ssd", "gen-ssd-random", "gen-ssd-longest", "gen-ssd-shortest", "gen-ssd-teacher",
    "oracle",
)  # fmt: skip
"""Arms of the world `early` of the task `apart`."""
APART_CONTROLS: Final[Mapping[str, Sequence[str]]] = {
    "gen-ssd": ("gen-ssd-shortest", "teacher-logprob"),
    "grape": ("shortest", "teacher-logprob"),
}
"""Further controls in these tasks: every other signal with the same search, and with the same pool."""


def list_arms(task: str) -> Sequence[Arm]:
    """Return the arms of a task, in the order in which they run."""
    if task == "words":
        return (*CORE, *POST_HOC, *LOSSES, *VARIANTS)
    if task in ("apart", "apart-short"):
        return _list_apart(task)
    by_name = {arm.name: arm for arm in CORE}
    worlds = {
        world: [_repeat(by_name[name], world, text, WORLD_ARMS) for name in WORLD_ARMS]
        for world, text in SMALL_WORLDS.items()
    }
    styles = [*worlds["one-style"], *worlds["uniform"]]
    starts = [*worlds["cold-other"], *worlds["cold-long"]]
    return (*CORE, *ORACLE, *POST_HOC, *styles, *LOSSES, *starts, *VARIANTS)


def _list_apart(task: str) -> Sequence[Arm]:
    """Return the arms of the tasks in which style, length and the teacher's liking are taken apart."""
    by_name = {
        arm.name: replace(arm, controls=(*arm.controls, *APART_CONTROLS.get(arm.name, ())))
        for arm in (*CORE, *ORACLE, *POST_HOC)
    }
    arms = [by_name[name] for name in APART_ARMS]
    if task == "apart":
        for world, text in APART_WORLDS.items():
            arms += [_repeat(by_name[name], world, text, EARLY_ARMS) for name in EARLY_ARMS]
    return tuple(arms)


def _repeat(arm: Arm, world: str, text: str, names: Sequence[str]) -> Arm:
    """Return an arm as it runs in a changed world, where it is compared with that world's own controls.

    text: what is other in the world. names: the arms that run there.
    """
    return replace(
        arm,
        name=f"{world}/{arm.name}",
        world=world,
        controls=tuple(f"{world}/{control}" for control in arm.controls if control in names),
        paper=f"{arm.paper}; {text}",
    )


def choose_arms(task: str, names: Sequence[str], *, controls: bool = True) -> Sequence[Arm]:
    """Return the arms of these names, in the order in which they run; all arms of the task for no names.

    controls: whether to return the arms that they are compared with as well.
    """
    arms = list_arms(task)
    if not names:
        return arms
    by_name = {arm.name: arm for arm in arms}
    wanted: set[str] = set()
    left = list(names)
    while left:
        if (name := left.pop()) not in wanted:
            wanted.add(name)
            left += by_name[name].controls if controls else ()
    return tuple(arm for arm in arms if arm.name in wanted)
