"""Configs as commands: what is written is read back to the same config."""

from __future__ import annotations

import dataclasses
import shlex

import pytest
from support.configs import another, changed, config_of

from genssd.configs import CONFIGS
from genssd.distill.rounds.config import DistillConfig
from genssd.distill.runs.command_text import iter_flags, render_command
from genssd.distill.runs.field_kinds import fields_of
from genssd.distill.train.config import TrainConfig
from genssd.engine.common.errors import InputError
from genssd.flags import read_config


@pytest.mark.parametrize(
    "config",
    [
        TrainConfig(model_name_or_path="S", data=("a.jsonl",)),
        TrainConfig(
            model_name_or_path="my student",
            data=("a b.jsonl", "-", "it's.jsonl"),
            system_prompt='two\nlines, "quoted", `ticks` and $HOME',
            chat_template_kwargs=('{"a": 1}', "b=c"),
            bf16=False,
            require_correct=True,
            kd_ratio=0.5,
            learning_rate=3e-7,
            max_steps=3,
            eval_data=("e.jsonl",),
        ),
        DistillConfig(teacher="T", student="S", data="d.jsonl", require_correct=False, rounds=3),
    ],
    ids=["defaults", "everything", "nested"],
)
def test_a_command_is_read_back_to_the_config(config: TrainConfig | DistillConfig) -> None:
    name = next(name for name, config_class in CONFIGS.items() if config_class is type(config))
    program, command, *flags = shlex.split(render_command(name, config))
    assert (program, command) == ("genssd", name)
    assert read_config(name, flags, type(config)) == config


def test_every_field_of_a_training_is_read_back() -> None:
    base = config_of("train", ["d.jsonl"])
    tried = set()
    for setting in fields_of(base):
        config = changed(base, setting.name, another(setting.value))
        _, _, *flags = shlex.split(render_command("train", config))
        try:
            read = read_config("train", flags, TrainConfig)
        except InputError:
            continue  # a value of another type, or one that another field must allow
        assert read == config, setting.name
        tried.add(setting.name)
    assert {"fsdp", "seed", "weight_decay", "rollout.max_tokens", "system_prompt", "lora_target_modules"} <= tried


def test_defaults_and_named_fields_are_left_out() -> None:
    config = TrainConfig(model_name_or_path="S", data=("d",), push_to_hub="me/model", seed=3)
    assert {flag.name for flag in iter_flags(config)} == {"model_name_or_path", "data", "push_to_hub", "seed"}
    plain = dataclasses.replace(config, push_to_hub=None)
    assert render_command("train", config, without=("push_to_hub",)) == render_command("train", plain)
