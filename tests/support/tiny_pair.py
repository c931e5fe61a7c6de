"""The random teacher and student that the fixture `tiny_pair` makes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from genssd import Engine


@dataclass(frozen=True, slots=True)
class TinyPair:
    """A random teacher and student with the byte tokenizer, and an engine over them."""

    teacher: Path
    student: Path
    engine: Engine
