"""Benchmarks of decode attention of branches after a shared prefix, with and without sharing, against other libraries.

Run: `make bench` (small shapes on a CPU, those of an 8B model on a GPU). Every implementation is
checked against float64 before it is timed, and the cache is flushed before every round. All read the same pages.
share_of_copy in extra_info is the rate at which the distinct keys and values are read, divided by the rate of a copy,
so 1 is the limit of the device. The preparation of a step (tables, plans, masks) is not timed;
bench/kernels/segment_table.py times it for genssd.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bench.kernels.bench_head import import_or_skip
from bench.support.device_limits import DeviceLimits, flush_cache, synchronize
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from genssd.kernels.attention import QUERY_VECTORS_PER_UNIT, SEGMENT_TOKENS, build_segment_table, paged_attention
from genssd.kernels.device_table import DeviceTable
from genssd.kernels.packed_keys import pack_keys

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda:0" if GPU else "cpu")
DTYPE = torch.bfloat16 if GPU else torch.float32
HEADS, KV_HEADS, WIDTH, PAGE = (32, 8, 128, 64) if GPU else (8, 4, 64, 16)
OWN = 64  # tokens of a branch after the prefix
LARGEST_COPY = 8 << 30  # largest size in bytes of the keys and values that an implementation may gather

SHAPES = (
    [(branches, prefix) for prefix in (128, 1536, 4608, 32768) for branches in (1, 8, 64, 256)]
    if GPU
    else [(8, 128), (8, 1024), (64, 1024)]
)
"""(branches, tokens of the prefix). Most prefixes end within a segment, whose tokens every branch then reads itself."""


@dataclasses.dataclass(frozen=True, slots=True)
class Step:
    """Inputs of one decoding step: one query token per branch. pages: int32 [branches, pages of a branch]."""

    branches: int
    prefix: int
    q: Tensor
    kv: Tensor
    pages: Tensor

    @staticmethod
    def random(branches: int, prefix: int) -> Step:
        shared, own = prefix // PAGE, OWN // PAGE
        generator = torch.Generator(DEVICE).manual_seed(0)
        total = shared + branches * own
        order = torch.randperm(total, generator=generator, device=DEVICE).int()
        pages = torch.cat((order[:shared].expand(branches, -1), order[shared:].view(branches, own)), 1)
        sizes = (KV_HEADS, PAGE) if GPU else (PAGE, KV_HEADS)
        kv = torch.randn(2, total, *sizes, WIDTH, generator=generator, device=DEVICE).to(DTYPE)
        kv = kv.transpose(2, 3) if GPU else kv  # the engine's layout
        q = torch.randn(branches, HEADS, WIDTH, generator=generator, device=DEVICE).to(DTYPE)
        return Step(branches, prefix, q, kv, pages)

    def gather(self, rows: slice = slice(None)) -> Tensor:
        """Gather the keys and values of each branch: [2, branches, kv heads, tokens, width]."""
        return self.kv[:, self.pages[rows].long()].flatten(2, 3).transpose(2, 3)

    @property
    def length(self) -> int:
        return self.prefix + OWN

    @property
    def copy_bytes(self) -> int:
        return self.branches * self.length * 2 * KV_HEADS * WIDTH * self.kv.element_size()

    def exact(self, rows: slice) -> Tensor:
        k, v = self.gather(rows).double().repeat_interleave(HEADS // KV_HEADS, 2)
        z = torch.einsum("bhe,bhte->bht", self.q[rows].double(), k) * WIDTH**-0.5
        return torch.einsum("bht,bhte->bhe", z.softmax(-1), v)


def genssd(step: Step, unit_rows: int, segment: int = SEGMENT_TOKENS[DEVICE.type]) -> Callable[[], Tensor]:
    one = torch.ones(step.branches, dtype=torch.int32)
    table = build_segment_table(
        step.pages.cpu(), torch.arange(step.branches, dtype=torch.int32), one * (step.length - 1), one,
        page_size=PAGE, segment=segment, unit_rows=unit_rows,
    )  # fmt: skip
    device_table = DeviceTable.upload(table, DEVICE) if GPU else table
    k = step.kv[0] if GPU else pack_keys(step.kv[0])
    return lambda: paged_attention(step.q, k, step.kv[1], device_table, scale=WIDTH**-0.5)


def eager(step: Step) -> Callable[[], Tensor]:
    def run() -> Tensor:
        k, v = step.gather()
        q = step.q.view(step.branches, KV_HEADS, -1, WIDTH)
        weight = (q @ k.transpose(2, 3) * WIDTH**-0.5).float().softmax(-1).to(DTYPE)
        return (weight @ v).view(step.branches, HEADS, WIDTH)

    return run


def sdpa(step: Step) -> Callable[[], Tensor]:
    """Return torch's attention over keys and values that were gathered before."""
    k, v = step.gather().contiguous()
    attend = torch.nn.functional.scaled_dot_product_attention
    return lambda: attend(step.q[:, :, None], k, v, enable_gqa=True)[:, :, 0]


