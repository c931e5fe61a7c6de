"""Attention's Triton kernels on a real device: values against float64, bits against themselves, memory reads."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from genssd import _core
from genssd.kernels.attention import (
    SEGMENT_TOKENS,
    SegmentTable,
    build_segment_table,
    paged_attention,
    paged_attention_reference,
)
from genssd.kernels.device_table import Capacity, DeviceTable, allocate_host_buffer, write_table

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

HALVES = [torch.bfloat16, torch.float16]
PAGE = 64


def normal(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, device="cuda", generator=torch.Generator("cuda").manual_seed(seed)).to(dtype)


class Branches:
    """Sequences that share a prefix, each with a private end; unwritten slots of the cache are NaN."""

    def __init__(
        self,
        prefix: int,
        ends: list[int],
        *,
        heads: int = 32,
        kv_heads: int = 8,
        width: int = 128,
        dtype: torch.dtype = torch.bfloat16,
        shared: bool = True,
        seed: int = 0,
        page: int = PAGE,
        boxes: bool = True,
    ) -> None:
        """Fill the cache. boxes: the tokens of a page and head are contiguous, as in the engine's cache."""
        self.page = page
        whole, count = prefix // page, len(ends)
        self.lengths = [prefix + end for end in ends]
        pages = [-(-length // page) for length in self.lengths]
        total = (whole if shared else 0) + sum(n - whole if shared else n for n in pages)
        order = np.random.default_rng(seed).permutation(total + 3).astype(np.int32)
        self.tables = np.zeros((count, max(pages)), dtype=np.int32)
        common = normal(2, prefix, kv_heads, width, dtype=dtype)
        sizes = (kv_heads, page) if boxes else (page, kv_heads)
        kv = torch.full((2, total + 3, *sizes, width), torch.nan, device="cuda", dtype=dtype)
        self.kv = kv.transpose(2, 3) if boxes else kv
        self.dense = []
        used = whole if shared else 0
        for i, (end, n) in enumerate(zip(ends, pages, strict=True)):
            own = normal(2, end, kv_heads, width, dtype=dtype, seed=1000 + i)
            self.dense.append(torch.cat((common, own), 1))
            first = whole if shared else 0
            self.tables[i, :first] = order[:first]
            self.tables[i, first:n] = order[used : used + n - first]
            used += n - first
            slot = torch.arange(self.lengths[i], device="cuda")
            pages_of_slots = torch.tensor(self.tables[i], device="cuda")[slot // page].long()
            self.kv[:, pages_of_slots, slot % page] = self.dense[i]
        self.q = normal(count, heads, width, dtype=dtype, seed=7)

    def table(
        self, which: list[int] | None = None, *, unit_rows: int = 16, window: int = 0, **joined: int
    ) -> SegmentTable:
        chosen = np.arange(len(self.lengths), dtype=np.int32) if which is None else np.array(which, dtype=np.int32)
        last = np.array(self.lengths, dtype=np.int32)[chosen] - 1
        return build_segment_table(
            *map(torch.from_numpy, (self.tables, chosen, last, np.ones_like(last))), page_size=self.page,
            segment=SEGMENT_TOKENS["cuda"], window=window, unit_rows=unit_rows, **joined,
        )  # fmt: skip

    def run(self, which: list[int] | None = None, *, unit_rows: int = 16, window: int = 0, **joined: int) -> Tensor:
        q = self.q if which is None else self.q[which]
        table = self.table(which, unit_rows=unit_rows, window=window, **joined)
        return paged_attention(q, *self.kv, table, scale=q.shape[2] ** -0.5)

    def exact(
        self,
        window: int = 0,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> Tensor:
        rows = []
        for q, kv in zip(self.q.to(dtype), self.dense, strict=True):
            k, v = kv[:, -window:].to(dtype).repeat_interleave(len(q) // kv.shape[2], 2)
            z = torch.einsum("he,the->ht", q, k) * q.shape[1] ** -0.5
            if softcap is not None:
                z = softcap * torch.tanh(z / softcap)
            if sinks is not None:
                z = torch.cat((z, sinks.to(dtype)[:, None]), 1)
            rows.append(torch.einsum("ht,the->he", z.softmax(1)[:, : len(k)], v))
        return torch.stack(rows)


def assert_close(ours: Tensor, exact: Tensor) -> None:
    """Weights and the result are rounded to the dtype; weights add up to 1, so an error is one of the largest value."""
    unit = {torch.float32: 2.0**-18, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}[ours.dtype]
    assert float((ours.double() - exact).abs().max()) <= unit * float(exact.abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("prefix", [2048, 2368])
def test_chains_and_shared_begins_of_segments_change_no_bit(prefix: int, dtype: torch.dtype) -> None:
    """Prefixes that end with a segment and within one; several segments in one program, and rows that go on from it."""
    problem = Branches(prefix, [1 + 7 * i for i in range(40)], dtype=dtype)
    plain = problem.run(unit_rows=32)
    for joined in ({"chain_programs": 2}, {"resume_tokens": 64}, {"chain_programs": 2, "resume_tokens": 64}):
        records = _core.DeviceRecords(problem.table(unit_rows=32, **joined))
        assert bool((records.rows[:, 5] > 0).any()) == ("resume_tokens" in joined and prefix % 512 > 0)
        together = problem.run(unit_rows=32, **joined)
        assert torch.equal(together, plain)
        for row in (0, 39):
            assert torch.equal(problem.run([row], unit_rows=32, **joined)[0], plain[row])
    assert_close(plain, problem.exact())


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "width"),
    [(14, 2, 64), (32, 8, 80), (9, 3, 96), (32, 8, 128), (8, 1, 256), (71, 1, 64), (4, 4, 128)],
)
def test_values(heads: int, kv_heads: int, width: int, dtype: torch.dtype) -> None:
    branches = Branches(2100, [1, 17, 300, 40, 1, 1100], heads=heads, kv_heads=kv_heads, width=width, dtype=dtype)
    assert_close(branches.run(), branches.exact())


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("window", [0, 1, 500, 1500])
def test_windows_caps_and_sinks(window: int, dtype: torch.dtype) -> None:
    branches = Branches(2100, [1, 17, 300, 40], dtype=dtype)
    sinks = torch.linspace(-4, 4, 32, device="cuda")
    out = paged_attention(
        branches.q, *branches.kv, branches.table(window=window), scale=128**-0.5, softcap=20.0, sinks_H=sinks
    )
    assert_close(out, branches.exact(window, 20.0, sinks))


def test_extending_equals_the_reference() -> None:
    """Many rows of few sequences, as in prefill."""
    q, kv = normal(700, 16, 128, dtype=torch.bfloat16), normal(2, 128, PAGE, 4, 128, dtype=torch.bfloat16)
    tables = torch.arange(128, dtype=torch.int32).view(2, 64)
    rows = torch.tensor([[0, 1], [324, 0], [500, 200]], dtype=torch.int32)
    table = build_segment_table(tables, *rows, page_size=PAGE, segment=256, unit_rows=16)
    exact = paged_attention_reference(q.double(), *kv.double(), table, scale=128**-0.5)
    assert_close(paged_attention(q, *kv, table, scale=128**-0.5), exact)


def test_a_prefix_of_32k() -> None:
    branches = Branches(32768, [1, 900, 5], heads=16, kv_heads=2)
    assert_close(branches.run(), branches.exact())


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("window", [0, 1300])
def test_a_row_has_the_same_bits_however_it_is_computed(window: int, dtype: torch.dtype) -> None:
    """A row has the same bits in a batch of 64, alone, in smaller items, in private or other pages, and again."""
    ends = [1 + 37 * i % 200 for i in range(64)]
    branches = Branches(2100, ends, dtype=dtype)
    together = branches.run(window=window)
    for i in (0, 13, 63):
        assert torch.equal(branches.run([i], window=window)[0], together[i])
    for unit_rows in (1, 3, 64):
        assert torch.equal(branches.run(unit_rows=unit_rows, window=window), together)
    reordered = [*range(63, -1, -1)]
    assert torch.equal(branches.run(reordered, window=window)[reordered], together)
    assert torch.equal(Branches(2100, ends, dtype=dtype, shared=False, seed=5).run(window=window), together)
    for page, boxes in ((64, False), (128, True), (16, True), (4, False)):
        assert torch.equal(Branches(2100, ends, dtype=dtype, page=page, boxes=boxes).run(window=window), together)
    for _ in range(10):
        assert torch.equal(branches.run(window=window), together)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("window", [0, 1300])
def test_a_row_has_the_same_bits_in_prefill_and_in_decoding(window: int, dtype: torch.dtype) -> None:
    """Rows that a unit computes from first to last segment, that share items, and that stand alone in a batch."""
    branches = Branches(2100, [75], dtype=dtype)
    length = branches.lengths[0]
    q = normal(length, 32, 128, dtype=dtype, seed=9)
    pages = torch.from_numpy(branches.tables)

    def run(rows: int, unit_rows: int) -> Tensor:
        first, one = length - rows, torch.ones(1, dtype=torch.int32)
        table = build_segment_table(
            pages, one * 0, one * first, one * rows, page_size=PAGE, segment=SEGMENT_TOKENS["cuda"], window=window,
            unit_rows=unit_rows,
        )  # fmt: skip
        return paged_attention(q[first:], *branches.kv, table, scale=128**-0.5)

    cold = run(length, 32)
    for rows, unit_rows in ((length, 1), (length, 16), (300, 32), (40, 7), (5, 32), (1, 32)):
        assert torch.equal(run(rows, unit_rows), cold[-rows:])


def test_pages_beyond_two_to_the_31_entries() -> None:
    """8.6 GB of keys and values in bf16."""
    kv = torch.zeros(2, 16384 + 8, 16, PAGE, 128, device="cuda", dtype=torch.bfloat16).transpose(2, 3)
    last = 16384 + 7
    kv[:, last] = normal(2, PAGE, 16, 128, dtype=torch.bfloat16)
    q = normal(1, 16, 128, dtype=torch.bfloat16)
    one = torch.ones(1, dtype=torch.int32)
    table = build_segment_table(
        one[None] * last, one * 0, one * (PAGE - 1), one, page_size=PAGE, segment=1024, unit_rows=64
    )
    z = torch.einsum("nhe,the->ht", q.double(), kv[0, last].double()) * 128**-0.5
    assert_close(
        paged_attention(q, *kv, table, scale=128**-0.5)[0],
        torch.einsum("ht,the->he", z.softmax(1), kv[1, last].double()),
    )


def test_a_captured_graph_reads_the_next_table() -> None:
    """Neither the upload of a table nor a call makes the host wait for the device."""
    branches = Branches(2100, [1 + 37 * i % 200 for i in range(8)])
    tables = [branches.table(which) for which in ([0, 1, 2, 3], [7, 2, 5], [4])]
    capacity = Capacity.required_by(tables[0])
    for table in tables:
        capacity = capacity.enlarge(Capacity.required_by(table), rows=4, item_rows=16)
    host = allocate_host_buffer(capacity.length, torch.int32, torch.device("cuda"))
    write_table(tables[0], capacity, host.numpy())
    there = DeviceTable.from_buffer(host.cuda(), capacity, tables[0])
    q = branches.q[:4].clone()
    paged_attention(q, *branches.kv, there, scale=128**-0.5)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = paged_attention(q, *branches.kv, there, scale=128**-0.5)
    whole = branches.run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = []
        for which, table in zip(([0, 1, 2, 3], [7, 2, 5], [4]), tables, strict=True):
            host = allocate_host_buffer(capacity.length, torch.int32, torch.device("cuda"))
            write_table(table, capacity, host.numpy())
            there.buffer.copy_(host, non_blocking=True)
            for row, i in enumerate(which):
                q[row].copy_(branches.q[i])
            graph.replay()
            found.append(out.clone())
        direct = branches.run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(direct, whole)
    for which, rows in zip(([0, 1, 2, 3], [7, 2, 5], [4]), found, strict=True):
        assert torch.equal(rows[: len(which)], whole[which])
        assert not bool(rows[len(which) :].any())


def test_a_lost_gradient_is_refused() -> None:
    branches = Branches(20, [1])
    branches.q.requires_grad_()
    with pytest.raises(ValueError, match="not differentiated"):
        branches.run()
