"""What a command writes is named in its help and printed at its end."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path

import pytest
from support.small_runs import SmallRun, make_small_runs
from support.tiny_pair import TinyPair

from genssd.configs import CONFIGS
from genssd.distill.runs.output_files import OUTPUTS
from genssd.help_text import render_help
from genssd.outputs import print_outputs

OF_A_MODEL = ("config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "chat_template.jinja")
"""Files of a model's directory beside its weights."""
HIDDEN = (".*", "*.lock")
"""Files that only keep a second process out."""


@pytest.fixture(scope="module")
def small_runs(tiny_pair: TinyPair, tmp_path_factory: pytest.TempPathFactory) -> dict[str, SmallRun]:
    return make_small_runs(tiny_pair, tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("command", sorted(set(OUTPUTS) - {"demo"}))
def test_every_file_that_a_command_writes_is_named(
    command: str, small_runs: dict[str, SmallRun], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = tmp_path / "run"
    small_runs[command].run(directory)
    capsys.readouterr()
    print_outputs(command, directory)
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == f"written to {directory}:"
    printed = [line.split()[0] for line in lines]
    left_out = (*HIDDEN, *(OF_A_MODEL if command == "train" else ()))
    for path in directory.iterdir():
        name = f"{path.name}/" if path.is_dir() else path.name
        if path.stat().st_size and not any(fnmatch(path.name, pattern) for pattern in left_out):
            assert any(fnmatch(name, pattern) for pattern in printed), name
    for pattern in printed:
        assert list(directory.glob(pattern.rstrip("/"))), pattern


def test_the_help_names_the_files_of_every_command_with_an_output_directory() -> None:
    with_directory = {name for name, config in CONFIGS.items() if "output_dir" in config.__dataclass_fields__}  # type: ignore[attr-defined]
    assert with_directory == OUTPUTS.keys()
    for command, files in OUTPUTS.items():
        text = render_help(command, CONFIGS[command])
        assert all(f"\n  {name} " in text for name in files)
