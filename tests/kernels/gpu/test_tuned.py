"""`genssd tune` on a real device, for a small head: what it keeps is used, and rows keep their bits."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor

from genssd.engine.models.tuning import time_in_graph, tune
from genssd.kernels import loss_candidates_triton, tune_file, tuned
from genssd.kernels.candidates_triton import Device, HeadWorkload
from genssd.kernels.logprob import STATISTICS, linear_logprob
from genssd.kernels.loss_candidates_triton import CrossEntropyWorkload, DivergenceWorkload
from genssd.kernels.sampling import linear_sample

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

V, D = 32000, 256
LOSSES = {"cross_entropy": (V, D), "divergence": (V, D, 2 * D)}


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tune file that holds what was measured here for a small head."""
    path = tmp_path / "tune.json"
    monkeypatch.setenv("GENSSD_TUNE_FILE", str(path))
    device = torch.device("cuda", 0)
    failures: list[str] = []
    entries = {}
    for operator in tune_file.HEAD_OPERATORS:
        workload = HeadWorkload(operator, Device.of(device), torch.bfloat16, V, D)
        result = tune(workload, timer=time_in_graph, is_over=lambda: False, report=failures.append)
        assert result is not None, failures
        assert None not in result.shipped, failures
        assert result.entry.deterministic is not None
        entries[result.problem] = result.entry
    tune_file.add_entries(path, tuned.card_of(device), entries)
    tuned.forget()
    return path


def test_rows_have_the_bits_that_they_have_alone(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    hidden = torch.randn(1030, D, device="cuda").bfloat16()
    weight = (3 / D**0.5 * torch.randn(V, D, device="cuda")).bfloat16()
    target = torch.arange(1030, device="cuda")
    complete = linear_logprob(hidden, weight, target)
    tokens = linear_sample(hidden, weight, target).tokens
    for count in (1, 64, 65, 128, 129, 512, 513):
        part = linear_logprob(hidden[:count], weight, target[:count])
        for name in STATISTICS:
            assert torch.equal(getattr(part, name), getattr(complete, name)[:count]), (count, name)
        assert torch.equal(linear_sample(hidden[:count], weight, target[:count]).tokens, tokens[:count])
    with tuned.launch_mode(deterministic=False):
        fastest = linear_logprob(hidden, weight, target)
    torch.testing.assert_close(fastest.logprob, complete.logprob, atol=1e-4, rtol=1e-5)
    assert caplog.records == []
    tuned.forget()


@pytest.mark.parametrize("operator", LOSSES)
def test_every_candidate_of_a_loss_agrees_with_float32(operator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values, the same bits in every run, and a captured graph; chunks of 1024 and 2048 rows leave a shorter one."""
    rows = 2500
    monkeypatch.setattr(loss_candidates_triton, "ROWS", rows)
    loss_candidates_triton.loss_head.cache_clear()
    arguments = Device.of(torch.device("cuda", 0)), torch.bfloat16, LOSSES[operator]
    entropy = operator == "cross_entropy"
    workload = CrossEntropyWorkload(*arguments) if entropy else DivergenceWorkload(*arguments)
    samples = (rows,) if entropy else workload.samples[0]
    for values in workload.candidates(0):
        for sample in samples:
            run = workload.make_run(values, sample)
            outputs: tuple[Tensor, ...] = run()
            workload.check(outputs, sample)
            assert all(map(torch.equal, run(), outputs)), values
            assert time_in_graph(run, True) > 0.0
    loss_candidates_triton.loss_head.cache_clear()
