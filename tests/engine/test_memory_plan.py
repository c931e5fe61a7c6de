"""The plan of an engine's memory, made from configs and headers, beside the engine that is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.families import FAMILY_CASES, save_family
from support.toys import save_checkpoint

from genssd import Engine
from genssd.engine.common.errors import CapacityError
from genssd.engine.common.model_choices import Role
from genssd.engine.setup.memory_plan import PlannedModel, plan_memory

CPU = torch.device("cpu")


def read(pair: dict[Role, Path], dtype: torch.dtype = torch.float32) -> dict[Role, PlannedModel]:
    return {role: PlannedModel.read(path, dtype, CPU) for role, path in pair.items()}


def test_the_caches_are_those_of_the_engine(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "teacher", "qwen3", num_hidden_layers=3, head_dim=32)
    save_checkpoint(tmp_path / "student", "llama")
    pair: dict[Role, Path] = {"teacher": tmp_path / "teacher", "student": tmp_path / "student"}
    for dtype in (torch.float32, torch.bfloat16):
        plan = plan_memory(read(pair, dtype), memory_bytes=1 << 22, free_fraction=0.9, max_num_seqs=None, threads=2)
        engine = Engine.from_pretrained(
            *pair.values(), memory_bytes=1 << 22, dtype=str(dtype).removeprefix("torch."), threads=2
        )
        for role, runner in engine._resources.runners.items():
            pool = runner.tree.pool
            assert plan.cache_tokens == pool.num_pages * pool.page_size
            decoder = runner.decoder
            assert read(pair, dtype)[role].kv_bytes_per_token == decoder.kv_bytes_per_token
        assert plan.max_num_seqs == engine._resources.max_num_seqs


@pytest.mark.parametrize(("kind", "options"), FAMILY_CASES)
def test_the_weights_are_those_of_transformers(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    """Every parameter counts once, tied ones once, in the planned data type."""
    module = save_family(tmp_path, kind, options)
    planned = PlannedModel.read(tmp_path, torch.bfloat16, CPU)
    assert planned.weight_bytes == 2 * sum(p.numel() for p in module.parameters())


def test_a_fraction_leaves_room_for_weights_and_computation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path, "llama")
    models: dict[Role, PlannedModel] = {"student": PlannedModel.read(tmp_path, torch.float32, CPU)}
    for free in (1 << 30, 4 << 30):
        monkeypatch.setattr("genssd.engine.setup.memory.available_bytes", lambda device, free=free: free)
        monkeypatch.setattr("genssd.engine.setup.memory_plan.available_bytes", lambda device, free=free: free)
        plan = plan_memory(models, memory_bytes=None, free_fraction=0.5, max_num_seqs=32, threads=1)
        assert plan.free_bytes == free
        assert plan.cache_bytes == int(0.5 * (free - plan.weight_bytes["student"]))
        part = plan_memory(models, memory_bytes=None, free_fraction=0.5, max_num_seqs=32, threads=1, processes=4)
        assert part.free_bytes == free // 4
        assert part.cache_bytes == int(0.5 * (free // 4 - part.weight_bytes["student"]))
    monkeypatch.setattr("genssd.engine.setup.memory.available_bytes", lambda device: 1 << 20)
    with pytest.raises(CapacityError, match="nothing is left for the key-value cache"):
        plan_memory(models, memory_bytes=None, free_fraction=0.5, max_num_seqs=32, threads=1)
