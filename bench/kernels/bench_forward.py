"""Benchmarks of the forward pass's operators, cache copies and attention mass against eager torch.

Run: `make bench` (small shapes on a CPU, those of an 8B model on a GPU). Every implementation is
checked against float64 before it is timed, on a cold cache. share_of_copy in extra_info is the rate at which the
necessary bytes were moved, divided by the rate of a copy. With few rows on a GPU it shows the cost of a launch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from bench.support.device_limits import DeviceLimits
from bench.support.measuring import DEVICE, DTYPE, GPU, assert_close, measure
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from genssd.kernels.activation import (
    clamped_swiglu,
    clamped_swiglu_reference,
    geglu,
    geglu_reference,
    swiglu,
    swiglu_reference,
)
from genssd.kernels.attention_mass import attention_mass, attention_mass_reference
from genssd.kernels.cache import copy_pages, copy_pages_reference, write_kv
from genssd.kernels.experts import ExpertWeights, expert_mlp, expert_mlp_reference, route
from genssd.kernels.norm import add_rms_norm, add_rms_norm_reference, rms_norm_reference
from genssd.kernels.packed_keys import split_layer, unpack_keys
from genssd.kernels.rotary import rotary
from genssd.kernels.weight import pack_weight

ROWS = [64, 8192] if GPU else [16, 256]  # of a decoding step; of prefill or scoring
WIDTH, FEED, HEADS, KV_HEADS, HEAD = (4096, 12288, 32, 8, 128) if GPU else (1024, 3072, 16, 8, 64)
LAYERS, PAGES, PAGE = (36, 1024, 16) if GPU else (8, 64, 16)
EXPERTS, TOP_K, EXPERT_FEED = (128, 8, 768) if GPU else (16, 4, 384)
TOLERANCE = 1e-5 if torch.float32 == DTYPE else 3e-2
EPS = 1e-6


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(0)).to(DTYPE)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("implementation", ["genssd", "eager"])
def test_add_norm(benchmark: BenchmarkFixture, limits: DeviceLimits, implementation: str, rows: int) -> None:
    """Time the residual sum and the norm after it: two tensors read, two written."""
    run = {"genssd": add_rms_norm, "eager": add_rms_norm_reference}[implementation]
    x, residual, weight = normal(rows, WIDTH), normal(rows, WIDTH), normal(WIDTH)
    for actual, exact in zip(
        run(x, residual, weight, EPS),
        add_rms_norm_reference(x.double(), residual.double(), weight.double(), EPS),
        strict=True,
    ):
        assert_close(actual, exact, TOLERANCE)
    measure(
        benchmark, limits, lambda: run(x, residual, weight, EPS), group=f"add-norm {rows}x{WIDTH}", flops=0.0,
        num_bytes=4 * x.nbytes,
    )  # fmt: skip


GATED: dict[str, dict[str, Callable[[Tensor], Tensor]]] = {
    "swiglu": {"genssd": swiglu, "eager": lambda x: torch.nn.functional.silu(x.chunk(2, 1)[0]) * x.chunk(2, 1)[1]},
    "geglu": {
        "genssd": geglu,
        "eager": lambda x: torch.nn.functional.gelu(x.chunk(2, 1)[0], approximate="tanh") * x.chunk(2, 1)[1],
    },
    "clamped_swiglu": {"genssd": clamped_swiglu, "eager": clamped_swiglu_reference},
}


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("name", GATED)
@pytest.mark.parametrize("implementation", ["genssd", "eager"])
def test_gated_units(
    benchmark: BenchmarkFixture, limits: DeviceLimits, implementation: str, name: str, rows: int
) -> None:
    run = GATED[name][implementation]
    gate_up = normal(rows, 2 * FEED)
    reference = {
        "swiglu": swiglu_reference, "geglu": geglu_reference, "clamped_swiglu": clamped_swiglu_reference,
    }[name]  # fmt: skip
    assert_close(run(gate_up), reference(gate_up.double()), TOLERANCE)
    measure(
        benchmark, limits, lambda: run(gate_up), group=f"{name} {rows}x{FEED}", flops=0.0,
        num_bytes=3 * gate_up.nbytes // 2,
    )  # fmt: skip


@pytest.mark.parametrize("rows", [1, *ROWS])
@pytest.mark.parametrize("implementation", ["genssd", "eager"])
def test_experts(benchmark: BenchmarkFixture, limits: DeviceLimits, implementation: str, rows: int) -> None:
    """Time the experts of one layer: eager torch runs one after the other on their rows. num_bytes counts the weights
    of all experts that a row goes through."""
    gate_up, down = normal(EXPERTS, 2 * EXPERT_FEED, WIDTH) / 32, normal(EXPERTS, WIDTH, EXPERT_FEED) / 32
    live = ExpertWeights(gate_up=gate_up, down=down)
    fast = live if GPU else ExpertWeights(gate_up=tuple(map(pack_weight, gate_up)), down=tuple(map(pack_weight, down)))
    h, (expert, weight) = normal(rows, WIDTH), route(normal(rows, EXPERTS), TOP_K, normalize=True, select_first=False)

    def run() -> Tensor:
        if implementation == "genssd":
            return expert_mlp(h, expert, weight, fast, activation=swiglu)
        return expert_mlp_reference(h, expert, weight, live, activation=swiglu_reference)

    wide = ExpertWeights(gate_up=gate_up.double(), down=down.double())
    exact = expert_mlp_reference(h.double(), expert, weight.double(), wide, activation=swiglu_reference)
    assert_close(run(), exact, TOLERANCE)
    used = len(expert.unique()) * (gate_up[0].nbytes + down[0].nbytes)
    measure(
        benchmark, limits, run, group=f"experts {rows} rows", flops=6 * rows * TOP_K * WIDTH * EXPERT_FEED,
        num_bytes=used + 2 * h.nbytes,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Write:
    """Keys and values that one layer writes for a batch of rows, and their slots in the cache."""

    qkv: Tensor
    cos: Tensor
    sin: Tensor
    k_pages: Tensor
    v_pages: Tensor
    slot: Tensor
    norm: Tensor

    def run_genssd(self) -> Tensor:
        return write_kv(
            self.qkv, self.cos, self.sin, self.k_pages, self.v_pages, self.slot, heads=HEADS, q_norm=self.norm,
            k_norm=self.norm, eps=EPS,
        )  # fmt: skip

    def run_eager(self) -> Tensor:
        q, k, v = self.qkv[:, :HEADS], self.qkv[:, HEADS:-KV_HEADS], self.qkv[:, -KV_HEADS:]
        q, k = (rotary(rms_norm_reference(x, self.norm, EPS), self.cos, self.sin) for x in (q, k))
        self.k_pages.flatten(0, 1).index_copy_(0, self.slot, k)
        self.v_pages.flatten(0, 1).index_copy_(0, self.slot, v)
        return q


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("implementation", ["genssd", "eager"])
def test_write_kv(benchmark: BenchmarkFixture, limits: DeviceLimits, implementation: str, rows: int) -> None:
    """Time the norms of the heads, the rotation and the write into the cache: qkv read once and written once."""
    pages = torch.zeros(2, PAGES, PAGE, KV_HEADS, HEAD, device=DEVICE, dtype=DTYPE)
    k_pages, v_pages = split_layer(pages) if implementation == "genssd" else pages
    angle = normal(rows, HEAD // 2).float()
    slot = torch.randperm(PAGES * PAGE, device=DEVICE)[:rows]
    qkv = normal(rows, HEADS + 2 * KV_HEADS, HEAD)
    write = Write(qkv, angle.cos(), angle.sin(), k_pages, v_pages, slot, normal(HEAD))
    run = {"genssd": write.run_genssd, "eager": write.run_eager}[implementation]
    normed = rms_norm_reference(qkv[:, :-KV_HEADS].double(), write.norm.double(), EPS)
    exact = rotary(normed, write.cos, write.sin)
    assert_close(run(), exact[:, :HEADS], TOLERANCE)
    keys = unpack_keys(k_pages, HEAD) if k_pages.ndim == 5 else k_pages
    assert_close(keys.flatten(0, 1)[slot], exact[:, HEADS:], TOLERANCE)
    assert torch.equal(v_pages.flatten(0, 1)[slot], qkv[:, -KV_HEADS:])
    measure(benchmark, limits, run, group=f"write-kv {rows} rows", flops=0.0, num_bytes=2 * qkv.nbytes)


@pytest.mark.parametrize("implementation", ["genssd", "eager"])
def test_copy_pages(benchmark: BenchmarkFixture, limits: DeviceLimits, implementation: str) -> None:
    """Time the copy of sixteen pages of all layers, as when branches fork."""
    copy = {"genssd": copy_pages, "eager": copy_pages_reference}[implementation]
    kv = normal(LAYERS, 2, 64, PAGE, KV_HEADS, HEAD)
    source, destination = torch.arange(16, device=DEVICE), torch.arange(40, 56, device=DEVICE)
    copy(kv, source, destination)
    assert torch.equal(kv[:, :, 40:56], kv[:, :, :16])
    measure(
        benchmark, limits, lambda: copy(kv, source, destination), group="copy 16 pages", flops=0.0,
        num_bytes=2 * kv.nbytes // 4,
    )  # fmt: skip


@pytest.mark.parametrize("implementation", ["genssd", "eager"])
def test_attention_mass(benchmark: BenchmarkFixture, limits: DeviceLimits, implementation: str) -> None:
    """Time forward and backward pass of the attention mass of one layer.

    The last three quarters of the tokens belong to steps, and one token in sixteen to a word. flops counts 5 products
    between the rows and half of the keys each.
    """
    mass_operator = {"genssd": attention_mass, "eager": attention_mass_reference}[implementation]
    tokens = 8192 if GPU else 256
    q, k = normal(tokens, HEADS, HEAD).requires_grad_(), normal(tokens, KV_HEADS, HEAD).requires_grad_()
    place = torch.arange(tokens, device=DEVICE)
    step = torch.where(place >= tokens // 4, (place - tokens // 4) // 64, -1)
    word = torch.where(place % 16 == 3, place // 16 % 24, -1)
    steps = int(step.max()) + 1

    def mass(q: Tensor, k: Tensor) -> Tensor:
        return mass_operator(q, k, step, word, steps=steps, words=24, scale=HEAD**-0.5)

    exact = attention_mass_reference(q.double(), k.double(), step, word, steps=steps, words=24, scale=HEAD**-0.5)
    torch.testing.assert_close(mass(q, k).double(), exact, atol=1e-3, rtol=1e-3)

    def training_step() -> None:
        q.grad = k.grad = None
        mass(q, k).square().sum().backward()

    rows = tokens - tokens // 4
    measure(
        benchmark, limits, training_step, group=f"attention mass {tokens}", flops=5 * rows * tokens * HEADS * HEAD,
        num_bytes=4 * (q.nbytes + k.nbytes),
    )  # fmt: skip
