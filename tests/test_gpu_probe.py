"""The GPU probe of bench/ without a GPU: its options, its table, and all its operations on a fake device."""

from __future__ import annotations

import importlib
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.fake_cuda import FakeCuda

pytestmark = pytest.mark.source

ROWS: Any = pytest.importorskip("bench.gpu.rows")
TIMING: Any = pytest.importorskip("bench.gpu.timing")
GAPS: Any = pytest.importorskip("bench.support.device_gaps")
MACHINE = ROWS.Machine(
    card="H", torch="2", triton="3", commit="abc", matmul_tflops=800.0, copy_gbps=4000.0
)  # fmt: skip


def row(implementation: str, microseconds: float | None, **changes: Any) -> Any:
    fields = {"operation": "score", "shape": "64 x 1024", "floor_microseconds": 73.0, **changes}
    return ROWS.Row(implementation=implementation, microseconds=microseconds, **fields)


def test_idle_time_lies_between_kernels_of_all_streams() -> None:
    """b runs under a, c after a pause of 30, and d at once after c."""
    spans = {"d": (240, 10), "a": (100, 100), "b": (120, 40), "c": (230, 10)}
    device = GAPS.measure_device_time(GAPS.Kernel(name=n, start=s, duration=d) for n, (s, d) in spans.items())
    assert (device.seconds, device.busy_seconds) == (pytest.approx(150e-9), pytest.approx(120e-9))
    assert [(gap.before, gap.after, gap.count) for gap in device.gaps] == [("a", "c", 1)]
    assert device.gaps[0].seconds == pytest.approx(30e-9)
    assert list(device.kernels)[:2] == ["a", "b"]
    assert GAPS.measure_device_time([]).seconds == 0.0


def test_the_floor_is_the_slower_of_arithmetic_and_bytes() -> None:
    assert MACHINE.floor_microseconds(800e12, 0.0) == pytest.approx(1e6)
    assert MACHINE.floor_microseconds(8e6, 4e9) == pytest.approx(1e3)


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.split("  ") if cell.strip()]


def test_a_line_per_operation_and_shape() -> None:
    rows = [
        row("genssd", 146.0, peak_mib=12.4),
        row("eager", 2500.0),
        row("genssd", None, shape="8 x 1", error="OutOfMemoryError"),
        row("Liger", None, shape="8 x 1", error="ValueError"),
    ]
    head, titles, first, second = ROWS.format_table(rows, MACHINE).splitlines()
    assert "H, torch 2, triton 3, genssd abc: product 800 TFLOP/s, copy 4000 GB/s" in head
    assert titles.split() == ["operation", "shape", "floor", "genssd", "of", "floor", "MiB", "others"]
    assert cells(first) == ["score", "64 x 1024", "73 us", "146 us", "50 %", "12", "eager 2.5 ms"]
    assert cells(second)[3:] == ["failed", "-", "-", "Liger failed"]


def test_times_have_three_digits() -> None:
    assert [ROWS.format_time(t) for t in (4.536, 69.0, 998.7, 1234.0, 57400.0)] == [
        "4.54 us", "69 us", "999 us", "1.23 ms", "57.4 ms",
    ]  # fmt: skip


def test_rows_name_what_they_belong_to() -> None:
    line = json.loads(row("genssd", 146.0).to_json(MACHINE))
    assert (line["card"], line["torch"], line["triton"], line["commit"]) == ("H", "2", "3", "abc")
    assert line["microseconds"] == 146.0


def test_long_calls_are_repeated_less() -> None:
    assert [TIMING.choose_rounds(t) for t in (0.0, 30.0, 6_000.0, 1e6)] == [200, 200, 10, 5]


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    probe = pytest.importorskip("bench.gpu.probe")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert probe.main([]) == 2
    assert "needs a GPU" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        probe.parse_arguments(["--only", "nothing"])


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_every_operation_on_a_fake_device(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No value is computed; shapes and devices are those of the real run, and each implementation gets a row."""
    pytest.importorskip("triton")
    for name in [name for name in sys.modules if name.startswith("bench.")]:
        monkeypatch.delitem(sys.modules, name)  # they look for a GPU when they are imported
    with FakeCuda(computes=False) as device:
        probe = importlib.import_module("bench.gpu.probe")
        timing = importlib.import_module("bench.gpu.timing")
        monkeypatch.setattr(timing, "_time_kernels", timing._time_events)  # the profiler needs a real device
        code = probe.main(["--json", str(tmp_path / "rows.jsonl"), "--commit", "abc", "--seconds", "1e9"])
    printed = capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    own = ("genssd", "genssd with normalized logits", "eager", "SDPA")
    assert {r["implementation"] for r in rows} >= set(own)
    assert [r["error"] for r in rows if r["implementation"] in own and r["error"]] == []
    assert code == 0
    assert {r["operation"] for r in rows} >= {"score", "draw", "top-p", "branch decode", "prefill", "extend", "jsd"}
    assert all(math.isfinite(r["microseconds"]) for r in rows if not r["error"])
    assert printed.splitlines()[-1].startswith("jsd")
    assert device.kernels
    for name in [name for name in sys.modules if name.startswith("bench.")]:
        monkeypatch.delitem(sys.modules, name)
