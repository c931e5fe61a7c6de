"""The experts' kernels on a real device: values against float64, bits against themselves, capture into a graph."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from genssd.kernels.activation import clamped_swiglu, swiglu
from genssd.kernels.experts import ExpertWeights, expert_mlp, expert_mlp_reference, route

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

UNIT = {torch.float32: 2.0**-20, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def normal(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, device="cuda", generator=torch.Generator("cuda").manual_seed(seed)).to(dtype)


def layer(experts: int, width: int, feed: int, dtype: torch.dtype, *, biased: bool) -> ExpertWeights:
    return ExpertWeights(
        gate_up=normal(experts, 2 * feed, width, dtype=dtype, seed=1) / width**0.5,
        gate_up_bias=normal(experts, 2 * feed, dtype=dtype, seed=2) if biased else None,
        down=normal(experts, width, feed, dtype=dtype, seed=3) / feed**0.5,
        down_bias=normal(experts, width, dtype=dtype, seed=4) if biased else None,
    )


def routing(rows: int, experts: int, top_k: int, dtype: torch.dtype, seed: int = 5) -> tuple[Tensor, Tensor]:
    return route(normal(rows, experts, dtype=dtype, seed=seed), top_k, normalize=True, select_first=False)


@pytest.mark.parametrize("dtype", UNIT, ids=str)
@pytest.mark.parametrize(
    ("experts", "top_k", "width", "feed"), [(8, 2, 512, 384), (128, 8, 256, 96), (32, 4, 180, 90), (5, 1, 37, 21)]
)
@pytest.mark.parametrize("rows", [1, 7, 300, 2000])
def test_values(rows: int, experts: int, top_k: int, width: int, feed: int, dtype: torch.dtype) -> None:
    biased = experts == 32  # as in GPT-OSS
    activation = clamped_swiglu if biased else swiglu
    weights, h = layer(experts, width, feed, dtype, biased=biased), normal(rows, width, dtype=dtype)
    expert, weight = routing(rows, experts, top_k, dtype)
    found = expert_mlp(h, expert, weight, weights, activation=activation)
    wide = ExpertWeights(
        **{
            name: None if getattr(weights, name) is None else getattr(weights, name).double()
            for name in ("gate_up", "gate_up_bias", "down", "down_bias")
        }
    )
    exact = expert_mlp_reference(h.double(), expert, weight.double(), wide, activation=activation)
    # inner results are rounded, and the products sum their roundings up
    torch.testing.assert_close(
        found.double(), exact, atol=8 * UNIT[dtype] * float(exact.abs().max()), rtol=4 * UNIT[dtype]
    )


def test_a_row_has_the_same_bits_among_as_many_rows() -> None:
    """Their number chooses the tiles; who the others are, and where the row stands, decides nothing."""
    weights, h = layer(16, 256, 128, torch.bfloat16, biased=True), normal(40, 256, dtype=torch.bfloat16)
    expert, weight = routing(40, 16, 4, torch.bfloat16)
    whole = expert_mlp(h, expert, weight, weights, activation=swiglu)
    order = torch.randperm(40, device="cuda")
    again = expert_mlp(h[order], expert[order], weight[order], weights, activation=swiglu)
    assert torch.equal(again, whole[order])
    part = slice(0, 30)
    assert torch.equal(expert_mlp(h[part], expert[part], weight[part], weights, activation=swiglu), whole[part])


def test_a_captured_graph_serves_other_routings() -> None:
    weights, h = layer(64, 256, 128, torch.bfloat16, biased=False), normal(12, 256, dtype=torch.bfloat16)
    logits = normal(12, 64, dtype=torch.bfloat16)

    def step() -> Tensor:
        expert, weight = route(logits, 6, normalize=True, select_first=False)
        return expert_mlp(h, expert, weight, weights, activation=swiglu)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    for seed in range(3):
        logits.copy_(normal(12, 64, dtype=torch.bfloat16, seed=seed))
        if seed == 2:
            logits[:] = torch.arange(64, device="cuda")  # all rows choose the same experts
        graph.replay()
        assert torch.equal(found, step())
