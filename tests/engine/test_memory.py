"""Budgets of the caches, and models that do not fit."""

from __future__ import annotations

import gc
import json
import math
import subprocess
import sys
from pathlib import Path
from weakref import WeakSet

import pytest
import torch
from support.tiny_pair import TinyPair

from genssd import Engine
from genssd.distill import small_pair
from genssd.engine.cache import page_list
from genssd.engine.checkpoints.config import ModelConfig
from genssd.engine.checkpoints.parameters import parameter_shapes
from genssd.engine.common.errors import CapacityError
from genssd.engine.setup import memory
from genssd.engine.setup.memory import BASE_BYTES, cache_budget, check_weights_fit

CPU = torch.device("cpu")
PAIR = Path(next(iter(small_pair.__path__)))
MIB = 1 << 20


def set_free(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    """Give the process so much free memory, and no caches from before."""
    monkeypatch.setattr(page_list, "_lists", WeakSet())
    monkeypatch.setattr(memory, "available_memory", lambda *, promised: free - promised)


def test_the_caches_leave_room_for_the_computation(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    set_free(monkeypatch, 10_000 * MIB)
    assert cache_budget(CPU, None, 0.9, working_bytes=100 * MIB) == 9_000 * MIB
    set_free(monkeypatch, 400 * MIB)
    assert cache_budget(CPU, None, 0.9, working_bytes=100 * MIB) == 300 * MIB - BASE_BYTES
    assert cache_budget(CPU, 123, 0.9, working_bytes=100 * MIB) == 123
    assert not caplog.records
    assert cache_budget(CPU, 350 * MIB, 0.9, working_bytes=100 * MIB) == 350 * MIB
    assert f"memory_bytes is {350 * MIB:,}" in caplog.text
    assert f"{400 * MIB:,} bytes that are free" in caplog.text
    set_free(monkeypatch, 100 * MIB)
    kept = 100 * MIB + BASE_BYTES
    with pytest.raises(CapacityError, match=rf"^{100 * MIB:,} bytes of memory are free .* {kept:,} are kept"):
        cache_budget(CPU, None, 0.9, working_bytes=100 * MIB)


def test_weights_that_do_not_fit_are_refused_before_they_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    directories: dict[memory.Role, Path] = {"teacher": PAIR / "teacher", "student": PAIR / "student"}
    sizes = {role: (path / "model.safetensors").stat().st_size for role, path in directories.items()}
    stored = sum(size // 4096 * 4096 for size in sizes.values())  # without the headers
    largest = max(math.prod(shape) for shape in parameter_shapes(ModelConfig.load(PAIR / "teacher")).values())
    for dtype in (torch.float32, torch.bfloat16):
        needed = stored * dtype.itemsize // 4 + 4 * largest * dtype.itemsize  # copies of one tensor while it is packed
        dtypes: dict[memory.Role, torch.dtype] = {"teacher": dtype, "student": dtype}
        set_free(monkeypatch, needed + 20_000)
        check_weights_fit(directories, dtypes, CPU)
        set_free(monkeypatch, needed - 20_000)
        with pytest.raises(CapacityError, match=r"the weights of teacher .*teacher and student .*student.* bytes, and"):
            check_weights_fit(directories, dtypes, CPU)


def test_a_second_engine_leaves_the_memory_that_the_first_will_take(
    tiny_pair: TinyPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache takes memory when its pages are first written, so that the kernel reports it as free before."""
    set_free(monkeypatch, 1 << 30)
    free = memory.available_bytes(CPU)
    first = Engine.from_pretrained(student=tiny_pair.student, memory_bytes=100 * MIB)
    assert free - memory.available_bytes(CPU) == pytest.approx(100 * MIB, rel=0.01)
    page = 100 * MIB // first.pages_in_use[1]
    before = memory.available_bytes(CPU)
    for _ in range(2):  # the second time the same pages are taken again
        first.score([[5] * 40], [[6] * 10])
        assert (memory.available_bytes(CPU) - before) / page == pytest.approx(4, rel=0.1)
    second = Engine.from_pretrained(student=tiny_pair.student, memory_utilization=0.5)
    assert second.pages_in_use[1] * page == pytest.approx(0.5 * (before + 4 * page), rel=0.01)
    del first, second
    gc.collect()
    assert memory.available_bytes(CPU) == free


def test_an_engine_without_room_is_refused(tiny_pair: TinyPair, monkeypatch: pytest.MonkeyPatch) -> None:
    set_free(monkeypatch, 32 * MIB)
    with pytest.raises(CapacityError, match=rf"{32 * MIB:,} bytes of memory are free"):
        Engine.from_pretrained(tiny_pair.teacher, tiny_pair.student)


@pytest.mark.parametrize("instructions", ["amx", "avx512_bf16", None])
def test_one_line_says_what_bfloat16_would_give(
    instructions: str | None, tiny_pair: TinyPair, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(memory, "bfloat16_instructions", lambda: instructions)
    caplog.set_level("INFO", logger="genssd")
    for dtype in ("float32", "bfloat16", "auto"):
        assert not caplog.records
        Engine.from_pretrained(tiny_pair.teacher, tiny_pair.student, dtype=dtype, device="cpu", memory_bytes=MIB)
    assert [record.message for record in caplog.records] == (
        [
            "the teacher and the student compute in float32; --dtype bfloat16 would take this CPU's instructions for "
            f"bfloat16 ({instructions}), which is usually faster"
        ]
        if instructions
        else []
    )


def test_only_models_in_float32_on_a_cpu_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "bfloat16_instructions", lambda: "amx")
    mixed: dict[memory.Role, torch.dtype] = {"teacher": torch.bfloat16, "student": torch.float32}
    line = memory.describe_float32(mixed, CPU)
    assert line is not None
    assert line.startswith("the student computes in float32; --dtype bfloat16 would take")
    assert memory.describe_float32({"teacher": torch.bfloat16}, CPU) is None
    assert memory.describe_float32(mixed, torch.device("cuda")) is None


def test_a_search_finishes_under_ulimit(tmp_path: Path) -> None:
    data, output = tmp_path / "data.jsonl", tmp_path / "run"
    data.write_text(json.dumps({"question": "12 + 30 = ?"}) + "\n")
    words = f"select --teacher {PAIR / 'teacher'} --student {PAIR / 'student'} --data {data} --output-dir {output}"
    command = f"ulimit -v {1500 << 10}; {sys.executable} -m genssd {words} --threads 1 --max-tokens 8"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert len((output / "selections.jsonl").read_text().splitlines()) == 1
