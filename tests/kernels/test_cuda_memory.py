"""Memory that the operators over a head take on a CUDA device, at real sizes and without a GPU.

The device is fake (support/fake_cuda.py): no kernel runs, and the storages that are in use are added up. What cuBLAS
and torch's own kernels allocate is not seen; tests/kernels/gpu/test_head.py measures the same on a real device.
"""

from __future__ import annotations

import pytest
import torch
from support.fake_cuda import FakeCuda
from support.head_memory import BUDGETS, MIB, ROWS, VOCABULARY, WIDTH

from genssd.kernels import tune_file
from genssd.kernels.cross_entropy import linear_cross_entropy

pytest.importorskip("triton")

from genssd.kernels import loss_launch_triton
from genssd.kernels.candidates_triton import Device
from genssd.kernels.loss_candidates_triton import loss_candidates

FEWER_ROWS = {"score with top k": 512}
"""Operators that take a few rows at a time: more rows are more of the same, and logits of 512 take 297 MiB."""


def peak_mib(name: str) -> float:
    rows = FEWER_ROWS.get(name, ROWS)
    hidden = torch.empty(rows, WIDTH, device="cuda:0", dtype=torch.bfloat16)
    weight = torch.empty(VOCABULARY, WIDTH, device="cuda:0", dtype=torch.bfloat16)
    target = torch.empty(rows, device="cuda:0", dtype=torch.int64)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    BUDGETS[name][0](hidden, weight, target)
    return (torch.cuda.max_memory_allocated() - before) / MIB


@pytest.mark.parametrize("name", BUDGETS)
def test_memory_beyond_the_inputs(name: str) -> None:
    with FakeCuda(computes=False):
        assert peak_mib(name) < BUDGETS[name][1]


@pytest.mark.parametrize("name", ["cross-entropy", "cross-entropy, frozen head", "divergence"])
def test_memory_of_the_candidates_of_a_loss(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(torch.device("cuda", 0), amd=False, capability=90, multiprocessors=132)
    operator: tune_file.Operator = "divergence" if name == "divergence" else "cross_entropy"
    for candidate in loss_candidates(operator, device, torch.bfloat16):
        monkeypatch.setattr(loss_launch_triton, "choose_shipped", lambda *_, chosen=candidate, **__: chosen)
        with FakeCuda(computes=False) as fake:
            assert peak_mib(name) < BUDGETS[name][1], candidate
        assert ("_write_kernel" in fake.kernels) == candidate.fused


def test_the_backward_pass_fills_no_zeros() -> None:
    """It allocates the gradients in the dtypes of the inputs, and nothing else."""
    rows, width = 512, 1024
    with FakeCuda(computes=False):
        hidden, weight = (torch.empty(n, width, device="cuda:0", dtype=torch.bfloat16) for n in (rows, VOCABULARY))
        target = torch.empty(rows, device="cuda:0", dtype=torch.int64)
        loss = linear_cross_entropy(hidden.requires_grad_(), weight.requires_grad_(), target).total
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        torch.autograd.grad(loss, (hidden, weight))
        gradients = 2 * (rows + VOCABULARY) * width
        assert gradients <= torch.cuda.max_memory_allocated() - before < gradients + MIB


def test_the_sum_counts_what_is_in_use() -> None:
    with FakeCuda(computes=False) as device:
        kept = torch.empty(MIB, device="cuda:0")
        dropped = kept + 1
        view = kept[5:]
        assert device.memory_allocated() == 8 * MIB
        del dropped
        assert device.memory_allocated() == 4 * MIB
        assert device.max_memory_allocated() == 8 * MIB
        del kept
        assert device.memory_allocated() == 4 * MIB, "a view keeps its storage"
        del view
        assert device.memory_allocated() == 0
