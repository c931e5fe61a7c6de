"""The README's programs run, on the small pair."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from genssd.distill import small_pair

ROOT = Path(__file__).resolve().parents[1]
PAIR = Path(next(iter(small_pair.__path__)))


@pytest.mark.source
def test_the_programs_run(capsys: pytest.CaptureFixture[str]) -> None:
    programs = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(programs) == 2
    text = "\n".join(programs).replace('"Qwen/Qwen3-8B"', f'"{PAIR / "teacher"}"')
    text = text.replace('"Qwen/Qwen3-0.6B"', f'"{PAIR / "student"}"').replace("max_tokens=4096", "max_tokens=64")
    names: dict[str, object] = {}
    exec(compile(text, "README.md", "exec"), names)
    assert re.match(r"(finished|length) \d", capsys.readouterr().out)


@pytest.mark.source
def test_every_command_is_described() -> None:
    from genssd.cli import SUMMARIES
    from genssd.commands import COMMANDS
    from genssd.configs import CONFIGS

    assert list(CONFIGS) == list(COMMANDS)
    assert set(SUMMARIES) == set(COMMANDS)
    text = (ROOT / "README.md").read_text() + (ROOT / "Makefile").read_text()
    assert all(f"genssd {name}" in text for name in COMMANDS)