def flex(step: Step) -> Callable[[], Tensor]:
    """Return flex attention with all branches as rows of one sequence over all pages, each masked to its own pages.

    It reads a shared page once, too.
    """
    if not GPU:
        pytest.skip("compiles for GPUs alone")
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    reads = torch.zeros(step.branches, step.kv.shape[1], dtype=torch.bool, device=DEVICE)
    reads.scatter_(1, step.pages.long(), True)
    mask = create_block_mask(
        lambda b, h, row, token: reads[row, token // PAGE], None, None, step.branches, step.kv.shape[1] * PAGE, DEVICE
    )
    k, v = step.kv.flatten(1, 2).transpose(1, 2)[:, None].contiguous()
    attend = torch.compile(flex_attention)
    q = step.q.transpose(0, 1)[None].contiguous()
    return lambda: attend(q, k, v, block_mask=mask, enable_gqa=True)[0].transpose(0, 1)


def transformers_paged(step: Step) -> Callable[[], Tensor]:
    """Return transformers' eager paged attention, which concatenates the keys of all sequences and masks them."""
    attend = import_or_skip("transformers.integrations.eager_paged", "eager_paged_attention_forward")
    tokens = (step.pages.long()[..., None] * PAGE + torch.arange(PAGE, device=DEVICE)).flatten()

    class Cache:
        def update(self, **_: object) -> tuple[Tensor, Tensor]:
            k, v = step.kv.flatten(1, 2)[:, tokens].transpose(1, 2)[:, None]
            return k, v

    owner = torch.arange(step.branches, device=DEVICE)
    mask = torch.zeros(1, 1, step.branches, len(tokens), dtype=DTYPE, device=DEVICE)
    mask.masked_fill_(owner[:, None] != owner.repeat_interleave(step.length), torch.finfo(DTYPE).min)
    module: Any = torch.nn.Module()
    module.layer_idx, module.num_key_value_groups = 0, HEADS // KV_HEADS
    q = step.q.transpose(0, 1)[None]
    return lambda: attend(module, q, q, q, mask, WIDTH**-0.5, cache=Cache())[0][0]


def flashinfer(step: Step, cascade: bool) -> Callable[[], Tensor]:
    """Return flashinfer's paged attention; cascade: with a level of its own for the shared prefix."""
    name = "MultiLevelCascadeAttentionWrapper" if cascade else "BatchDecodeWithPagedKVCacheWrapper"
    wrapper = import_or_skip("flashinfer", name)
    workspace = torch.empty(256 << 20, dtype=torch.uint8, device=DEVICE)
    shared, total = step.prefix // PAGE, step.length // PAGE

    def plan(count: int, pages: Tensor) -> list[Tensor]:
        """Return indptr, page indices and filled slots of the last page for `count` sequences of equal length."""
        indptr = torch.arange(count + 1, device=DEVICE, dtype=torch.int32) * (pages.numel() // count)
        full = torch.full((count,), PAGE, device=DEVICE, dtype=torch.int32)
        return [indptr, pages.flatten().contiguous(), full]

    sizes = (HEADS, KV_HEADS, WIDTH, PAGE)
    kv = step.kv.transpose(0, 1).contiguous()  # flashinfer's layout
    if not cascade:
        attention = wrapper(workspace, "NHD", use_tensor_cores=True)
        attention.plan(*plan(step.branches, step.pages), *sizes, q_data_type=DTYPE, kv_data_type=DTYPE)
        return lambda: attention.run(step.q, kv)
    attention = wrapper(2, workspace, "NHD")
    rows = [torch.tensor(x, device=DEVICE, dtype=torch.int32) for x in ([0, step.branches], range(step.branches + 1))]
    levels = plan(1, step.pages[0, :shared]), plan(step.branches, step.pages[:, shared:total])
    attention.plan(rows, *(list(parts) for parts in zip(*levels, strict=True)), *sizes, q_data_type=DTYPE)
    return lambda: attention.run(step.q, kv)


IMPLEMENTATIONS: dict[str, Callable[[Step], Callable[[], Tensor]]] = {
    "genssd": lambda step: genssd(step, QUERY_VECTORS_PER_UNIT[DEVICE.type] // (HEADS // KV_HEADS)),
    "genssd-segments-of-256": lambda step: genssd(
        step, QUERY_VECTORS_PER_UNIT[DEVICE.type] // (HEADS // KV_HEADS), 256
    ),
    "genssd-segments-of-1024": lambda step: genssd(
        step, QUERY_VECTORS_PER_UNIT[DEVICE.type] // (HEADS // KV_HEADS), 1024
    ),
    "genssd-unshared": lambda step: genssd(step, 1),
    "eager": eager,
    "sdpa": sdpa,
    "flex": flex,
    "transformers": transformers_paged,
    "flashinfer": lambda step: flashinfer(step, cascade=False),
    "flashinfer-cascade": lambda step: flashinfer(step, cascade=True),
}
GATHERING = ("eager", "sdpa", "transformers")


@pytest.mark.parametrize(("branches", "prefix"), SHAPES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_decoding(
    benchmark: BenchmarkFixture, limits: DeviceLimits, implementation: str, branches: int, prefix: int
) -> None:
    step = Step.random(branches, prefix)
    if implementation in GATHERING and step.copy_bytes > LARGEST_COPY:
        pytest.skip(f"would gather {step.copy_bytes >> 30} GiB")
    if implementation == "transformers" and branches * step.copy_bytes > 4 * LARGEST_COPY:
        pytest.skip("every row would be multiplied with the keys of all branches")
    run = IMPLEMENTATIONS[implementation](step)
    few = slice(0, 2)
    tolerance = 2e-2 if GPU else 1e-5
    torch.testing.assert_close(run()[few].double(), step.exact(few), atol=tolerance, rtol=tolerance)

    def timed() -> None:
        run()
        synchronize(DEVICE.type)

    timed()
    benchmark.group = f"decoding, {branches} branches behind {prefix} tokens"
    benchmark.pedantic(timed, setup=lambda: flush_cache(DEVICE.type), rounds=15 if GPU else 5, warmup_rounds=1)
    seconds = benchmark.stats.stats.median
    benchmark.extra_info |= {
        "gbps": step.kv.nbytes / seconds / 1e9,
        "share_of_copy": step.kv.nbytes / seconds / limits.bytes,
    }
