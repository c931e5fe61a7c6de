"""A worker process for each GPU: the rows of one process, also where one is killed."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_pair import TinyPair

from genssd.distill.pool.processes import ProcessPool
from genssd.distill.runs.progress import Progress
from genssd.distill.select.generate import run_generate
from genssd.distill.select.generate_config import GenerateConfig
from genssd.engine.engine import Engine

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


class Killer(Progress):
    """Kills the first worker of a pool when the first prompt is done."""

    def __init__(self) -> None:
        self.pools: list[ProcessPool[Engine]] = []

    def __call__(self, done: float, total: float, detail: str = "") -> None:
        if self.pools:
            pid = self.pools.pop()._workers[0].process.pid
            assert pid is not None
            os.kill(pid, signal.SIGKILL)


def test_all_gpus_write_what_one_process_writes(
    tiny_pair: TinyPair, write_rows: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Responses of a random model in float32: rounding in other batches moves no draw over a border of two tokens."""
    data = write_rows([{"question": f"{i}?"} for i in range(24)])
    base: dict[str, Any] = {
        "teacher": str(tiny_pair.teacher), "data": str(data), "dtype": "float32", "max_tokens": 24,
        "memory_bytes": 1 << 24, "max_num_seqs": 4,
    }  # fmt: skip
    run_generate(GenerateConfig(**base, output_dir=str(tmp_path / "one")))
    killer, opened = Killer(), ProcessPool.open

    def open_and_note(pool: ProcessPool[Engine]) -> None:
        opened(pool)
        killer.pools.append(pool)

    monkeypatch.setattr(ProcessPool, "open", open_and_note)
    run_generate(GenerateConfig(**base, devices="all", output_dir=str(tmp_path / "all")), report=killer)
    assert not killer.pools, "a worker was killed"
    one, every = (
        sorted((row["index"], row["completion_ids"]) for row in map(json.loads, path.read_text().splitlines()))
        for path in (tmp_path / "one/responses.jsonl", tmp_path / "all/responses.jsonl")
    )
    assert one == every
