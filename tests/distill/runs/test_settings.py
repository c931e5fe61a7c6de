"""Every field of every config counts for the result of a run, unless its declaration says that it does not."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path
from typing import Any

import pytest
from support.configs import MODELS, another, changed, config_of

from genssd.configs import CONFIGS
from genssd.distill.demo.config import DemoConfig
from genssd.distill.runs.field_kinds import Kind, expand_home, fields_of
from genssd.distill.runs.settings import check_same_settings, settings_of
from genssd.engine.common.errors import InputError

ENGINE = {"device", "memory_utilization", "memory_bytes", "max_num_seqs", "deterministic", "threads"}
POOL = ENGINE | {"processes", "devices", "ray", "ray_actors", "ray_cpus"}
RUN = {"output_dir", "resume", "overwrite", "data", "limit", "offset", "shard"}
FOLLOWED = {"report_to", "logging_steps"}
NOT_COUNTED = {
    "select": POOL | RUN | FOLLOWED | {"total_budget", "server", "peek"},
    "generate": POOL | RUN | FOLLOWED | {"server"},
    "score": POOL | {"output_dir", "resume", "overwrite", "pick", "equal_length"},
    "reselect": ENGINE | {"output_dir"},
    "export": {"output_dir"},
    "prefix": POOL | {"output_dir", "resume", "overwrite"},
    "leaf": {"device", "devices", "processes", "output_dir", "resume", "overwrite", "threads"},
    "evaluate": POOL | RUN,
    "diagnose": POOL
    | {"output_dir", "resume", "overwrite", "data", "limit"}
    | {"losses", "beta", "alpha", "page_questions", "node_weights", "weights_loss"},  # applied to the finished journal
    "reproduce": {"arms", "controls", "seeds", "output_dir", "resume", "table", "threads"},
    "train": {"device", "output_dir", "resume_from_checkpoint", "overwrite", "data", "gradient_checkpointing"}
    | {"report_to", "logging_steps", "save_steps", "save_total_limit", "rollout.memory_bytes"}
    | {"push_to_hub"}
    | {"allow_eval_overlap"},  # a guard, which changes no result
    "distill": {"output_dir", "resume", "overwrite", "rounds", "allow_eval_overlap", "threads", "processes", "devices"}
    | {"push_to_hub"}
    | {f"select.{name}" for name in POOL | {"total_budget", "server"}}
    | {"train.device", "train.gradient_checkpointing", "train.rollout.memory_bytes", "train.report_to"}
    | {"train.logging_steps", "train.save_steps", "train.save_total_limit"},
}
"""Written out, so that a field stops to count by decision alone. A new field counts without a line here."""

BY_CONTENT = {
    "select": {"teacher", "student"},
    "generate": {"teacher", "student"},
    "score": {"student", "teacher"},
    "reselect": {"student"},
    "export": {"student"},
    "prefix": {"student"},
    "leaf": {"teacher", "student"},
    "evaluate": {"model"},
    "diagnose": {"teacher", "student"},
    "reproduce": {"model"},
    "train": {"model_name_or_path", "teacher_model_name_or_path", "eval_data"},
    "distill": {"teacher", "student", "data", "eval_data", "train.teacher_model_name_or_path", "train.eval_data"},
}


@pytest.fixture
def data(tmp_path: Path) -> list[str]:
    """Two files with different content."""
    paths = [tmp_path / "one.jsonl", tmp_path / "two.jsonl"]
    for path in paths:
        path.write_text(f'{{"question": "{path.name}"}}\n')
    return [str(path) for path in paths]


@pytest.mark.parametrize("command", sorted(NOT_COUNTED))
def test_every_field_counts_unless_it_is_declared(command: str, data: list[str]) -> None:
    config = config_of(command, data)
    settings = settings_of(config)
    not_counted, by_content = set(), set()
    for setting in fields_of(config):
        if setting.kind in (Kind.OPERATIONAL, Kind.RECOMPUTED):
            not_counted.add(setting.name)
            assert setting.name not in settings
            assert settings_of(changed(config, setting.name, another(setting.value))) == settings
        elif setting.kind is not None:
            by_content.add(setting.name)
        else:
            other = settings_of(changed(config, setting.name, another(setting.value)))
            with pytest.raises(InputError, match=f"begun with {setting.name}="):
                check_same_settings(settings, other, "runs/x was begun")
    assert not_counted == NOT_COUNTED[command]
    assert by_content == BY_CONTENT[command]


def test_every_command_that_keeps_results_is_looked_at() -> None:
    assert set(NOT_COUNTED) == set(BY_CONTENT) == set(CONFIGS) - {"demo", "report", "tune", "doctor", "env"}


@pytest.mark.parametrize("command", sorted(BY_CONTENT))
def test_models_and_files_count_by_their_content(command: str, data: list[str], tmp_path: Path) -> None:
    config = config_of(command, data)
    for name in BY_CONTENT[command]:
        choices = data if name.endswith("data") else MODELS
        many = (name.endswith("eval_data") and command != "distill") or name == "train.eval_data"
        many = many or (command == "diagnose" and name == "teacher")
        first, second = (settings_of(changed(config, name, (c,) if many else c)) for c in choices)
        check_same_settings(first, first, "runs/x was begun")
        with pytest.raises(InputError, match=rf"{name}=.*{Path(choices[0]).name}'.*\(.*\), not .*resume with the same"):
            check_same_settings(first, second, "runs/x was begun")


def test_a_model_or_file_under_another_name_is_the_same(data: list[str], tmp_path: Path) -> None:
    link, copied = tmp_path / "link", tmp_path / "copy.jsonl"
    link.symlink_to(MODELS[0])
    copied.write_bytes(Path(data[0]).read_bytes())
    config = config_of("distill", data)
    moved = changed(changed(config, "teacher", str(link)), "data", str(copied))
    check_same_settings(settings_of(config), settings_of(moved), "runs/x was begun")
    # where results are stored under the name, it counts
    config = config_of("diagnose", data)
    with pytest.raises(InputError, match="begun with teacher="):
        check_same_settings(
            settings_of(config), settings_of(changed(config, "teacher", (str(link),))), "runs/x was begun"
        )


def test_fingerprints_of_loaded_models_are_not_computed_again(data: list[str]) -> None:
    config = changed(config_of("select", data), "teacher", "no/such/model/here")
    settings = settings_of(config, {"teacher": "0123", "student": "4567"})
    assert settings["teacher"] == {"name": "no/such/model/here", "content": "0123"}


def test_a_setting_that_only_one_side_has_is_of_another_version() -> None:
    with pytest.raises(InputError, match=r"begun by another version of genssd, for which gone is a setting"):
        check_same_settings({"kept": 1, "gone": 1}, {"kept": 1}, "runs/x was begun")
    with pytest.raises(InputError, match=r"begun by another version of genssd, for which new is no setting"):
        check_same_settings({"kept": 1}, {"kept": 1, "new": 2}, "runs/x was begun")


def test_a_data_file_that_is_not_there_is_named(data: list[str]) -> None:
    with pytest.raises(InputError, match=r"missing\.jsonl cannot be read: No such file"):
        settings_of(changed(config_of("distill", data), "data", "missing.jsonl"))


PATHS = {
    "demo": {"output_dir"},
    "select": {"teacher", "teacher_tokenizer", "student", "data", "output_dir", "calibrate.data"},
    "generate": {"teacher", "teacher_tokenizer", "student", "data", "output_dir"},
    "score": {"student", "teacher", "data", "output_dir"},
    "reselect": {"run", "student", "output_dir"},
    "export": {"run", "student", "output_dir"},
    "prefix": {"student", "data", "output_dir"},
    "leaf": {"student", "teacher", "data", "output_dir"},
    "evaluate": {"model", "data", "output_dir"},
    "diagnose": {"student", "teacher", "data", "output_dir"},
    "train": {"model_name_or_path", "teacher_model_name_or_path", "data", "eval_data", "output_dir"}
    | {"resume_from_checkpoint"},
    "distill": {"teacher", "student", "data", "eval_data", "output_dir"}
    | {"select.calibrate.data", "select.teacher_tokenizer", "train.teacher_model_name_or_path", "train.eval_data"},
    "report": {"run", "output", "student"},
    "reproduce": {"output_dir", "table", "model", "data"},
    "tune": {"model_name_or_path", "teacher", "student", "tune_file"},
    "doctor": {"teacher", "student", "data", "config", "run"},
    "env": set(),
}
"""Every option that names something in the file system."""
NO_PATHS = {
    "device",
    "devices",
    "dtype",
    "criterion",
    "criteria",
    "contexts",
    "statuses",
    "until",
    "lora_target_modules",
} | {
    *("attn_implementation", "words", "hint", "solution", "summary", "other", "mix", "by"),
    *("system_prompt", "chat_template_kwargs", "template_date", "model_name"),
    *("teacher_template_kwargs", "student_template_kwargs", "error", "writer", "push_to_hub", "arms", "shard", "stop"),
    *("ray", "ray_actors"),
}
"""Fields of text that name nothing there."""


def make_with_home(config_class: type, prefix: str = "") -> tuple[Any, set[str]]:
    """Return a config that names "~/x" in every field of text or texts, and the dotted names of these fields."""
    hints = typing.get_type_hints(config_class)
    values: dict[str, Any] = {}
    names = set()
    for field in dataclasses.fields(config_class):
        hint = hints[field.name]
        kinds = typing.get_args(hint) or (hint,)
        if dataclasses.is_dataclass(hint):
            assert isinstance(hint, type)
            values[field.name], nested = make_with_home(hint, f"{prefix}{field.name}.")
            names |= nested
        elif str in kinds and field.name not in NO_PATHS:
            values[field.name] = ("~/x", "~/y") if typing.get_origin(hint) is tuple else "~/x"
            names.add(f"{prefix}{field.name}")
        elif field.name == "criteria":
            values[field.name] = ("divergence",)  # without it a teacher is refused
        elif field.name == "task":
            values[field.name] = "small"
        elif field.name == "kd_ratio":
            values[field.name] = 1.0  # without it a teacher is refused
    return config_class(**values), names


@pytest.mark.parametrize("command", CONFIGS)
def test_home_is_expanded_in_every_path(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    config, names = make_with_home(CONFIGS[command])
    assert names == PATHS[command]
    expanded = {setting.name: setting.value for setting in fields_of(expand_home(config))}
    assert {name for name, value in expanded.items() if value in ("/home/me/x", ("/home/me/x", "/home/me/y"))} == names
    assert not any("~" in str(value) for value in expanded.values())


def test_a_tilde_elsewhere_is_part_of_the_name() -> None:
    config = DemoConfig(output_dir="./~")
    assert expand_home(config) == config
    config = DemoConfig(output_dir="runs~/x")
    assert expand_home(config) == config
