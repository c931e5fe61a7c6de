"""Flags of other programs are answered with ours, where the command has one for the same thing."""

from __future__ import annotations

from pathlib import Path

import pytest

from genssd.configs import CONFIGS
from genssd.engine.common.errors import InputError
from genssd.field_names import FIELD_NAMES
from genssd.flag_list import list_flags
from genssd.flags import read_config

FLAGS = {name: {flag.name.replace("_", "-") for flag in list_flags(config)} for name, config in CONFIGS.items()}


def test_every_name_leads_to_a_flag_that_exists() -> None:
    everywhere = set().union(*FLAGS.values())
    for flag, (owner, ours) in FIELD_NAMES.items():
        assert owner
        for name in ours:
            assert name.split()[0] in everywhere, (flag, name)
            assert name.split()[0] != flag


@pytest.mark.parametrize(
    ("command", "flag", "ours"),
    [
        ("select", "--gpu-memory-utilization", "--memory-utilization"),
        ("evaluate", "--max_running_requests", "--max-num-seqs"),
        ("generate", "--max-new-tokens", "--max-tokens"),
        ("train", "--warmup-ratio", "--warmup-steps"),
        ("train", "--resume", "--resume-from-checkpoint last"),
        ("select", "--resume-from-checkpoint", "--resume"),
    ],
)
def test_the_message_names_ours(command: str, flag: str, ours: str) -> None:
    with pytest.raises(InputError, match=rf"^unknown flag {flag.replace('_', '-')}, a name of .*: here it is '{ours}'"):
        read_config(command, [flag, "1"], CONFIGS[command])


def test_keys_of_a_config_file_as_well(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("gpu_memory_utilization: 0.5\n")
    with pytest.raises(InputError, match="unknown key 'gpu_memory_utilization', a name of vLLM: here it is"):
        read_config("select", ["--config", str(path)], CONFIGS["select"])


def test_a_name_without_a_flag_of_ours_is_an_unknown_flag_like_others() -> None:
    with pytest.raises(InputError, match=r"^unknown flag --enable-thinking;"):
        read_config("tune", ["--enable-thinking", "1"], CONFIGS["tune"])
