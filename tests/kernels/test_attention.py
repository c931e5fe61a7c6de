"""Tree attention: against float64 over each row's own tokens, and the promise that a row's bits are its own."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from support.page_problems import Problem, build, random_tree
from torch import Tensor

from genssd import _core
from genssd.kernels.attention import SegmentTable, build_segment_table, paged_attention, paged_attention_reference
from genssd.kernels.packed_keys import pack_keys

HALVES = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
"""Inputs are exact: the result is rounded, to so much, and so is every weight."""

NATIVE = pytest.mark.skipif(not _core.instruction_sets(), reason="there is no native kernel for this processor")
"""Plain torch makes no promise about bits, and records gradients."""


@pytest.fixture(params=_core.instruction_sets())
def instructions(request: pytest.FixtureRequest) -> Iterator[str]:
    _core.use_instruction_set(request.param)
    yield request.param
    _core.use_instruction_set(_core.instruction_sets()[0])


def ours(problem: Problem, table: SegmentTable | None = None, **options: Any) -> Tensor:
    table = problem.table(window=options.pop("window", 0)) if table is None else table
    return paged_attention(problem.q, problem.packed_keys, problem.v_pages, table, scale=0.25, **options)


def assert_near(out: Tensor, truth: Tensor, sizes: Tensor) -> None:
    """sizes: the weighted magnitudes of the values."""
    step = HALVES.get(out.dtype, 2e-6)
    budget = step * truth.abs() + (step * sizes if out.dtype in HALVES else 0.0) + 4e-6
    assert bool(((out.double() - truth).abs() <= budget).all())


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window-1": {"window": 1},
    "window-5": {"window": 5},
    "window-beyond": {"window": 1000},
    "softcap": {"softcap": 2.0},
    "sinks": {"sinks_H": torch.tensor([0.5, -3.0, 9.0, -torch.inf])},
    "window-softcap-sinks": {"window": 7, "softcap": 1.5, "sinks_H": torch.tensor([0.0, 2.0, -1.0, 30.0])},
}


def truth_of(problem: Problem, options: dict[str, Any], *, sizes: bool = False) -> Tensor:
    given = {"sinks" if name == "sinks_H" else name: value for name, value in options.items()}
    return problem.truth(scale=0.25, sizes=sizes, **given)


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize(("depth", "fan_out", "chunk"), [(0, 1, 40), (1, 16, 9), (3, 3, 7), (5, 2, 5)])
def test_random_trees_equal_float64(
    depth: int, fan_out: int, chunk: int, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    leaves = random_tree(depth, depth=depth, fan_out=fan_out, chunk=chunk)
    chance = random.Random(depth)
    rows = [chance.choice([1, 1, min(3, len(leaf)), len(leaf)]) for leaf in leaves]
    problem = build(leaves, rows, page_size=4, dtype=dtype)
    truth, sizes = (truth_of(problem, options, sizes=sizes) for sizes in (False, True))
    assert_near(ours(problem, **dict(options)), truth, sizes)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("depth", [0, 1, 3])
def test_the_reference_equals_float64(depth: int, options: dict[str, Any]) -> None:
    problem = build(leaves := random_tree(7, depth=depth, fan_out=4, chunk=9), [min(3, len(x)) for x in leaves])
    given = dict(options)
    table = problem.table(window=given.pop("window", 0))
    wide = (x.double() for x in (problem.q, problem.k_pages, problem.v_pages))
    out = paged_attention_reference(*wide, table, scale=0.25, **given)
    torch.testing.assert_close(out, truth_of(problem, options), atol=1e-12, rtol=0)


SHAPES: dict[str, dict[str, Any]] = {
    "one-token": {"lengths": [1], "rows": [1], "heads": 1, "kv_heads": 1},
    "multi-query": {"lengths": [10, 9], "rows": [2, 9], "heads": 8, "kv_heads": 1},
    "ungrouped": {"lengths": [10, 9], "rows": [2, 9], "heads": 3, "kv_heads": 3},
    "group-of-five": {"lengths": [10, 9], "rows": [2, 9], "heads": 10, "kv_heads": 2},
    "head-1": {"lengths": [5, 6], "rows": [5, 6], "head_dim": 1},
    "head-2-pages-of-one": {"lengths": [5, 6], "rows": [5, 6], "head_dim": 2, "page_size": 1},
    "head-33": {"lengths": [21, 6], "rows": [5, 6], "head_dim": 33},
    "head-64": {"lengths": [21, 6], "rows": [5, 6], "head_dim": 64},
    "head-80": {"lengths": [21, 6], "rows": [5, 6], "head_dim": 80},
    "head-96": {"lengths": [21, 6], "rows": [5, 6], "head_dim": 96, "page_size": 3},
    "head-128": {"lengths": [21, 6], "rows": [5, 6], "head_dim": 128, "page_size": 16},
    "head-256": {"lengths": [21, 6], "rows": [5, 6], "head_dim": 256},
    "many-segments": {"lengths": [300], "rows": [70]},
}


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shapes_equal_float64(shape: dict[str, Any], dtype: torch.dtype) -> None:
    sizes = {name: size for name, size in shape.items() if name not in ("lengths", "rows")}
    stems = [[100_000 * i + t for t in range(length)] for i, length in enumerate(shape["lengths"])]
    problem = build(stems, shape["rows"], **sizes, dtype=dtype)
    assert_near(ours(problem), problem.truth(scale=0.25), problem.truth(scale=0.25, sizes=True))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_a_prefix_of_32k_tokens(dtype: torch.dtype) -> None:
    """Against one softmax over all of it: brute force over 32768 named tokens would take minutes."""
    pages, page = 2048, 16
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(4, 2, 16, generator=generator).to(dtype)
    k, v = torch.randn(2, pages + 4, page, 1, 16, generator=generator).to(dtype)
    tables = np.tile(np.arange(pages + 1, dtype=np.int32), (4, 1))
    tables[:, pages] += np.arange(4, dtype=np.int32)  # the last page is each sequence's own
    first = np.full(4, pages * page, dtype=np.int32) + np.array([0, 3, 7, 15], dtype=np.int32)
    table = build_segment_table(
        tables, np.arange(4, dtype=np.int32), first, np.ones(4, np.int32), page_size=16, segment=256
    )
    assert len(table.items) == pages * page // 256 + 1 + 4, "a shared segment is read once; the first is cut in half"
    out = paged_attention(q, pack_keys(k), v, table, scale=0.25)
    for n, last in enumerate(first.tolist()):
        keys, values = (x[tables[n]].flatten(0, 1)[: last + 1, 0].double() for x in (k, v))
        weights = (q[n].double() @ keys.T * 0.25).softmax(-1)
        assert_near(out[n], weights @ values, weights @ values.abs())


def test_shared_segments_are_read_once() -> None:
    stem = list(range(40))
    leaves = [[*stem, 100 * i, 100 * i + 1] for i in range(1, 17)]
    problem = build(leaves, [1] * 16, page_size=4)
    table = problem.table(segment=8)
    shared = [item for item in table.items.tolist() if item[4] > 1]
    assert [(first, tokens, rows) for _, first, tokens, _, rows, _ in shared] == [(8 * k, 8, 16) for k in range(5)]
    assert len(table.items) == 5 + 16
    assert len(set(table.pages[: 5 * 2].tolist())) == 10


def test_sequences_that_share_pages_are_read_together_in_any_order() -> None:
    """Two groups of sequences diverge in their second segment; shorter sequences of both end before it."""
    families = [[*range(8), *range(100 * i, 100 * i + 8)] for i in (1, 2)]
    leaves = [[*family, 1000 * i + n] for i, family in enumerate(families, 1) for n in range(10)]
    leaves += [[*range(8), 5000 + n] for n in range(10)]
    for seed in range(8):
        random.Random(seed).shuffle(leaves)
        table = build(leaves, [1] * 30, page_size=4).table(segment=8)
        assert len(table.items) == 3 + 30, "the stem, one segment of each family, an end of every leaf"


def test_a_short_prefix_is_read_once_too() -> None:
    """Before the first full segment there are shorter ones."""
    pages = torch.arange(19, dtype=torch.int32).repeat(8, 1)
    pages[:, 18] += torch.arange(8, dtype=torch.int32)  # 288 tokens are shared
    rows = torch.arange(8, dtype=torch.int32)
    one, first = torch.ones(8, dtype=torch.int32), torch.full((8,), 300, dtype=torch.int32)
    table = build_segment_table(pages, rows, first, one, page_size=16, segment=1024)
    assert [item[1:3] + item[4:5] for item in table.items[:2].tolist()] == [[0, 128, 8], [128, 128, 8]]
    assert [item[1:3] + item[4:5] for item in table.items[2:].tolist()] == [[256, 45, 1]] * 8


BORDERS = {
    1024: [0, 128, 256, 512, 1024, 2048],
    384: [0, 192, *range(384, 2500, 384)],
    240: list(range(0, 2500, 240)),
    48: list(range(0, 2500, 48)),
}


@pytest.mark.parametrize("window", [0, 1, 130, 700])
@pytest.mark.parametrize("segment", BORDERS)
def test_segments_follow_each_other_without_a_gap(segment: int, window: int) -> None:
    """The items of a row cover exactly the positions that it sees, in the order of its partial results, and all rows
    have the same segment borders."""
    length, rows = 2500, [0, 127, 128, 129, 255, 256, 511, 512, 900, 1023, 1024, 1500, 2047, 2048, 2499]
    pages = torch.arange(-(-length // 16), dtype=torch.int32).repeat(len(rows), 1)
    which = torch.arange(len(rows), dtype=torch.int32)
    first = torch.tensor(rows, dtype=torch.int32)
    table = build_segment_table(
        pages, which, first, torch.ones_like(which), page_size=16, segment=segment, window=window, unit_rows=4
    )
    read: dict[int, list[tuple[int, int, int]]] = {}
    for _, start, tokens, entry, count, _ in table.items.tolist():
        for row, partial in table.entries[entry : entry + count].tolist():
            read.setdefault(row, []).append((partial, start, tokens))
    for row, position in enumerate(rows):
        parts = sorted(read[row])
        assert [part[0] for part in parts] == list(range(*table.row_partial[row : row + 2].tolist()))
        starts = [start for _, start, _ in parts]
        assert starts[0] <= max(0, position - window + 1 if window else 0)
        for (_, start, tokens), following in zip(parts, starts[1:], strict=False):
            assert start + tokens == following
        assert starts[-1] <= position < sum(parts[-1][1:])
        assert set(starts) <= set(BORDERS[segment])


@NATIVE
def test_a_gradient_is_refused_not_lost() -> None:
    problem = build([list(range(9))], [2])
    problem.q.requires_grad_()
    with pytest.raises(ValueError, match="not differentiated"):
        ours(problem)
    with torch.inference_mode():
        ours(problem)


def test_a_window_leaves_out_what_no_row_sees() -> None:
    problem = build([list(range(64))], [2], page_size=4)
    table = problem.table(window=9, segment=8)
    assert [first for _, first, *_ in table.items.tolist()] == [48, 56]


@pytest.fixture(params=[torch.float32, *HALVES], ids=str)
def tree(request: pytest.FixtureRequest) -> Callable[..., Problem]:
    leaves = random_tree(3, depth=3, fan_out=4, chunk=11, trees=4)
    rows = [1 + i % 3 if len(leaf) > 3 else 1 for i, leaf in enumerate(leaves)]

    def make(**options: Any) -> Problem:
        return build(leaves, rows, head_dim=80, dtype=request.param, **options)

    return make


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_sharing_pages_changes_no_bit(tree: Callable[..., Problem], options: dict[str, Any]) -> None:
    assert torch.equal(ours(tree(), **dict(options)), ours(tree(private=True), **dict(options)))


@NATIVE
def test_the_page_layout_changes_no_bit(tree: Callable[..., Problem]) -> None:
    one = ours(tree())
    for other in ({"layout_seed": 5}, {"page_size": 1}, {"page_size": 2}, {"page_size": 8}):
        assert torch.equal(ours(tree(**other)), one)


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("head_dim", [16, 40])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_keys_in_place_copied_or_gathered_give_the_same_bits(dtype: torch.dtype, head_dim: int) -> None:
    """Pages of a multiple of 16 keys are read in place by few rows and copied for many; others are gathered. What lies
    after the keys in the last page is NaN."""

    def attend(page: int, rows: int) -> Tensor:
        problem = build([list(range(175))], [rows], page_size=page, dtype=dtype, head_dim=head_dim)
        problem.q = torch.randn(40, 4, head_dim, generator=torch.Generator().manual_seed(3)).to(dtype)[-rows:]
        return ours(problem, problem.table(segment=64))

    many = attend(1, 40)
    assert bool(many.isfinite().all())
    for page in (2, 16, 32, 64):
        assert torch.equal(attend(page, 40), many)
    for page in (4, 16, 32, 64):
        assert torch.equal(attend(page, 1), many[-1:])


@NATIVE
def test_how_many_rows_read_together_changes_no_bit(tree: Callable[..., Problem]) -> None:
    problem = tree()
    one = ours(problem)
    for unit_rows in (1, 2, 7, 1000):
        assert torch.equal(ours(problem, problem.table(unit_rows=unit_rows)), one)


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("window", [0, 6])
def test_a_row_alone_has_the_same_bits(tree: Callable[..., Problem], window: int) -> None:
    problem = tree()
    assert len(problem.rows) >= 64
    together, everything, first = ours(problem, window=window), problem.q, 0
    for i, rows in enumerate(problem.rows):
        problem.q = everything[first : first + rows]
        alone = ours(problem, problem.table(window=window, keep=[i]))
        assert torch.equal(alone, together[first : first + rows])
        first += rows


@NATIVE
def test_the_order_of_the_batch_changes_no_bit(tree: Callable[..., Problem]) -> None:
    problem = tree()
    together = torch.split(ours(problem), problem.rows)
    order = list(range(len(problem.rows)))
    random.Random(0).shuffle(order)
    queries = torch.split(problem.q, problem.rows)
    problem.q = torch.cat([queries[i] for i in order])
    shuffled = ours(problem, problem.table(keep=order))
    assert torch.equal(shuffled, torch.cat([together[i] for i in order]))


@pytest.mark.parametrize("limit", [{"window": sys.maxsize}, {"unit_rows": 2**32}, {"unit_rows": 2**62}], ids=str)
def test_a_limit_larger_than_any_batch_has_no_effect(limit: dict[str, int]) -> None:
    problem = build([list(range(9)), list(range(50, 80))], [9, 3], heads=1, kv_heads=1, head_dim=1)
    assert torch.equal(ours(problem, problem.table(**limit)), ours(problem))


@NATIVE
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_the_number_of_threads_changes_no_bit(dtype: torch.dtype) -> None:
    """With few units the partial results of segments go through memory, with many they do not."""
    problem = build([list(range(700))], [3], heads=2, kv_heads=1, head_dim=64, page_size=16, dtype=dtype)
    torch.set_num_threads(1)
    one = ours(problem)
    for threads in (2, 5):
        torch.set_num_threads(threads)
        assert torch.equal(ours(problem), one)
    many = build([list(range(400)), list(range(500, 640))], [200, 140], head_dim=64, page_size=16, dtype=dtype)
    torch.set_num_threads(1)
    one = ours(many)
    torch.set_num_threads(3)
    assert torch.equal(ours(many), one)


def test_large_scores_do_not_overflow() -> None:
    problem = build([list(range(9)), list(range(50, 80))], [9, 3])
    problem.q *= 1e4
    torch.testing.assert_close(ours(problem).double(), problem.truth(scale=0.25), atol=1e-2, rtol=0)
    problem.q.zero_()
    torch.testing.assert_close(ours(problem).double(), problem.truth(scale=0.25), atol=1e-6, rtol=0)


@pytest.mark.parametrize("attend", [paged_attention, paged_attention_reference], ids=["native", "reference"])
def test_rows_that_see_only_minus_infinity_are_never_nan(attend: Callable[..., Tensor]) -> None:
    """Scores of -inf fill one segment among others, or all segments, with a sink or without."""
    problem = build([list(range(20))], [1], heads=2, kv_heads=1, head_dim=4, page_size=4)
    table = problem.table(segment=8)
    problem.q.fill_(1.0)
    finite = problem.k_pages[problem.tables[0, :5]].clone()
    for banned in (range(2), range(2, 4), range(5)):
        problem.k_pages[problem.tables[0, :5]] = finite
        problem.k_pages[problem.tables[0, list(banned)]] = -torch.inf
        for sinks in (None, torch.tensor([1.0, -torch.inf])):
            out = attend(problem.q, problem.packed_keys, problem.v_pages, table, scale=0.25, sinks_H=sinks)
            assert bool(out.isfinite().all())
            if len(banned) == 5:
                assert torch.equal(out, torch.zeros_like(out))


@pytest.mark.parametrize("place", [0, 10, 19])
def test_a_nan_that_is_seen_shows(place: int) -> None:
    problem = build([list(range(20))], [1], heads=2, kv_heads=1, head_dim=4, page_size=4)
    for pages in (problem.k_pages, problem.v_pages):
        kept = pages.clone()
        pages[problem.tables[0, place // 4], place % 4] = torch.nan
        assert bool(ours(problem).isnan().all())
        pages.copy_(kept)


def test_queries_that_are_not_contiguous_are_read_right() -> None:
    problem = build([list(range(9)), list(range(50, 56))], [4, 6])
    expected = ours(problem)
    problem.q = torch.cat((problem.q, torch.full_like(problem.q, torch.nan)), dim=1)[:, : problem.q.shape[1]]
    assert not problem.q.is_contiguous()
    assert torch.equal(ours(problem), expected)


def test_no_rows_give_an_empty_result() -> None:
    none = np.zeros(0, dtype=np.int32)
    table = build_segment_table(np.zeros((1, 1), np.int32), none, none, none, page_size=4, segment=8)
    pages = torch.zeros(1, 4, 2, 16)
    for attend in (paged_attention, paged_attention_reference):
        assert attend(torch.empty(0, 4, 16), pack_keys(pages), pages, table, scale=1.0).shape == (0, 4, 16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"table_B": [0, 2]}, "sequence 1 names no page table"),
        ({"table_B": [-1, 0]}, "sequence 0 names no page table"),
        ({"first_B": [0, -1]}, "sequence 1 has no row"),
        ({"rows_B": [1, 0]}, "sequence 1 has no row"),
        ({"rows_B": [1, 13]}, "the rows of sequence 1 lie beyond its page table"),
        ({"rows_B": [1, 2**31 - 1]}, "the rows of sequence 1 lie beyond its page table"),
        ({"tables": [[0, 1, 2], [-4, 1, 1]]}, "a negative page"),
        ({"segment": 6}, "multiple of page_size"),
        ({"segment": 0}, "multiple of page_size"),
        ({"page_size": 2**33, "segment": 2**33}, "segment must be less than"),
        ({"page_size": 2**30, "segment": 2**30, "first_B": [2**31 - 1, 0]}, "sequence 0 lie beyond position"),
        ({"window": -1}, "window"),
        ({"unit_rows": 0}, "unit_rows"),
    ],
)
def test_a_table_that_would_point_outside_is_refused(change: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {
        "tables": [[0, 1, 2], [3, 1, 1]], "table_B": [0, 1], "first_B": [0, 0], "rows_B": [3, 5],
        "page_size": 4, "segment": 8, "window": 0, "unit_rows": 4, **change,
    }  # fmt: skip
    arrays = {name: np.array(given.pop(name), dtype=np.int32) for name in ("tables", "table_B", "first_B", "rows_B")}
    with pytest.raises(ValueError, match=message):
        build_segment_table(*arrays.values(), **given)


def test_a_table_of_wide_integers_is_refused() -> None:
    wide = np.zeros(1, dtype=np.int64)
    narrow = wide.astype(np.int32)
    with pytest.raises(ValueError, match="first must be int32"):
        build_segment_table(narrow[None], narrow, wide, narrow + 1, page_size=4, segment=8)  # type: ignore[arg-type]


WRONG: dict[str, tuple[Callable[[Problem], dict[str, Any]], str]] = {
    "rows": (lambda p: {"q_NHE": p.q[:-1]}, r"q must be \[3, \*, \*\]|does not fit"),
    "head dim": (lambda p: {"q_NHE": p.q[..., :8]}, "v_pages must be|does not fit"),
    "heads": (lambda p: {"q_NHE": p.q[:, :3]}, "multiple of the number of kv heads|does not fit"),
    "page size": (lambda p: {"k_pages": pack_keys(p.k_pages[:, :2])}, "k_pages must be|must agree"),
    "half": (
        lambda p: {"k_pages": p.packed_keys.view(*p.packed_keys.shape[:2], 8, 4, 2)},
        "k_pages must be|must agree",
    ),
    "order": (lambda p: {"k_pages": p.packed_keys.transpose(1, 2)}, "k_pages must be|must agree"),
    "values": (lambda p: {"v_pages_PSGE": p.v_pages[:-1]}, "k_pages must be|must agree"),
    "pool": (
        lambda p: {"k_pages": p.packed_keys[:1], "v_pages_PSGE": p.v_pages[:1]},
        "outside the pool|more than",
    ),
    "dtype": (lambda p: {"k_pages": p.packed_keys.double()}, "one dtype"),
    "sinks": (lambda p: {"sinks_H": torch.zeros(3)}, "sinks must be"),
    "sinks dtype": (lambda p: {"sinks_H": torch.zeros(4, dtype=torch.float64)}, "sinks must be float32"),
}


@pytest.mark.parametrize("attend", [paged_attention, paged_attention_reference], ids=["native", "reference"])
@pytest.mark.parametrize("case", WRONG)
def test_a_call_that_would_read_outside_is_refused(case: str, attend: Callable[..., Tensor]) -> None:
    problem = build([list(range(9)), list(range(50, 56))], [1, 2])
    change, message = WRONG[case]
    given = {"q_NHE": problem.q, "k_pages": problem.packed_keys, "v_pages_PSGE": problem.v_pages, **change(problem)}
    with pytest.raises(ValueError, match=message):
        attend(table=problem.table(), scale=1.0, **given)


def test_a_pool_with_empty_pages_does_not_crash() -> None:
    """Run in another process, because a division by zero in native code would end the test run."""
    script = (
        "import numpy as np\n"
        "from genssd.kernels.attention import build_segment_table\n"
        "one = np.ones(1, dtype=np.int32)\n"
        "try:\n"
        "    build_segment_table(one[None], one - 1, one - 1, one, page_size=0, segment=8)\n"
        "except ValueError:\n"
        "    print('refused')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout == "refused\n", f"exit {done.returncode}: {done.stderr[-500:]}"
