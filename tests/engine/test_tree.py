"""The branch tree against a naive model: a dict from each path to its tokens, every token marked in the cache."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from genssd.engine.cache.tree import BranchTree, Path
from genssd.engine.common.errors import CapacityError
from genssd.engine.models.pages import PagePool

NUM_PAGES = 24


def new_tree(page_size: int, num_pages: int = NUM_PAGES) -> BranchTree:
    return BranchTree(PagePool(torch.full((1, 2, num_pages, page_size, 1, 1), torch.nan)))


def append(tree: BranchTree, path: Path, markers: list[int]) -> list[int]:
    """Append a token per marker and store it: as it is in the keys, negative in the values. Returns their slots."""
    tree.append(path, len(markers))
    size, table = tree.pool.page_size, tree.table(path)
    slots = [table[p // size] * size + p % size for p in range(path.length - len(markers), path.length)]
    keys, values = (tree.pool.kv[0, i].view(-1) for i in (0, 1))
    keys[slots] = torch.tensor(markers, dtype=torch.float32)
    values[slots] = -torch.tensor(markers, dtype=torch.float32)
    return slots


def read(tree: BranchTree, path: Path) -> list[int]:
    """The markers of a path, through its page table."""
    size = tree.pool.page_size
    table = tree.table(path)
    assert len(table) == -(-path.length // size)
    slots = [table[p // size] * size + p % size for p in range(path.length)]
    keys, values = (tree.pool.kv[0, i].view(-1)[slots].tolist() for i in (0, 1))
    assert [-v for v in values] == keys
    return [int(k) for k in keys]


class TreeMachine(RuleBasedStateMachine):
    """Random roots, forks, appends, drops and abandoned paths."""

    @initialize(page_size=st.sampled_from([1, 3, 4]))
    def start(self, page_size: int) -> None:
        self.tree = new_tree(page_size)
        self.tokens: dict[Path, list[int]] = {}
        self.next_marker = 1

    def pick(self, which: int) -> Path:
        return list(self.tokens)[which % len(self.tokens)]

    @rule()
    def root(self) -> None:
        self.tokens[self.tree.root()] = []

    @precondition(lambda self: self.tokens)
    @rule(which=st.integers(0, 50))
    def fork(self, which: int) -> None:
        path, free = self.pick(which), self.tree.pool.num_free
        child = self.tree.fork(path)
        assert child not in self.tokens
        assert self.tree.pool.num_free == free, "a fork took a page"
        self.tokens[child] = list(self.tokens[path])

    @precondition(lambda self: self.tokens)
    @rule(which=st.integers(0, 50), count=st.integers(0, 9))
    def append(self, which: int, count: int) -> None:
        path, free = self.pick(which), self.tree.pool.num_free
        bound = self.tree.pages_to_append(path, count)
        markers = list(range(self.next_marker, self.next_marker + count))
        before = {other: self.tree.table(other) for other in self.tokens if other is not path}
        try:
            slots = append(self.tree, path, markers)
        except CapacityError:
            assert bound > free, "refused although it fits"
            assert self.tree.pool.num_free == free
            return
        assert len(slots) == len(set(slots)) == count
        assert free - self.tree.pool.num_free <= bound
        others = {page for table in before.values() for page in table}
        written = {slot // self.tree.pool.page_size for slot in slots}
        assert not written & others, "a page with two holders is written"
        self.next_marker += count
        self.tokens[path] += markers

    @precondition(lambda self: self.tokens)
    @rule(which=st.integers(0, 50))
    def drop(self, which: int) -> None:
        path = self.pick(which)
        self.tree.drop(path)
        del self.tokens[path]

    @precondition(lambda self: self.tokens)
    @rule(which=st.integers(0, 50))
    def abandon(self, which: int) -> None:
        """Nothing refers to the path any more, but nobody dropped it."""
        del self.tokens[self.pick(which)]

    @invariant()
    def tree_is_consistent(self) -> None:
        if not hasattr(self, "tree"):
            return
        self.tree.check()
        assert set(self.tree.paths) == set(self.tokens)
        for path, tokens in self.tokens.items():
            assert path.length == len(tokens)
            assert read(self.tree, path) == tokens
        held = {page for path in self.tokens for page in self.tree.table(path)}
        assert not any(self.tree.pool._is_free[page] for page in held)
        # a sealed node keeps its half-filled page while two relatives live below it, even if both wrote copies
        unread = NUM_PAGES - self.tree.pool.num_free - len(held)
        assert 0 <= unread <= max(0, len(self.tokens) - 1)

    def teardown(self) -> None:
        if not hasattr(self, "tree"):
            return
        for path in self.tokens:
            self.tree.drop(path)
        self.tree.check()
        assert self.tree.pool.num_free == NUM_PAGES
        assert sorted(self.tree.pool.allocate(NUM_PAGES)) == list(range(NUM_PAGES))


TreeMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestTree = TreeMachine.TestCase


def test_siblings_share_full_pages_and_copy_only_the_half_filled_one() -> None:
    tree = new_tree(page_size=4)
    first = tree.root()
    append(tree, first, list(range(10)))  # pages of 4, 4 and 2 tokens
    second, third = tree.fork(first), tree.fork(first)
    assert tree.pool.num_free == NUM_PAGES - 3
    append(tree, second, [100])
    assert tree.pool.num_free == NUM_PAGES - 4
    assert tree.table(second)[:2] == tree.table(first)[:2]
    assert tree.table(second)[2] != tree.table(first)[2]
    assert read(tree, second) == [*range(10), 100]
    assert read(tree, third) == list(range(10))
    tree.drop(second)
    assert tree.pool.num_free == NUM_PAGES - 3


@pytest.mark.parametrize("prefix", [64, 90, 127])
@pytest.mark.parametrize("own", [1, 40, 130])
def test_pages_held_and_bytes_copied_by_branches(prefix: int, own: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """64 branches of one prefix take the pages of their own tokens, and copy a half-filled page each and no other."""
    size, branches = 64, 64
    tree = new_tree(page_size=size, num_pages=400)
    copied: list[tuple[int, int]] = []
    copy = tree.pool.copy
    monkeypatch.setattr(tree.pool, "copy", lambda *pages: (copied.append(pages), copy(*pages)))
    trunk = tree.root()
    append(tree, trunk, list(range(prefix)))
    paths = [tree.fork(trunk) for _ in range(branches)]
    assert 400 - tree.pool.num_free == -(-prefix // size), "a fork takes no page"
    assert copied == [], "a fork copies nothing"
    for i, path in enumerate(paths):
        append(tree, path, list(range(1000 * i, 1000 * i + own)))
    shared, half = divmod(prefix, size)
    own_pages = -(-(half + own) // size)
    assert 400 - tree.pool.num_free == shared + (half > 0) + branches * own_pages
    assert len(copied) * tree.pool.page_nbytes == branches * (half > 0) * size * 2 * 4, "keys and values in float32"
    assert {source for source, _ in copied} == set(tree.table(trunk)[shared:])
    for i in (0, 63):
        assert read(tree, paths[i]) == [*range(prefix), *range(1000 * i, 1000 * i + own)]
    assert read(tree, trunk) == list(range(prefix)), "the shared page is as it was"


def test_the_last_path_writes_on_in_its_page_without_a_copy() -> None:
    tree = new_tree(page_size=4)
    first = tree.root()
    append(tree, first, list(range(6)))
    second = tree.fork(first)
    tree.drop(first)
    assert tree.pages_to_append(second, 2) == 0
    append(tree, second, [6, 7])
    assert tree.pool.num_free == NUM_PAGES - 2
    assert read(tree, second) == list(range(8))


def test_a_long_trajectory_of_forks_stays_one_node() -> None:
    tree = new_tree(page_size=4)
    path = tree.root()
    for step in range(20):
        child, loser = tree.fork(path), tree.fork(path)
        append(tree, loser, [900, 901])
        append(tree, child, [2 * step, 2 * step + 1])
        tree.drop(loser)
        tree.drop(path)
        path = child
    assert read(tree, path) == list(range(40))
    assert path.leaf.parent is None
    assert tree.pool.num_free == NUM_PAGES - 10


def test_an_append_that_does_not_fit_changes_nothing_and_says_how_much_is_missing() -> None:
    tree = new_tree(page_size=4, num_pages=3)
    path = tree.root()
    append(tree, path, list(range(6)))
    fork = tree.fork(path)
    with pytest.raises(
        CapacityError, match=r"a key-value cache of 3 pages .* has too few free pages: 1 of the 2 that are needed"
    ):
        tree.append(fork, 4)
    tree.check()
    assert read(tree, fork) == read(tree, path) == list(range(6))
    tree.append(fork, 2)
    assert fork.length == 8


def test_a_dropped_path_cannot_be_used() -> None:
    tree = new_tree(page_size=4)
    path = tree.root()
    tree.append(path, 3)
    tree.drop(path)
    for use in (tree.fork, tree.drop, lambda p: tree.append(p, 1)):
        with pytest.raises(AssertionError, match="dropped"):
            use(path)
    assert tree.pool.num_free == NUM_PAGES


def test_a_page_released_twice_is_our_bug() -> None:
    pool = new_tree(page_size=4).pool
    pages = pool.allocate(2)
    pool.release(pages)
    with pytest.raises(AssertionError, match="released twice"):
        pool.release(pages[:1])
