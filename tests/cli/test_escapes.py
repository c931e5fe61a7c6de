"""Line breaks in the values of flags."""

from __future__ import annotations

from pathlib import Path

import pytest

from genssd.distill.select.config import SelectConfig
from genssd.engine.common.errors import InputError
from genssd.flags import read_config

MODELS = ["--teacher", "t", "--student", "s", "--data", "d"]


def read(*flags: str) -> SelectConfig:
    config: SelectConfig = read_config("select", [*MODELS, *flags], SelectConfig)
    return config


def test_a_backslash_and_a_letter_are_the_character() -> None:
    config = read("--stop", r"\n\nQ:", "Answer:", r"a\tB", "\n", "--chunk.until", r"\n\n", "--criterion", "ppl")
    assert config.stop == ("\n\nQ:", "Answer:", "a\tB", "\n")
    assert config.chunk.until == "\n\n"
    assert read(r"--chunk.until=.\n").chunk.until == ".\n"
    assert read("--stop", r"\boxed{", r"\[").stop == (r"\boxed{", r"\[")
    assert read("--data", r"C:\new").data == r"C:\new"


def test_a_name_of_latex_is_asked_about() -> None:
    with pytest.raises(InputError, match=r"--stop .*nabla.*\\n may be a character or .* \$'\\nabla' for the character"):
        read("--stop", r"\nabla")


def test_a_config_file_has_escapes_of_its_own(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("stop: [\"\\n\\nQ\", '\\nabla']\n")
    assert read("--config", str(file)).stop == ("\n\nQ", r"\nabla")
