"""Attention's kernels, through Triton's interpreter, against float64 attention over gathered keys.

The interpreter multiplies the bits of bf16: half precision is checked on a GPU, and by ahead-of-time compilation.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from genssd import _core
from genssd.kernels import attention_triton
from genssd.kernels.attention import SegmentTable, build_segment_table, paged_attention_reference
from genssd.kernels.attention_launch_triton import AttentionLaunch, AttentionTiles
from genssd.kernels.attention_triton import attend_rows
from genssd.kernels.device_table import Capacity, DeviceTable, write_table

SMALL = AttentionTiles(
    block_m=16, block_t=8, num_warps=4, num_stages=2, tail_m=8, tail_warps=1, unit_m=32, unit_warps=4, unit_stages=2
)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uninitialised memory is NaN, so that reading it shows."""
    empty = torch.empty

    def poisoned(*size: Any, **options: Any) -> Tensor:
        tensor = empty(*size, **options)
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor.fill_(-(1 << 30))

    monkeypatch.setattr(attention_triton.torch, "empty", poisoned)


@dataclass(slots=True)
class Cache:
    """Keys and values in pages whose unwritten slots are NaN, and the pages of sequences that share prefixes.

    order: of the pages that are handed out.
    """

    page_size: int
    kv_heads: int = 2
    width: int = 16
    seed: int = 0
    order: int = 0
    num_pages: int = 700
    dtype: torch.dtype = torch.float32
    boxes: bool = False
    """Whether the tokens of a page and head are contiguous, as in the engine's cache on a GPU."""
    sequences: list[list[int]] = field(default_factory=list)
    """The tokens of each: the values of equal tokens at equal positions are equal, wherever they lie."""
    tables: list[list[int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        shape = (2, self.num_pages, self.page_size, self.kv_heads, self.width)
        self.kv = torch.full(shape, torch.nan, dtype=self.dtype)
        if self.boxes:
            self.kv = self.kv.transpose(2, 3).contiguous().transpose(2, 3)
        self._free = torch.randperm(self.num_pages, generator=torch.Generator().manual_seed(self.order)).tolist()

    kv: Tensor = field(init=False)
    _free: list[int] = field(init=False)

    def add(self, tokens: list[int], parent: int | None = None, shared: int = 0) -> int:
        """A sequence whose first `shared` tokens are the parent's; it owns the pages from the half-filled one on."""
        whole = shared // self.page_size
        table = [] if parent is None else self.tables[parent][:whole]
        for start in range(whole * self.page_size, len(tokens), self.page_size):
            page = self._free.pop()
            table.append(page)
            for offset, token in enumerate(tokens[start : start + self.page_size]):
                self.kv[:, page, offset] = self._pair(token, start + offset)
        self.sequences.append(tokens)
        self.tables.append(table)
        return len(self.tables) - 1

    def _pair(self, token: int, position: int) -> Tensor:
        generator = torch.Generator().manual_seed((self.seed * 1000 + token) * 100000 + position)
        return torch.randn(2, self.kv_heads, self.width, generator=generator).to(self.dtype)

    def table(self, which: list[int], rows: list[int], **options: int) -> SegmentTable:
        """Of the last rows of each of these sequences."""
        width = max(len(table) for table in self.tables)
        pages = np.full((len(self.tables), width), 1 << 30, dtype=np.int32)  # beyond a sequence's end anything
        for row, table in zip(pages, self.tables, strict=True):
            row[: len(table)] = table
        first = [len(self.sequences[i]) - n for i, n in zip(which, rows, strict=True)]
        order, starts, counts = (np.array(x, dtype=np.int32) for x in (which, first, rows))
        return build_segment_table(
            *map(torch.from_numpy, (pages, order, starts, counts)), page_size=self.page_size, **options
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Case:
    """A call: the last rows of some sequences of a cache."""

    cache: Cache
    which: list[int]
    rows: list[int]
    heads: int = 4
    segment: int = 16
    window: int = 0
    unit_rows: int = 4
    chain_programs: int = 0
    resume_tokens: int = 0
    softcap: float | None = None
    sinks: Tensor | None = None

    def queries(self) -> Tensor:
        """Of each row its own, wherever it stands in the batch."""
        rows = []
        for i, count in zip(self.which, self.rows, strict=True):
            tokens = self.cache.sequences[i]
            for position in range(len(tokens) - count, len(tokens)):
                generator = torch.Generator().manual_seed(sum(tokens[: position + 1]) * 1000 + position)
                rows.append(2 * torch.randn(self.heads, self.cache.width, generator=generator))
        return torch.stack(rows).to(self.cache.dtype)

    def host_table(self) -> SegmentTable:
        return self.cache.table(
            self.which, self.rows, segment=self.segment, window=self.window, unit_rows=self.unit_rows,
            chain_programs=self.chain_programs, resume_tokens=self.resume_tokens,
        )  # fmt: skip

    def run(self, *, programs: int = 3, tiles: AttentionTiles = SMALL, table: DeviceTable | None = None) -> Tensor:
        launch = AttentionLaunch(multiprocessors=programs, tiles=tiles, interpret=True)
        table = DeviceTable.upload(self.host_table(), CPU) if table is None else table
        k, v = self.cache.kv
        return attend_rows(self.queries(), k, v, table, self.cache.width**-0.5, self.softcap, self.sinks, launch=launch)

    def attention(self, dtype: torch.dtype) -> Tensor:
        """Of every row over its own gathered keys, by the definition."""
        out, n, size = [], 0, self.cache.page_size
        q, group = self.queries().to(dtype), self.heads // self.cache.kv_heads
        for i, count in zip(self.which, self.rows, strict=True):
            length = len(self.cache.sequences[i])
            for position in range(length - count, length):
                seen = range(max(0, position + 1 - self.window) if self.window else 0, position + 1)
                pairs = [self.cache.kv[:, self.cache.tables[i][p // size], p % size] for p in seen]
                k, v = torch.stack(pairs, 1).to(dtype).repeat_interleave(group, 2)
                z = torch.einsum("he,the->ht", q[n], k) * self.cache.width**-0.5
                if self.softcap is not None:
                    z = self.softcap * torch.tanh(z / self.softcap)
                if self.sinks is not None:
                    z = torch.cat((z, self.sinks.to(dtype)[:, None]), 1)
                out.append(torch.einsum("ht,the->he", z.softmax(1)[:, : len(seen)], v))
                n += 1
        return torch.stack(out)

    def check(self) -> None:
        """Against float64, at most twice the error of the definition in float32."""
        exact, plain, ours = self.attention(torch.float64), self.attention(torch.float32), self.run()
        assert ours.dtype == self.cache.dtype
        step = torch.finfo(self.cache.dtype).eps
        budget = 2 * (plain - exact).abs().max() + 8 * step * exact.abs().max()
        assert (ours.double() - exact).abs().max() <= budget


def tokens_of(count: int, seed: int) -> list[int]:
    return torch.randint(0, 50, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def grow(
    seed: int, page_size: int, *, private: bool = False, order: int = 0, **options: Any
) -> tuple[Cache, list[int]]:
    """A random tree of depth 1 to 5 with chunks of any length, forked mid-page or not; its leaves."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    cache = Cache(page_size, order=order, **options)
    level = [cache.add(tokens_of(draw(1, 30), seed))]
    for depth in range(draw(0, 4)):
        children = []
        for parent in level[:3]:
            for _ in range(draw(1, 16) if depth == 0 else draw(1, 3)):
                tokens = cache.sequences[parent]
                more = tokens + tokens_of(draw(1, 12), draw(0, 1 << 20))
                children.append(cache.add(more, None if private else parent, 0 if private else len(tokens)))
        level = children
    return cache, level[:12]


@pytest.mark.parametrize("window", [0, 1, 9, 21])
@pytest.mark.parametrize("seed", range(4))
def test_random_trees(seed: int, window: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    cache, leaves = grow(seed, [1, 4, 16, 8][seed])
    counts = [int(torch.randint(1, min(5, len(cache.sequences[i])) + 1, (), generator=generator)) for i in leaves]
    sinks = torch.linspace(-3, 3, 4) if seed % 2 else None
    Case(cache, leaves, counts, window=window, softcap=[None, None, 3.0, 20.0][seed], sinks=sinks).check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "width"),
    [(1, 1, 2), (7, 1, 64), (6, 2, 80), (3, 3, 96), (16, 2, 128), (2, 1, 256), (20, 1, 8)],
)
def test_heads(heads: int, kv_heads: int, width: int, dtype: torch.dtype) -> None:
    cache = Cache(4, kv_heads=kv_heads, width=width, dtype=dtype)
    trunk = cache.add(tokens_of(21, 0))
    kids = [cache.add(cache.sequences[trunk] + tokens_of(3, i), trunk, 21) for i in range(2)]
    Case(cache, kids, [2, 3], heads=heads, sinks=torch.linspace(-1, 1, heads)).check()


def test_one_token() -> None:
    cache = Cache(4)
    cache.add([7])
    case = Case(cache, [0], [1])
    assert torch.equal(case.run(), cache.kv[1, cache.tables[0][0], 0].repeat_interleave(2, 0)[None])


def test_a_prefix_of_32k() -> None:
    cache = Cache(16, kv_heads=1, width=16, num_pages=2100)
    trunk = cache.add(tokens_of(32768, 0))
    kids = [cache.add(cache.sequences[trunk] + tokens_of(n, n), trunk, 32768) for n in (1, 30)]
    wide = dataclasses.replace(SMALL, block_t=512)
    case = Case(cache, kids, [1, 2], heads=2, segment=1024, unit_rows=8)
    assert len(case.host_table().items) == 32 + 3 + 2, "the first of them in four"
    assert (case.run(tiles=wide).double() - case.attention(torch.float64)).abs().max() < 1e-6


def test_large_scores_do_not_overflow() -> None:
    cache, leaves = grow(1, 4)
    cache.kv[0] *= 1e3
    case = Case(cache, leaves, [1] * len(leaves))
    torch.testing.assert_close(case.run().double(), case.attention(torch.float64), atol=2e-3, rtol=0)


@pytest.mark.parametrize("sinks", [None, torch.tensor([-torch.inf, 0.0, -torch.inf, 2.0])], ids=["plain", "sinks"])
def test_scores_of_minus_infinity_are_nothing_and_no_nan(sinks: Tensor | None) -> None:
    """Segments without a score, rows without one, and sinks that are none."""
    cache = Cache(4, width=4)
    cache.add(tokens_of(40, 0))
    cache.add(tokens_of(9, 1))
    k = cache.kv[0]
    k[cache.tables[0][:4], :, :, 0] = -torch.inf  # the first segment of one sequence, all of the other
    k[cache.tables[1]] = torch.where(k[cache.tables[1]].isnan(), torch.nan, 0.0)
    k[cache.tables[1], :, :, 0] = -torch.inf
    case = Case(cache, [0, 1], [1, 1], sinks=sinks)
    queries = torch.full((2, 4, 4), 0.5)
    launch = AttentionLaunch(multiprocessors=2, tiles=SMALL, interpret=True)
    out = attend_rows(queries, *cache.kv, DeviceTable.upload(case.host_table(), CPU), 0.5, None, sinks, launch=launch)
    assert bool(out.isfinite().all())
    assert torch.equal(out[1], torch.zeros(4, 4))
    cache.kv[0, cache.tables[0][:4], :, :, 0] = -1e30  # as good as nothing, for a definition that knows no -inf
    finite = attend_rows(
        queries, *cache.kv, DeviceTable.upload(case.host_table(), CPU), 0.5, None, sinks, launch=launch
    )
    assert torch.equal(out[0], finite[0])
    assert bool((out[0] != 0).any())


def test_what_is_not_finite_is_seen_and_stays_with_its_sequence() -> None:
    cache, leaves = grow(5, 4)
    case = Case(cache, leaves[:4], [1] * 4)
    clean = case.run()
    own = cache.tables[leaves[2]][-1]
    offset = (len(cache.sequences[leaves[2]]) - 1) % 4
    for part in range(2):
        kept = cache.kv[part, own, offset].clone()
        cache.kv[part, own, offset] = torch.nan
        broken = case.run()
        cache.kv[part, own, offset] = kept
        assert bool(broken[2].isnan().all())
        assert torch.equal(broken[[0, 1, 3]], clean[[0, 1, 3]])


def test_what_no_row_sees_is_not_read() -> None:
    """Neither tokens before the window of all rows, in a tile that they see in part, nor those after the last row."""
    cache = Cache(4)
    cache.add(tokens_of(40, 0))
    case = Case(cache, [0], [2], window=13)
    clean = case.run()
    for position in range(39 - 13):
        cache.kv[:, cache.tables[0][position // 4], position % 4] = torch.nan
    assert torch.equal(case.run(), clean)
    cache.kv[:, cache.tables[0][(39 - 13) // 4], (39 - 13) % 4] = torch.nan
    assert bool(case.run()[0].isnan().all())


@pytest.mark.parametrize("window", [0, 30])
def test_shared_and_private_pages_have_the_same_bits(window: int) -> None:
    def case(private: bool) -> Case:
        cache = Cache(4)
        trunk = cache.add(tokens_of(37, 0))
        kids = [
            cache.add(cache.sequences[trunk] + tokens_of(1 + i, i), *(() if private else (trunk, 37))) for i in range(4)
        ]
        return Case(cache, kids, [1] * 4, window=window)

    shared, private = case(False), case(True)
    assert len(shared.host_table().items) < len(private.host_table().items)
    assert torch.equal(shared.run(), private.run())


@pytest.mark.parametrize("window", [0, 13])
def test_a_row_has_the_same_bits_alone_and_in_a_batch_of_64(window: int) -> None:
    cache = Cache(4, kv_heads=1)
    trunk = cache.add(tokens_of(37, 0))
    kids = [cache.add(cache.sequences[trunk] + tokens_of(1 + i % 7, i), trunk, 37) for i in range(64)]
    sinks = torch.tensor([0.5, -1.0])
    together = Case(cache, kids, [1] * 64, heads=2, unit_rows=8, window=window, sinks=sinks).run()
    for i in (0, 13, 63):
        for unit_rows in (1, 8):
            alone = Case(cache, [kids[i]], [1], heads=2, unit_rows=unit_rows, window=window, sinks=sinks).run()
            assert torch.equal(alone[0], together[i])


def test_the_page_layout_changes_no_bit() -> None:
    runs = []
    for page_size, order in ((4, 0), (4, 1), (16, 2), (1, 3), (2, 4)):
        cache, leaves = grow(3, page_size, order=order)
        runs.append(Case(cache, leaves[:3], [1, 2, 1]).run())
    assert all(torch.equal(run, runs[0]) for run in runs[1:])


def test_the_order_of_forks_and_of_the_batch_changes_no_bit() -> None:
    def of(order: list[int]) -> Tensor:
        cache = Cache(4)
        trunk = cache.add(tokens_of(22, 0))
        kids: dict[int, int] = {}
        for i in order:
            parent, shared = (kids[0], 24) if i and 0 in kids else (trunk, 22)
            first = cache.sequences[trunk] + [1, 2]  # the first kid's tokens, which the others go on from
            kids[i] = cache.add(first + tokens_of(3 + i, i), parent, shared)
        out = Case(cache, [kids[i] for i in order], [2] * 4).run().view(4, 2, 4, 16)
        return out[[order.index(i) for i in range(4)]]

    assert torch.equal(of([0, 1, 2, 3]), of([3, 0, 2, 1]))


def test_a_warm_and_a_cold_prefix_have_the_same_bits() -> None:
    """The last rows have the same bits as when the complete sequence is computed with them."""
    cache = Cache(4)
    cache.add(tokens_of(39, 0))
    cold = Case(cache, [0], [39]).run()
    assert torch.equal(Case(cache, [0], [5]).run(), cold[-5:])
    assert torch.equal(Case(cache, [0], [1]).run(), cold[-1:])


@pytest.mark.parametrize(("page_size", "window"), [(4, 0), (16, 0), (16, 30)])
def test_rows_of_a_unit_have_the_bits_of_items(page_size: int, window: int) -> None:
    """Rows that one program computes from first to last segment, against the same rows item by item."""
    cache = Cache(page_size)
    cache.add(tokens_of(43, 0))
    cache.add(tokens_of(9, 1))
    options: dict[str, Any] = {"window": window, "sinks": torch.linspace(-3, 3, 4) if window else None}
    case = Case(cache, [0, 1], [43, 9], unit_rows=32, **options)
    assert len(_core.DeviceRecords(case.host_table()).units) == 3
    together = case.run()
    nested = dataclasses.replace(SMALL, flat=False, unit_m=16, block_m=32)
    assert torch.equal(case.run(tiles=nested), together)
    for rows, unit_rows in ((43, 5), (12, 7), (1, 32)):
        one = Case(cache, [0], [rows], unit_rows=unit_rows, **options).run()
        assert torch.equal(one, together[43 - rows : 43])
    assert (together.double() - case.attention(torch.float64)).abs().max() < 1e-5


@pytest.mark.parametrize(("page_size", "masked"), [(8, False), (16, True)])
def test_tiles_from_descriptors_have_the_bits_of_pointers(page_size: int, masked: bool) -> None:
    """Descriptors need pages of complete tiles, in which the tokens of a head are contiguous; others take pointers."""
    runs = []
    for boxes in (False, True):
        cache, leaves = grow(3, page_size, boxes=boxes)
        counts = [min(12, len(cache.sequences[i])) for i in leaves[:2]]
        assert (attention_triton.tile_descriptor(cache.kv[0], 8, 16) is not None) == boxes
        for tma in (False, True):
            tiles = dataclasses.replace(SMALL, tma=tma, masked_tma=masked, tail_tma=masked)
            runs += [Case(cache, leaves[:2], counts, unit_rows=unit_rows).run(tiles=tiles) for unit_rows in (4, 16)]
    assert bool(runs[0].isfinite().all())
    assert all(torch.equal(run, runs[0]) for run in runs)


def fork(cache: Cache, trunk: list[int], lengths: list[int], seed: int) -> list[int]:
    """Add a sequence, and branches of it with so many tokens of their own; return the branches."""
    parent = cache.add(trunk)
    return [
        cache.add(trunk + tokens_of(count, seed + i), parent, len(trunk)) for i, count in enumerate(lengths)
    ]  # fmt: skip


def test_chains_of_segments_change_no_bit() -> None:
    """One program reads several segments of the same rows, of which those of two prompts lie between each other."""
    cache = Cache(4, kv_heads=1)
    kids = fork(cache, tokens_of(49, 0), [1, 3, 9], 10) + fork(cache, tokens_of(35, 1), [2, 6], 20)
    case = Case(cache, kids, [1] * 5, heads=2, unit_rows=8)
    chained = dataclasses.replace(case, chain_programs=1)
    plain, records = case.run(), _core.DeviceRecords(chained.host_table())
    assert sorted(records.items[:, 1].tolist()) == [32, 48], "each prompt's segments are one item"
    assert len(records.pages) > len(chained.host_table().pages), "the second prompt's pages had to be put together"
    assert torch.equal(chained.run(programs=1), plain)
    assert (plain.double() - case.attention(torch.float64)).abs().max() < 1e-5


def test_shared_parts_of_unfinished_segments_change_no_bit() -> None:
    """Rows go on from sums over what they hold in the same pages, whoever their neighbours are."""
    cache = Cache(4, kv_heads=1)
    kids = fork(cache, tokens_of(74, 0), [1, 3, 6, 2], 10) + fork(cache, tokens_of(38, 1), [1, 5, 9], 20)
    order = [5, 2, 6, 0, 4, 1, 3]
    kids = [kids[i] for i in order]
    case = Case(cache, kids, [1] * 7, heads=2, segment=48, unit_rows=8, softcap=20.0, sinks=torch.tensor([0.5, -1.0]))
    shared = dataclasses.replace(case, resume_tokens=8, chain_programs=1)
    plain, resumed = case.run(), dict(zip(order, _core.DeviceRecords(shared.host_table()).rows[:, 5], strict=True))
    assert [resumed[i] for i in range(7)] == [24, 24, 24, 24, 32, 32, 32], "complete tiles of complete pages"
    assert torch.equal(shared.run(), plain)
    alone = dataclasses.replace(shared, which=kids[:1], rows=[1])
    assert not _core.DeviceRecords(alone.host_table()).rows[0, 5]
    assert torch.equal(alone.run()[0], plain[0])
    assert (plain.double() - case.attention(torch.float64)).abs().max() < 1e-5


def test_a_row_that_ends_with_the_shared_part_has_nothing_to_add() -> None:
    cache = Cache(4, kv_heads=1)
    kids = fork(cache, tokens_of(48, 0), [1, 2, 7], 10)
    case = Case(cache, [0, *kids], [1] * 4, heads=2, segment=64, unit_rows=8)
    shared = dataclasses.replace(case, resume_tokens=8)
    assert _core.DeviceRecords(shared.host_table()).rows[:, 3:6:2].tolist() == [[48, 48], [49, 48], [50, 48], [55, 48]]
    assert torch.equal(shared.run(), case.run())


def test_tiles_that_pass_a_boundary_are_refused() -> None:
    cache = Cache(4, kv_heads=1)
    cache.add(tokens_of(40, 0))
    wide = dataclasses.replace(SMALL, block_t=32)
    for options, length in (({"resume_tokens": 8}, 8), ({"chain_programs": 1}, 16)):
        case = dataclasses.replace(Case(cache, [0], [1], heads=2), **options)
        with pytest.raises(ValueError, match=f"tiles of 32 tokens do not end .* after {length} tokens"):
            case.run(tiles=wide)


@pytest.mark.parametrize("changed", [{"programs": 1}, {"programs": 64}], ids=str)
def test_the_number_of_programs_changes_no_bit(changed: dict[str, int]) -> None:
    cache, leaves = grow(3, 4)
    case = Case(cache, leaves[:4], [1] * 4)
    assert torch.equal(case.run(**changed), case.run())


def test_more_vectors_than_a_tile_holds() -> None:
    """Items of more rows than one tile, and more heads to a kv head than that."""
    cache = Cache(4, kv_heads=1)
    cache.add(tokens_of(40, 0))
    few = Case(cache, [0], [12], heads=20, unit_rows=1)
    few.check()
    assert torch.equal(Case(cache, [0], [12], heads=20, unit_rows=12).run(), few.run())


def test_a_table_in_a_larger_buffer() -> None:
    """A captured graph reads the table like this: rows after the table's own see no position."""
    cache, leaves = grow(3, 4)
    case = Case(cache, leaves[:3], [1] * 3)
    table, needed = case.host_table(), Capacity.required_by(case.host_table())
    capacity = needed.enlarge(needed, rows=5, item_rows=7)
    packed = np.full(capacity.length, -7, dtype=np.int32)
    write_table(table, capacity, packed)
    there = DeviceTable.from_buffer(torch.from_numpy(packed), capacity, table)
    q = torch.cat((case.queries(), torch.full((2, 4, 16), torch.nan)))
    launch = AttentionLaunch(multiprocessors=3, tiles=SMALL, interpret=True)
    out = attend_rows(q, *cache.kv, there, 0.25, None, None, launch=launch)
    assert torch.equal(out[:3], case.run())
    assert torch.equal(out[3:], torch.zeros(2, 4, 16))


def test_views_of_queries_and_pages() -> None:
    cache, leaves = grow(3, 4)
    case = Case(cache, leaves[:3], [1] * 3)
    table = DeviceTable.upload(case.host_table(), CPU)
    launch = AttentionLaunch(multiprocessors=3, tiles=SMALL, interpret=True)
    wide_q, wide_kv = torch.full((3, 9, 40), torch.nan), torch.full((2, 700, 4, 4, 16), torch.nan)
    wide_q[:, 1:5, :16], wide_kv[:, :, :, ::2] = case.queries(), cache.kv
    k, v = wide_kv[:, :, :, ::2]
    found = attend_rows(wide_q[:, 1:5, :16], k, v, table, 0.25, None, None, launch=launch)
    assert torch.equal(found, case.run())
    with pytest.raises(ValueError, match="must have the same strides"):
        attend_rows(wide_q[:, 1:5, :16], k, cache.kv[1], table, 0.25, None, None, launch=launch)


def test_no_rows() -> None:
    cache = Cache(4)
    cache.add([1])
    none = DeviceTable.upload(cache.table([], [], segment=16, window=0, unit_rows=4), CPU)
    launch = AttentionLaunch(multiprocessors=3, tiles=SMALL, interpret=True)
    assert attend_rows(torch.empty(0, 4, 16), *cache.kv, none, 1.0, None, None, launch=launch).shape == (0, 4, 16)


def test_sinks_of_other_heads_are_refused() -> None:
    cache = Cache(4)
    cache.add([1])
    case = Case(cache, [0], [1])
    with pytest.raises(ValueError, match=r"sinks must be float32 \[4\], not torch.float32 \[3\]"):
        paged_attention_reference(case.queries(), *cache.kv, case.host_table(), scale=1.0, sinks_H=torch.zeros(3))
