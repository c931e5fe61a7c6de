"""The workloads of `genssd tune`, in Triton's interpreter: every candidate runs and is compared with plain torch.

What no interpreter can run, tensor descriptors of half precision among it, is compiled ahead of time.
"""

from __future__ import annotations

import dataclasses
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from genssd.engine.models import tuning
from genssd.engine.models.tuning import measure, tune
from genssd.kernels import (
    attention_candidates_triton,
    candidates_triton,
    filter_candidates_triton,
    loss_candidates_triton,
    tune_file,
)
from genssd.kernels.attention_candidates_triton import AttentionWorkload
from genssd.kernels.attention_launch_triton import AttentionConfiguration
from genssd.kernels.candidates_triton import Device, DrawWorkload, HeadWorkload
from genssd.kernels.filter_candidates_triton import FilterWorkload
from genssd.kernels.head_triton import HeadTiles
from genssd.kernels.loss_candidates_triton import CrossEntropyWorkload, DivergenceWorkload, loss_candidates

CPU = Device(torch.device("cpu"), amd=False, capability=90, multiprocessors=2)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rows, and a device that the launches can ask for its size."""
    properties = SimpleNamespace(multi_processor_count=2, major=9, minor=0, name="card")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(candidates_triton, "SAMPLES", ((2, 5), (9,), (17,), (33,)))
    monkeypatch.setattr(candidates_triton, "MOST_ROWS", 33)
    monkeypatch.setattr(filter_candidates_triton, "SAMPLES", ((2,), (1,), (1,), (2,)))
    monkeypatch.setattr(filter_candidates_triton, "MOST_ROWS", 2)
    # the interpreter takes as long for any size: the kernels of each kind once, by both ways to draw
    monkeypatch.setattr(filter_candidates_triton, "CANDIDATES", filter_candidates_triton.CANDIDATES[:3:2])
    # all rows of a loss at once and in few programs, by the library's product and by ours
    monkeypatch.setattr(loss_candidates_triton, "ROWS", 5)
    monkeypatch.setattr(CrossEntropyWorkload, "samples", ((5,),))
    monkeypatch.setattr(loss_candidates_triton, "CHECKED_ROWS", 4)
    monkeypatch.setattr(loss_candidates_triton, "loss_candidates", few_loss_candidates)
    monkeypatch.setattr(candidates_triton, "LOGITS_BYTES", 9 * 600 * 4)  # nine rows of a draw
    monkeypatch.setattr(attention_candidates_triton, "ATTENTION_SAMPLES", ((3, 40, 1), (1, 24, 24)))
    # small integers: the interpreter's products would round differently at other places of a tile, and ranks with them
    inputs = candidates_triton.head_inputs.__wrapped__
    monkeypatch.setattr(
        candidates_triton, "head_inputs", lambda *shape: tuple(x.mul(4).round() for x in inputs(*shape))
    )


def few_loss_candidates(operator: Any, device: Device, dtype: torch.dtype) -> Any:
    """Return the shipped configuration and one that takes the product of tiles, which float32 would not try."""
    shipped = loss_candidates(operator, device, dtype)[0]
    tiles = HeadTiles(block_n=16, block_v=32, block_d=16, num_warps=4, num_stages=1)
    return [shipped, dataclasses.replace(shipped, fused=True, tiles=tiles, chunk_rows=4)]


@pytest.fixture(params=["score", "logits", "draw", "filter", "attention", "cross_entropy", "divergence"])
def workload(request: pytest.FixtureRequest) -> Any:
    if request.param == "draw":
        return DrawWorkload(CPU, 600)
    if request.param == "filter":
        return FilterWorkload(CPU, 600)
    if request.param == "attention":
        return AttentionWorkload(CPU, torch.float32, (4, 2, 16), 16)
    if request.param == "cross_entropy":
        return CrossEntropyWorkload(CPU, torch.float32, (70, 24))
    if request.param == "divergence":
        return DivergenceWorkload(CPU, torch.float32, (70, 24, 16))
    return HeadWorkload(request.param, CPU, torch.float32, 70, 24)


def test_every_candidate_is_correct_and_the_fastest_wins(workload: Any) -> None:
    failures: list[str] = []
    seconds = iter(range(1000, 0, -1))  # every candidate is faster than all before it
    result = tune(workload, timer=lambda run, is_long: next(seconds), is_over=lambda: False, report=failures.append)
    assert failures == []
    assert result is not None
    assert result.problem == workload.problem
    assert len(result.entry.fastest) == 4
    assert result.entry.fastest[-1] == workload.candidates(len(workload.samples) - 1)[-1]
    assert None not in result.shipped


def test_a_wrong_result_is_found(workload: Any) -> None:
    values = workload.shipped(0)
    run = workload.make_run(values, workload.samples[0][-1])
    workload.check(run(), workload.samples[0][-1])
    wrong = tuple(output + 1 for output in run())
    with pytest.raises((AssertionError, RuntimeError)):
        workload.check(wrong, workload.samples[0][-1])


def test_tables_are_made_for_the_programs_of_the_card() -> None:
    device = Device(torch.device("cpu"), amd=False, capability=90, multiprocessors=132)
    found = {
        (options.segment, options.chain_programs, options.resume_tokens)
        for values in AttentionWorkload(device, torch.bfloat16, (32, 8, 128), 64).candidates(0)
        for options in [AttentionConfiguration.from_values(values).table_options(132, 8)]
    }
    assert {(512, 0, 0), (1024, 0, 0), (256, 0, 0), (512, 16, 0), (512, 16, 64), (128, 16, 64), (2048, 16, 64)} <= found


def test_a_workload_goes_to_the_processes_that_compile(workload: Any) -> None:
    again = pickle.loads(pickle.dumps(workload))
    assert again.problem == workload.problem
    assert again.shipped(0) == workload.shipped(0)


def test_the_shipped_configuration_is_one_of_the_candidates() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for capability in (80, 90):
            device = Device(torch.device("cpu"), amd=False, capability=capability, multiprocessors=132)
            for operator in tune_file.HEAD_OPERATORS:
                workload = HeadWorkload(operator, device, dtype, 4096, 256)
                for row_class in range(4):
                    assert workload.shipped(row_class) in workload.candidates(row_class), (dtype, capability, row_class)


def test_candidates_of_the_losses() -> None:
    """The shipped one is the first; the product that takes normalizers is tried where a matrix unit multiplies."""
    for operator in tune_file.LOSS_OPERATORS:
        for dtype, capability, fused in (
            (torch.float32, 90, 0), (torch.bfloat16, 80, 1), (torch.bfloat16, 90, 3), (torch.bfloat16, 100, 1),
        ):  # fmt: skip
            device = Device(torch.device("cpu"), amd=False, capability=capability, multiprocessors=132)
            candidates = loss_candidates(operator, device, dtype)
            assert len(set(candidates)) == len(candidates)
            assert not candidates[0].fused
            assert len({candidate.tiles for candidate in candidates if candidate.fused}) == fused
            for candidate in candidates:
                assert candidate.from_values(candidate.values()) == candidate


def test_all_kernels_of_two_models_are_tuned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Problems that two models have in common are tuned once, and what is compiled is what is timed."""
    compiled: list[Any] = []

    def compile_in_turn(work: Any, count: int, processes: int, timeout: float) -> None:
        compiled.extend(work.args[0])
        assert count == len(compiled)
        assert 1 <= processes <= tuning.MAX_PROCESSES
        for index in range(count):
            work(index)

    for name in ("set_device", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, lambda *device: None)
    monkeypatch.setattr(Device, "of", lambda device: CPU)
    monkeypatch.setattr(tuning, "compile_in_parallel", compile_in_turn)
    monkeypatch.setattr(tuning, "time_in_graph", lambda run, is_long: 1e-6)
    monkeypatch.setattr(candidates_triton, "SAMPLES", ((2, 3), (4,), (5,), (6,)))
    monkeypatch.setattr(HeadWorkload, "make_small", lambda workload: workload)
    monkeypatch.setattr(DrawWorkload, "make_small", lambda workload: workload)
    for kind in (FilterWorkload, CrossEntropyWorkload, DivergenceWorkload):
        monkeypatch.setattr(kind, "make_small", lambda workload: workload)
    shape = {"vocab_size": 70, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    student, teacher = ((torch.float32, SimpleNamespace(hidden_size=width, **shape)) for width in (24, 16))
    lines: list[str] = []
    entries = tuning.tune_models(
        [student],  # type: ignore[list-item]
        torch.device("cpu"),
        teacher=teacher,  # type: ignore[arg-type]
        seconds=100.0,
        report=lines.append,
    )
    assert [(problem.operator, problem.shape) for problem in entries] == [
        ("score", (70, 24)), ("logits", (70, 24)), ("draw", (70,)), ("filter", (70,)),
        ("attention", (4, 2, 16)),
        ("score", (70, 16)), ("logits", (70, 16)), ("cross_entropy", (70, 24)), ("divergence", (70, 24, 16)),
    ]  # fmt: skip
    assert lines[0].startswith(f"{len(compiled)} candidates compiled in ")
    assert lines[1].startswith("score 70 x 24 float32: 1..64: 1 us (shipped 1), 65..128: 1 us")
    assert lines[5] == "attention 4 x 2 x 16 float32: all rows: 1 us (shipped 1)"
    assert lines[8] == "cross_entropy 70 x 24 float32: all rows: 1 us (shipped 1)"
    assert len(lines) == 10, lines


def test_the_digest_tells_rows_that_depend_on_their_batch() -> None:
    class Batched:
        operator, samples = "draw", ((3,), (4,))

        def make_run(self, values: Any, sample: int, first: int = 0) -> Any:
            rows = torch.arange(first, first + sample).float()
            return lambda: (rows + sample if values["bad"] else rows,)

        def check(self, outputs: Any, sample: int) -> None:
            pass

    alone: Any = Batched()
    digests = {
        bad: [measure(alone, c, {"bad": bad}, lambda run, is_long: 1.0).digest for c in (0, 1)] for bad in (False, True)
    }
    assert digests[True][0] == "varies"
    assert digests[False][0] != "varies"
