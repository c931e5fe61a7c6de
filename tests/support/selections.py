"""Small runs of `select` over the tiny pair."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from support.tiny_pair import TinyPair

from genssd import Chunk, Sampling
from genssd.distill.select.config import SelectConfig

PROMPTS = [{"prompt": "one"}, {"prompt": "two"}, {"prompt": "one"}, {"prompt": "four"}]


def config_for(pair: TinyPair, data: Path, output_dir: Path, **changes: Any) -> SelectConfig:
    """Return a config of two candidates of three tokens a round. changes: other fields."""
    base = SelectConfig(
        teacher=str(pair.teacher),
        student=str(pair.student),
        data=str(data),
        output_dir=str(output_dir),
        candidates=2,
        chunk=Chunk(tokens=3, until=None),
        max_tokens=8,
        memory_bytes=1 << 24,
        sampling=Sampling(),
    )
    return dataclasses.replace(base, **changes)
