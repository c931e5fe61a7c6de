"""Several processes where a directory is in use, or a model is not where it was: one line, and no process is left."""

from __future__ import annotations

import dataclasses
import multiprocessing
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.tiny_pair import TinyPair

from genssd.distill.runs import pools
from genssd.distill.runs.directory import claim_directory
from genssd.distill.select.generate import run_generate
from genssd.distill.select.generate_config import GenerateConfig
from genssd.engine.common.errors import CheckpointError, InputError

pytestmark = pytest.mark.usefixtures("forked_workers")


@pytest.fixture
def config(tiny_pair: TinyPair, write_rows: Callable[..., Path], tmp_path: Path) -> GenerateConfig:
    teacher = tmp_path / "teacher"
    shutil.copytree(tiny_pair.teacher, teacher)
    data = write_rows([{"question": f"{i}?"} for i in range(4)])
    return GenerateConfig(
        teacher=str(teacher), data=str(data), max_tokens=4, memory_bytes=1 << 22, processes=2,
        output_dir=str(tmp_path / "out"),
    )  # fmt: skip


def test_a_second_command_on_the_directory_is_refused_before_it_starts_processes(
    config: GenerateConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pools, "ProcessPool", None)
    out = Path(config.output_dir)
    message = f"^another run is at work in {re.escape(str(out))}; wait for it, or choose another output_dir$"
    with claim_directory(out, "generate"):
        for resume in (False, True):
            with pytest.raises(InputError, match=message):
                run_generate(dataclasses.replace(config, resume=resume))
    assert not out.exists()


def test_a_model_that_is_not_there_is_refused_before_processes_start(
    config: GenerateConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pools, "ProcessPool", None)
    with pytest.raises(CheckpointError, match=r"^model directory /no/such/model does not exist"):
        run_generate(dataclasses.replace(config, teacher="/no/such/model"))
    assert not Path(config.output_dir).exists()


def test_a_model_that_a_worker_does_not_find_is_named_once(
    config: GenerateConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The command still sees it; then it is gone, as on a node that has no copy. Three processes miss it."""
    real = pools.ProcessPool

    def remove_first(*arguments: Any) -> Any:
        shutil.rmtree(config.teacher)
        return real(*arguments)

    monkeypatch.setattr(pools, "ProcessPool", remove_first)
    with pytest.raises(CheckpointError, match=f"^model directory {re.escape(config.teacher)} does not exist"):
        run_generate(dataclasses.replace(config, processes=3))
    assert not caplog.text
    assert not multiprocessing.active_children()
    assert not (Path(config.output_dir) / "responses.jsonl").exists()
