"""The table of arms: what it names exists, and every comparison has its other side."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest

from genssd.distill.reproduce.arm_lists import SMALL_WORLDS, choose_arms, list_arms
from genssd.distill.reproduce.arms import SHIPPED, STAGES
from genssd.distill.reproduce.config import ReproduceConfig
from genssd.distill.reproduce.results import compute_results
from genssd.distill.reproduce.run import list_work
from genssd.distill.reproduce.sources import Picked, Searched
from genssd.distill.select.config import SelectConfig
from genssd.distill.train.config import TrainConfig
from genssd.engine.common.errors import InputError
from genssd.engine.criteria.criterion import not_in_search
from genssd.engine.criteria.criterion_names import resolve


@pytest.mark.parametrize("task", ["small", "words"])
def test_every_arm_is_complete(task: str) -> None:
    arms = list_arms(task)
    names = [arm.name for arm in arms]
    assert not [name for name, count in Counter(names).items() if count > 1]
    assert set(names) >= frozenset.union(*STAGES)
    fields_of_select = {field.name for field in dataclasses.fields(SelectConfig)}
    fields_of_training = {field.name for field in dataclasses.fields(TrainConfig)}
    for arm in arms:
        assert set(arm.controls) <= set(names) - {arm.name}
        assert arm.train.keys() <= fields_of_training
        assert arm.world == SHIPPED or arm.world in SMALL_WORLDS
        assert arm.command.startswith(("generate", "select", "evaluate", "distill", "diagnose"))
        if isinstance(arm.source, Searched):
            assert arm.source.options.keys() <= fields_of_select
            assert not_in_search(resolve(arm.source.criterion)) is None
        elif isinstance(arm.source, Picked):
            resolve(arm.source.criterion)


def test_only_arms_of_other_tokens_say_so() -> None:
    """Arms are compared at equal training tokens; the exceptions are written out."""
    others = {arm.name for arm in list_arms("small") if arm.tokens != 1.0}
    assert others == {"positive-nodes", "all-nodes"}


def test_arms_that_are_asked_for_bring_their_controls() -> None:
    chosen = [arm.name for arm in choose_arms("small", ["rsr"])]
    assert chosen == ["standard", "random-of-n", "standard-4x", "rsr"]
    assert choose_arms("small", ()) == list_arms("small")


def test_the_arms_that_decide_run_with_all_seeds_first() -> None:
    work = [(seed, arm.name) for seed, arm in list_work(choose_arms("small", ["rsr", "lalp"]), 2)]
    assert work[:6] == [(s, name) for s in (0, 1) for name in ("standard", "random-of-n", "standard-4x")]
    assert work[6:] == [(0, "rsr"), (0, "lalp"), (1, "rsr"), (1, "lalp")]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"arms": ("gen-sd",)}, r"small has no arm 'gen-sd'.*did you mean 'gen-ssd'"),
        ({"seeds": 0}, "seeds must be at least 1, not 0"),
        ({"candidates": 1}, "candidates must be at least 2"),
        ({"learning_rate": 0.0}, "learning_rate must be positive"),
        ({"task": "words"}, "give --model and --data"),
    ],
)
def test_bad_options_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ReproduceConfig(**{"task": "small", **fields})  # type: ignore[arg-type]


def test_commands_are_written_as_a_user_types_them() -> None:
    commands = {arm.name: arm.command for arm in list_arms("small")}
    assert commands["gen-ssd-correct"] == "select --candidates N --criterion ppl + train --require-correct"
    assert commands["morsd"] == (
        "generate --n N + score --criteria rationale_difficulty --pick.keep 4 --pick.correct --pick.best-share 0.3 "
        "--pick.similarity 0.8 + train"
    )
    assert commands["molsaki"] == "generate + train --key-attention.weight 1.0"
    assert commands["gen-ssd-refreshed"] == "distill --rounds 3"


def test_families_of_comparisons_do_not_grow_into_each_other() -> None:
    """The p-values of the arms that decide are the same however many other arms are finished."""
    rng = random.Random(0)
    facts = dict.fromkeys(("teacher_tokens", "student_tokens", "train_tokens", "rows", "seconds", "mean_tokens"), 1)

    def make_rows(names: Sequence[str]) -> list[dict[str, Any]]:
        return [
            {**facts, "arm": name, "seed": seed, "right": None, "styles": {}, "correct": answers[name][seed]}
            for name in names
            for seed in range(3)
        ]

    names = [arm.name for arm in list_arms("small")]
    answers = {name: [[rng.random() < 0.3 for _ in range(50)] for _ in range(3)] for name in names}
    first = [name for name in names if name in frozenset.union(*STAGES)]
    alone, full = (compute_results(list_arms("small"), make_rows(some)) for some in (first, names))
    assert alone.main == full.main[: len(first) - 1]
    assert alone.others == full.others[: len(alone.others)]
    assert len(full.main) == len(names) - 5  # the standard arms of the five worlds have no control
