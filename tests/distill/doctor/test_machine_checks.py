"""Findings about the machine, and the report for bug reports."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.doctor import detail_of, one
from support.tiny_pair import TinyPair

from genssd.distill.doctor import env, machine_checks
from genssd.distill.doctor.env import describe_environment
from genssd.distill.doctor.inputs import Inputs, open_inputs
from genssd.distill.doctor.machine_checks import FEATURES, check_kernels, describe_cuda, describe_sets, has_features
from genssd.distill.doctor.settings import Settings
from genssd.distill.runs.engine_options import EngineOptions
from genssd.kernels.native import instruction_set, list_instruction_sets
from genssd.kernels.tuned import Card, Entry, Problem, add_entries

FOR_TESTS = {"amx_model", "generic"}
"""Sets that no user is told of."""


def inputs_of(pair: TinyPair, engine: EngineOptions | None = None) -> Inputs:
    return open_inputs(Settings(models={"student": str(pair.student)}, engine=engine), 1)


def write_cpu(root: Path, *features: str) -> Path:
    (root / "proc").mkdir(parents=True)
    (root / "proc/cpuinfo").write_text(f"model name\t: Some CPU\nflags\t\t: {' '.join(features)}\n")
    return root


def test_the_kernels_in_use_are_named(tiny_pair: TinyPair) -> None:
    found = one(check_kernels(inputs_of(tiny_pair)))
    assert found.level == "ok"
    assert f"native kernels of {instruction_set()}" in found.line
    lines = dict(line.split(": ", 1) for line in detail_of(found).splitlines())
    assert {"cuda", "amx", "avx512_bf16", "avx512", "avx2", "triton", "threads"} == set(lines)
    assert lines[str(instruction_set())] == "in use"


def test_every_set_of_the_build_is_described() -> None:
    """A set that the processor runs has all features that the table lists for it."""
    assert set(list_instruction_sets()) - FOR_TESTS <= set(FEATURES)
    for name in set(list_instruction_sets()) - FOR_TESTS:
        assert has_features(name), name


def test_what_a_processor_lacks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_checks, "instruction_set", lambda: "avx2")
    monkeypatch.setattr(machine_checks, "list_instruction_sets", lambda: ["avx2"])
    root = write_cpu(tmp_path, "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16")
    assert list(describe_sets(root)) == [
        "amx: this processor lacks amx_tile, amx_bf16",
        "avx512_bf16: the processor has it, but this build lacks its kernels, or the system does not grant it",
        "avx512: the processor has it, but this build lacks its kernels, or the system does not grant it",
        "avx2: in use",
    ]
    monkeypatch.setattr(machine_checks, "list_instruction_sets", lambda: ["avx512", "avx2"])
    monkeypatch.setattr(machine_checks, "instruction_set", lambda: "avx512")
    assert list(describe_sets(root))[-1] == "avx2: runs here too; avx512 is faster"


def test_a_set_that_the_processor_has_and_that_is_not_used(
    tiny_pair: TinyPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine_checks, "has_features", lambda name: True)
    monkeypatch.setattr(machine_checks, "instruction_set", lambda: "avx512")
    monkeypatch.setattr(machine_checks, "list_instruction_sets", lambda: ["avx512", "avx2"])
    found = one(check_kernels(inputs_of(tiny_pair)))
    assert found.level == "warning"
    assert "not amx, although the processor has it" in found.line
    assert "binutils 2.36" in str(found.fix)


def test_a_machine_without_native_kernels(tiny_pair: TinyPair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_checks, "instruction_set", lambda: None)
    monkeypatch.setattr(machine_checks, "list_instruction_sets", lambda: [])
    found = one(check_kernels(inputs_of(tiny_pair)))
    assert found.level == "warning"
    assert "plain torch serves" in found.line


def test_a_device_that_is_not_there_is_an_error(tiny_pair: TinyPair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = one(check_kernels(inputs_of(tiny_pair, EngineOptions(device="cuda"))))
    assert found.level == "error"
    assert "torch finds no CUDA device" in found.line
    assert "--device cpu" in str(found.fix)


@pytest.mark.parametrize(
    ("built", "visible", "reason"),
    [
        (None, None, "is built without it"),
        ("13.0", None, "finds no device"),
        ("13.0", "", "finds no device (CUDA_VISIBLE_DEVICES is '')"),
    ],
)
def test_why_there_is_no_gpu(
    built: str | None, visible: str | None, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", built)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert describe_cuda().endswith(reason)


def test_advice_for_processors_that_multiply_bfloat16(tiny_pair: TinyPair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("genssd.engine.setup.memory.bfloat16_instructions", lambda: "amx")
    found = one(check_kernels(inputs_of(tiny_pair, EngineOptions())))
    assert found.level == "ok"
    assert "--dtype bfloat16" in str(found.fix)
    assert one(check_kernels(inputs_of(tiny_pair, EngineOptions(dtype="float32")))).fix is None


def test_the_report_has_a_line_per_fact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GENSSD_TUNE_FILE", str(tmp_path / "private" / "tune.json"))
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("HF_TOKEN", "secret")
    facts = dict(line.split(": ", 1) for line in describe_environment().splitlines())
    assert facts["torch"] == torch.__version__
    assert facts["OMP_NUM_THREADS"] == "3"
    assert facts["threads"] == "3 threads (OMP_NUM_THREADS)"
    assert facts["tune file"] == "none (named by GENSSD_TUNE_FILE)"
    assert facts[f"kernels of {instruction_set()}"] == "in use"
    # nothing of the user's: no paths, no secrets
    assert "secret" not in str(facts)
    assert str(tmp_path) not in str(facts)


def test_a_package_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(env, "PACKAGES", ("torch", "no-such-package"))
    assert "no-such-package: not installed" in describe_environment().splitlines()


CARD = Card(name="NVIDIA H200", capability="sm_90", versions=("1", "2", "3"))
ENTRY = Entry(deterministic=None, fastest=({"a": 1},) * 4, microseconds=(1.0,) * 4)


@pytest.fixture
def gpu(tiny_pair: TinyPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine whose default device is a card; returns its tune file."""
    monkeypatch.setattr(machine_checks, "choose_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(machine_checks, "card_of", lambda device: CARD)
    monkeypatch.setenv("GENSSD_TUNE_FILE", str(tmp_path / "tune.json"))
    return tmp_path / "tune.json"


def test_a_card_with_and_without_a_tune_file(tiny_pair: TinyPair, gpu: Path) -> None:
    found = one(check_kernels(inputs_of(tiny_pair)))
    assert found.level == "ok"
    assert "Triton kernels, shipped for sm_90, on NVIDIA H200: not tuned for it" in found.line
    assert "genssd tune" in str(found.fix)
    problem = Problem(operator="draw", dtype="float32", shape=(9,))
    add_entries(gpu, Card(name="Another", capability="sm_80", versions=CARD.versions), {problem: ENTRY})
    assert "not tuned for it" in one(check_kernels(inputs_of(tiny_pair))).line
    add_entries(gpu, CARD, {problem: ENTRY})
    found = one(check_kernels(inputs_of(tiny_pair)))
    assert (found.level, found.fix) == ("ok", None)
    assert "tuned for NVIDIA H200" in found.line
    assert "tune file: Another, NVIDIA H200" in describe_environment()


def test_a_damaged_tune_file_and_a_missing_triton(
    tiny_pair: TinyPair, gpu: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu.write_text("{")
    found = one(check_kernels(inputs_of(tiny_pair)))
    assert found.level == "warning"
    assert "is not valid JSON" in found.line
    assert "tune file: cannot be read" in describe_environment()
    monkeypatch.setattr(machine_checks, "find_spec", lambda name: None)
    found = one(check_kernels(inputs_of(tiny_pair)))
    assert found.level == "error"
    assert "NVIDIA H200: Triton is missing" in found.line
    assert "triton: not installed" in detail_of(found)
