"""Paged attention: the native kernel against the float64 reference, and the promise that a row's bits are its own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from genssd.kernels.attention import AttentionPlan, paged_attention, paged_attention_reference


class Problem:
    """Sequences of given lengths in a pool whose unwritten slots are NaN. Sequence 0's full pages are shared by all."""

    def __init__(
        self,
        lengths: list[int],
        rows: list[int],
        *,
        heads: int = 4,
        kv_heads: int = 2,
        head_dim: int = 16,
        page_size: int = 4,
        dtype: torch.dtype = torch.float32,
        shared_pages: int = 0,
        seed: int = 0,
        page_order_seed: int = 0,
    ) -> None:
        """rows: how many of each sequence's last positions are queried."""
        generator = torch.Generator().manual_seed(seed)
        width = max(-(-length // page_size) for length in lengths)
        num_pages = sum(-(-length // page_size) for length in lengths) + 3
        keys = [torch.randn(2, length, kv_heads, head_dim, generator=generator) for length in lengths]
        self.q = torch.randn(sum(rows), heads, head_dim, generator=generator).to(dtype)
        self.kv = torch.full((2, num_pages, page_size, kv_heads, head_dim), torch.nan, dtype=dtype)
        free = torch.randperm(num_pages, generator=torch.Generator().manual_seed(page_order_seed)).tolist()
        self.table = torch.zeros(len(lengths), width, dtype=torch.int32)
        for i, (length, kv) in enumerate(zip(lengths, keys, strict=True)):
            for w in range(-(-length // page_size)):
                first, last = w * page_size, min((w + 1) * page_size, length)
                if i and w < shared_pages:
                    self.table[i, w] = self.table[0, w]
                    continue
                page = free.pop()
                self.table[i, w] = page
                self.kv[:, page, : last - first] = kv[:, first:last].to(dtype)
            self.table[i, -(-length // page_size) :] = int(self.table[i, 0])  # padding: any valid page
        self.sequence = torch.tensor([i for i, n in enumerate(rows) for _ in range(n)], dtype=torch.int32)
        self.position = torch.tensor(
            [length - n + j for length, n in zip(lengths, rows, strict=True) for j in range(n)], dtype=torch.int32
        )
        self.scale = head_dim**-0.5

    @property
    def plan(self) -> AttentionPlan:
        return AttentionPlan(page_table_BW=self.table, row_sequence_N=self.sequence, row_position_N=self.position)

    def native(self, window: int = 0) -> Tensor:
        return paged_attention(self.q, self.kv[0], self.kv[1], self.plan, scale=self.scale, window=window)

    def truth(self, window: int = 0) -> Tensor:
        """float64 attention of each row over its own gathered keys, without the reference's masks."""
        out = torch.empty(self.q.shape, dtype=torch.float64)
        page_size, kv_heads = self.kv.shape[2], self.kv.shape[3]
        for n, (sequence, last) in enumerate(zip(self.sequence.tolist(), self.position.tolist(), strict=True)):
            positions = range(max(0, last + 1 - window) if window else 0, last + 1)
            slots = [(int(self.table[sequence, p // page_size]), p % page_size) for p in positions]
            k, v = (torch.stack([pages[page, offset] for page, offset in slots]).double() for pages in self.kv)
            for head in range(self.q.shape[1]):
                g = head // (self.q.shape[1] // kv_heads)
                weight = (k[:, g] @ self.q[n, head].double() * self.scale).softmax(dim=0)
                out[n, head] = weight @ v[:, g]
        return out


@pytest.fixture
def restored_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


SHAPES = [
    pytest.param({"lengths": [1], "rows": [1], "heads": 1, "kv_heads": 1}, id="one-token"),
    pytest.param({"lengths": [7, 1, 12, 4], "rows": [1, 1, 1, 1]}, id="decode-ragged"),
    pytest.param({"lengths": [9, 14], "rows": [9, 14]}, id="prefill"),
    pytest.param({"lengths": [17, 13, 30], "rows": [3, 1, 11], "shared_pages": 3}, id="extend-shared-pages"),
    pytest.param({"lengths": [10, 9], "rows": [2, 9], "heads": 8, "kv_heads": 1}, id="multi-query"),
    pytest.param({"lengths": [10, 9], "rows": [2, 9], "heads": 3, "kv_heads": 3}, id="ungrouped"),
    pytest.param({"lengths": [21, 6], "rows": [5, 6], "heads": 6, "kv_heads": 2, "head_dim": 64}, id="head-64"),
    pytest.param({"lengths": [21, 6], "rows": [5, 6], "head_dim": 80}, id="head-80"),
    pytest.param({"lengths": [21, 6], "rows": [5, 6], "head_dim": 128, "page_size": 16}, id="head-128"),
    pytest.param({"lengths": [5, 6], "rows": [5, 6], "head_dim": 2, "page_size": 1}, id="pages-of-one-token"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("window", [0, 1, 5, 100])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_float64(shape: dict[str, object], window: int, dtype: torch.dtype) -> None:
    problem = Problem(**shape, dtype=dtype)  # type: ignore[arg-type]
    out, truth = problem.native(window), problem.truth(window)
    assert out.dtype == dtype
    assert out.shape == problem.q.shape
    # bfloat16 inputs are exact here: only the result is rounded, to 8 bits
    step = 2e-6 if dtype == torch.float32 else 2.0**-8
    assert bool(((out.double() - truth).abs() <= step * truth.abs() + 4e-6).all())


@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_reference_equals_float64(shape: dict[str, object], window: int) -> None:
    problem = Problem(**shape)  # type: ignore[arg-type]
    # the reference multiplies keys that no row sees by zero weight: it masks their values, not their keys
    out = paged_attention_reference(
        problem.q.double(),
        problem.kv[0].double(),
        problem.kv[1].double(),
        problem.plan,
        scale=problem.scale,
        window=window,
    )
    torch.testing.assert_close(out, problem.truth(window), atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_long_context(dtype: torch.dtype) -> None:
    problem = Problem([2048, 2000], [1, 2], page_size=16, shared_pages=100, dtype=dtype)
    truth = problem.truth()
    step = 1e-5 if dtype == torch.float32 else 2.0**-8
    assert bool(((problem.native().double() - truth).abs() <= step * truth.abs() + 1e-5).all())


def test_large_scores_do_not_overflow() -> None:
    problem = Problem([9, 30], [9, 3])
    problem.q *= 1e4
    torch.testing.assert_close(problem.native().double(), problem.truth(), atol=1e-2, rtol=0)
    problem.q.zero_()
    torch.testing.assert_close(problem.native().double(), problem.truth(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("window", [0, 6])
def test_a_row_alone_has_the_same_bits(window: int, dtype: torch.dtype) -> None:
    problem = Problem([33, 5, 18], [33, 2, 7], head_dim=80, shared_pages=1, dtype=dtype)
    together, everything = problem.native(window), problem.q
    sequence, position = problem.sequence, problem.position
    for n in range(len(everything)):
        problem.q = everything[n : n + 1]
        problem.sequence, problem.position = sequence[n : n + 1], position[n : n + 1]
        assert torch.equal(problem.native(window)[0], together[n])


@pytest.mark.usefixtures("restored_threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_number_of_threads_changes_no_bit(dtype: torch.dtype) -> None:
    problem = Problem([300, 257, 40], [64, 64, 40], heads=4, head_dim=64, page_size=16, dtype=dtype)
    torch.set_num_threads(1)
    one = problem.native()
    for threads in (2, 5):
        torch.set_num_threads(threads)
        assert torch.equal(problem.native(), one)


def test_the_page_layout_changes_no_bit() -> None:
    shape = {"lengths": [33, 29, 17], "rows": [3, 29, 2], "head_dim": 64}
    one = Problem(**shape, page_order_seed=1).native()  # type: ignore[arg-type]
    assert torch.equal(Problem(**shape, page_order_seed=2).native(), one)  # type: ignore[arg-type]
    assert torch.equal(Problem(**shape, page_size=16).native(), one)  # type: ignore[arg-type]


def test_sharing_pages_changes_no_bit() -> None:
    shared = Problem([16, 19, 16], [2, 3, 1], shared_pages=4)
    private = Problem([16, 19, 16], [2, 3, 1], shared_pages=0)
    size = shared.kv.shape[2]
    for sequence in range(3):
        for position in range([16, 19, 16][sequence]):
            source = int(shared.table[sequence, position // size]), position % size
            target = int(private.table[sequence, position // size]), position % size
            private.kv[:, target[0], target[1]] = shared.kv[:, source[0], source[1]]
    assert torch.equal(private.native(), shared.native())


def test_queries_that_are_not_contiguous_are_read_right() -> None:
    problem = Problem([9, 6], [4, 6])
    expected = problem.native()
    problem.q = torch.cat((problem.q, torch.full_like(problem.q, torch.nan)), dim=1)[:, : problem.q.shape[1]]
    assert not problem.q.is_contiguous()
    assert torch.equal(problem.native(), expected)


def test_no_rows_give_an_empty_result() -> None:
    problem = Problem([4], [0])
    assert problem.native().shape == (0, 4, 16)


def wrong(problem: Problem, what: str) -> Problem:
    plan_edits = {
        "page too large": lambda p: p.table.__setitem__((0, 0), p.kv.shape[1]),
        "page negative": lambda p: p.table.__setitem__((1, 0), -1),
        "position beyond the table": lambda p: p.position.__setitem__(-1, p.table.shape[1] * p.kv.shape[2]),
        "position negative": lambda p: p.position.__setitem__(0, -1),
        "sequence too large": lambda p: p.sequence.__setitem__(0, 2),
        "sequence negative": lambda p: p.sequence.__setitem__(0, -1),
    }
    if what in plan_edits:
        plan_edits[what](problem)
    elif what == "head dim":
        problem.q = problem.q[..., :8]
    elif what == "heads":
        problem.q = problem.q[:, :3]
    elif what == "dtype":
        problem.kv = problem.kv.bfloat16()
    elif what == "rows":
        problem.sequence = problem.sequence[:-1]
    return problem


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("page too large", "page outside the pool"),
        ("page negative", "page outside the pool"),
        ("position beyond the table", "beyond its page_table"),
        ("position negative", "beyond its page_table"),
        ("sequence too large", "sequence outside page_table"),
        ("sequence negative", "sequence outside page_table"),
        ("head dim", "head_dim"),
        ("heads", "multiple of the number of kv heads"),
        ("dtype", "one dtype"),
        ("rows", "one entry per query row"),
    ],
)
def test_a_call_that_would_read_outside_is_refused(what: str, message: str) -> None:
    problem = wrong(Problem([9, 6], [2, 6]), what)
    with pytest.raises(ValueError, match=message):
        problem.native()


def test_keys_and_values_of_different_shapes_are_refused() -> None:
    problem = Problem([9, 6], [2, 6])
    with pytest.raises(ValueError, match="differ in shape"):
        paged_attention(problem.q, problem.kv[0], problem.kv[1, :-1], problem.plan, scale=1.0)


def test_a_plan_of_wide_integers_is_converted_or_refused() -> None:
    problem = Problem([9, 6], [2, 6])
    expected = problem.native()
    plan = replace(problem.plan, row_position_N=problem.position.long())
    try:
        out = paged_attention(problem.q, problem.kv[0], problem.kv[1], plan, scale=problem.scale)
    except (ValueError, TypeError):
        return
    assert torch.equal(out, expected)


def test_a_pool_with_empty_pages_does_not_crash() -> None:
    """In a process of its own: a division by zero in native code would end the test run."""
    script = (
        "import torch\n"
        "from genssd.kernels.attention import AttentionPlan, paged_attention\n"
        "zero = torch.zeros(1, dtype=torch.int32)\n"
        "plan = AttentionPlan(page_table_BW=zero[None], row_sequence_N=zero, row_position_N=zero)\n"
        "kv = torch.empty(1, 0, 1, 4)\n"
        "try:\n"
        "    paged_attention(torch.zeros(1, 1, 4), kv, kv, plan, scale=1.0)\n"
        "except ValueError:\n"
        "    print('refused')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout == "refused\n", f"exit {done.returncode}: {done.stderr[-500:]}"
