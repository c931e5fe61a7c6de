"""The experts' kernels, through Triton's interpreter, against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from genssd.kernels import experts_triton
from genssd.kernels.experts_triton import ExpertTiles

ROUNDING = {torch.float32: 2.0**-20, torch.float16: 2.0**-10}  # bf16 is truncated by the interpreter
TILES = ExpertTiles(block_t=4, block_m=8, block_d=16, num_warps=1, num_stages=1, interpret=True)


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uninitialised memory is NaN, so that reading it shows."""
    empty = torch.empty
    monkeypatch.setattr(
        experts_triton.torch, "empty", lambda *size, **options: empty(*size, **options).fill_(torch.nan)
    )


def randn(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def place(expert_NK: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Return the order of products by expert, and where each expert begins."""
    sorted_T, order_T = expert_NK.flatten().sort(stable=True)
    return order_T, torch.searchsorted(sorted_T, torch.arange(experts + 1))


ROUTINGS = {
    "spread": [[0, 2, 5], [4, 2, 1], [5, 1, 0], [2, 4, 5], [0, 5, 2]],
    "all to the last": [[5]] * 9,
    "one row": [[3, 0]],
    "a full tile and one more": [[1], [1], [1], [1], [1], [4]],
}


@pytest.mark.parametrize(("dtype", "biased"), [(torch.float32, True), (torch.float16, False)])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_grouped_products(biased: bool, routing: str, dtype: torch.dtype) -> None:
    expert, experts, inputs, outputs = torch.tensor(ROUTINGS[routing]), 6, 37, 21
    (N, K), (order, start) = expert.shape, place(expert, experts)
    weight = randn(experts, outputs, inputs + 3, seed=1, dtype=dtype)[..., :inputs]
    bias = randn(experts, outputs, seed=2, dtype=dtype) if biased else None
    x, by_product = randn(N, inputs, seed=3, dtype=dtype), randn(N * K, inputs, seed=4, dtype=dtype)
    chosen = expert.flatten()
    addend = torch.zeros(N * K, outputs).double() if bias is None else bias[chosen].double()
    gathered = experts_triton.multiply_grouped(x, weight, bias, order, start, K, TILES, gather=True)
    close = {"atol": 16 * ROUNDING[dtype], "rtol": ROUNDING[dtype]}
    exact = torch.einsum("tmd,td->tm", weight[chosen].double(), x.double().repeat_interleave(K, 0)) + addend
    torch.testing.assert_close(gathered.double(), exact[order], **close)
    scattered = experts_triton.multiply_grouped(by_product, weight, bias, order, start, K, TILES, gather=False)
    exact = torch.einsum("tmd,td->tm", weight[chosen[order]].double(), by_product.double())
    torch.testing.assert_close(scattered.double()[order], exact + addend[order], **close)


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("top_k", [1, 3, 4])
def test_sums_are_taken_in_the_order_of_experts(top_k: int, dtype: torch.dtype) -> None:
    y, weight = randn(5 * top_k, 70, seed=1, dtype=dtype), randn(5, top_k, seed=2, dtype=dtype)
    expert = torch.stack([torch.randperm(200, generator=torch.Generator().manual_seed(n))[:top_k] for n in range(5)])
    ours = experts_triton.sum_products(y, expert, weight, block=32)
    total = torch.zeros(5, 70)
    for k in expert.argsort(1).unbind(1):
        row = torch.arange(5)
        total += weight[row, k, None].float() * y.view(5, top_k, 70)[row, k].float()
    assert torch.equal(ours, total.to(dtype))


def test_a_row_has_the_same_bits_in_any_batch() -> None:
    expert = torch.tensor(ROUTINGS["spread"])
    x, weight = randn(5, 20, seed=1, dtype=torch.float32), randn(6, 9, 20, seed=2, dtype=torch.float32)
    order, start = place(expert, 6)
    whole = experts_triton.multiply_grouped(x, weight, None, order, start, 3, TILES, gather=True)
    order_alone, start_alone = place(expert[3:4], 6)
    alone = experts_triton.multiply_grouped(x[3:4], weight, None, order_alone, start_alone, 3, TILES, gather=True)
    assert torch.equal(alone, whole[[int((order == 9 + k).nonzero()) for k in order_alone.tolist()]])


def test_the_number_of_programs_is_bounded_without_the_routing() -> None:
    """Whatever experts the rows have, their tiles are at most as many as programs."""
    for experts, top_k, count in ((6, 3, 5), (128, 8, 1), (128, 8, 40), (4, 2, 100)):
        for seed in range(20):
            generator = torch.Generator().manual_seed(seed)
            expert = torch.stack([torch.randperm(experts, generator=generator)[:top_k] for _ in range(count)])
            rows = torch.bincount(expert.flatten(), minlength=experts)
            tiles = int((-(-rows // TILES.block_t)).sum())
            assert tiles <= experts_triton.count_programs(count * top_k, experts, TILES)
