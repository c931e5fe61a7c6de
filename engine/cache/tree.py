"""The branch tree of one model: which token sequence holds which pages of the cache.

A path is one token sequence; it ends in a node of its own, and shares the nodes above it with related paths.

    prompt ---- chunk 1 ---- chunk 2a        a node owns the pages that its span of tokens was written to;
                       \\---- chunk 2b        a page belongs to exactly one node

* fork is O(1): the forked node is sealed, and both paths continue in empty nodes below it.
* the first write below a half-filled page copies that page (copy-on-write): sealed pages are never written.
* drop frees the pages of nodes that no path reaches any more; a node that keeps only one child is merged into it, so a
  long trajectory stays one node and its last page can be filled without a copy.
* a path that is garbage-collected instead of dropped is noted; its pages are freed before the next page is taken, or
  when `free_abandoned` is called. The collector may run at any moment, also while the tree is being changed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Generic, Protocol, TypeVar
from weakref import WeakSet

from genssd.engine.cache.page_list import PageList
from genssd.engine.cache.page_tables import PageTables

Pages = TypeVar("Pages", bound=PageList, covariant=True)
"""The pages of a tree, with or without tensors."""

NO_TABLE = -1
"""Row of the page tables of a node without tokens."""


class Reserve(Protocol):
    """A holder of paths that can be computed again."""

    def give_up(self) -> bool:
        """Free pages that nobody else holds; return whether there were any."""
        ...


class Node:
    """A span of tokens, from position `start` on.

    `pages` are the pages that it owns. `table` is the row of the page tables that lists the pages of all positions from
    0 to its end, once it has a token.
    """

    __slots__ = ("children", "length", "pages", "parent", "start", "table")

    def __init__(self, parent: Node | None) -> None:
        self.parent = parent
        self.start = 0 if parent is None else parent.end
        self.length = 0
        self.pages: list[int] = []
        self.table = NO_TABLE
        self.children: list[Node] = []
        if parent is not None:
            parent.children.append(self)

    @property
    def end(self) -> int:
        """Position after the last token."""
        return self.start + self.length


class Path:
    """A token sequence in the cache. Valid until dropped."""

    __slots__ = ("__weakref__", "_abandoned", "node")

    def __init__(self, node: Node, abandoned: deque[Node]) -> None:
        self.node: Node | None = node
        self._abandoned = abandoned

    def __del__(self) -> None:
        if self.node is not None:
            self._abandoned.append(self.node)

    @property
    def leaf(self) -> Node:
        """Node that the path ends in."""
        assert self.node is not None, "the path was dropped"
        return self.node

    @property
    def length(self) -> int:
        """Number of tokens in the cache."""
        return self.leaf.end


class BranchTree(Generic[Pages]):
    """All paths of one model over one page pool."""

    def __init__(self, pool: Pages) -> None:
        self.pool = pool
        self.tables = PageTables()
        self.paths: WeakSet[Path] = WeakSet()
        """Paths that exist: neither dropped nor collected."""
        self.reserves: WeakSet[Reserve] = WeakSet()
        """Holders of paths that are given up when pages are needed."""
        self._abandoned: deque[Node] = deque()
        """Last nodes of paths that were collected without being dropped."""

    @property
    def num_free(self) -> int:
        """Number of free pages, those of paths that nobody holds any more included."""
        self.free_abandoned()
        return self.pool.num_free

    def give_up(self, *, but: Reserve | None = None) -> bool:
        """Let one of the reserves other than `but` free pages; return whether there were any."""
        return any(reserve.give_up() for reserve in list(self.reserves) if reserve is not but)

    def make_room(self, count: int) -> bool:
        """Return whether so many pages are free, after giving up what the reserves hold where that is needed."""
        while self.num_free < count:
            if not self.give_up():
                return False
        return True

    def root(self) -> Path:
        """Return a new empty path."""
        return self._open(Node(None))

    def fork(self, path: Path) -> Path:
        """Return a second path with the same tokens. O(1); copies nothing."""
        self.free_abandoned()
        leaf = path.leaf
        if leaf.length == 0:
            return self._open(Node(leaf.parent))
        path.node = Node(leaf)
        return self._open(Node(leaf))

    def append(self, path: Path, count: int) -> None:
        """Append `count` tokens to a path: take the pages for them.

        Raises CapacityError, changing nothing, when the pool has too few free pages.
        """
        self.free_abandoned()
        leaf, size = path.leaf, self.pool.page_size
        first = leaf.start + leaf.length
        num_held = -(-first // size)
        needed = -(-(first + count) // size) - num_held
        if leaf.length:
            if needed:
                pages = self.pool.allocate(needed)
                self.tables.write(leaf.table, num_held, pages)
                leaf.pages += pages
        elif count:
            # a half-filled page above a fresh leaf belongs to a sealed node, and a copy takes its place
            copied = 1 if first % size else 0
            pages = self.pool.allocate(needed + copied)
            leaf.table = self.tables.take()
            if leaf.parent is not None:
                self.tables.copy(leaf.parent.table, leaf.table, num_held)
                if copied:
                    self.pool.copy(self.tables.page(leaf.table, num_held - 1), pages[0])
            self.tables.write(leaf.table, num_held - copied, pages)
            leaf.pages += pages
        leaf.length += count

    def pages_to_append(self, path: Path, count: int) -> int:
        """Return how many pages `append(path, count)` takes at most; fewer if a related path is dropped before."""
        size = self.pool.page_size
        copied = 1 if path.leaf.length == 0 and path.length % size else 0
        return -(-(path.length + count) // size) - -(-path.length // size) + copied

    def count_held(self, paths: Iterable[Path | None]) -> int:
        """Return how many pages some paths hold together; None stands for a path that does not exist."""
        nodes: set[Node] = set()
        for path in paths:
            node = None if path is None else path.leaf
            while node is not None and node not in nodes:
                nodes.add(node)
                node = node.parent
        return sum(len(node.pages) for node in nodes)

    def is_alone(self, path: Path) -> bool:
        """Return whether no other path shares the last tokens of this one, so that a drop frees pages."""
        self.free_abandoned()
        return path.leaf.length > 0

    def drop(self, path: Path) -> None:
        """Forget a path; pages that no other path reaches are free at once."""
        leaf = path.leaf
        self.paths.discard(path)
        path.node = None
        self._free(leaf)

    def free_abandoned(self) -> None:
        """Free the pages of paths that were garbage-collected instead of dropped."""
        while self._abandoned:
            self._free(self._abandoned.popleft())

    def table(self, path: Path) -> list[int]:
        """Return the pages of a path, in the order of positions."""
        leaf = path.leaf
        return self._pages_of(leaf if leaf.length or leaf.parent is None else leaf.parent)

    def check(self) -> None:
        """Assert the invariants: every page is free or owned by one reachable node; tables agree with ownership."""
        self.free_abandoned()
        nodes = {path.leaf for path in self.paths}
        for path in self.paths:
            assert not path.leaf.children, "a path ends in a sealed node"
            above = path.leaf.parent
            while above is not None and above not in nodes:
                nodes.add(above)
                above = above.parent
        owned = [page for node in nodes for page in node.pages]
        assert len(owned) == len(set(owned)), "a page has two owners"
        assert len(owned) + self.pool.num_free == self.pool.num_pages, "a page leaked"
        for node in nodes:
            assert node.length or not node.children, "an empty node has children"
            assert (node.table == NO_TABLE) == (node.length == 0), "a table is kept by a node without tokens"
            table = self._pages_of(node)
            assert node.pages == (table[len(table) - len(node.pages) :] if node.pages else [])
        assert self.tables.num_taken == sum(node.length > 0 for node in nodes), "a table leaked"

    def _open(self, node: Node) -> Path:
        path = Path(node, self._abandoned)
        self.paths.add(path)
        return path

    def _free(self, leaf: Node) -> None:
        """Free the pages of a path's last node, and of the nodes above it that no other path reaches."""
        node: Node | None = leaf
        while node is not None and not node.children:
            self.pool.release(node.pages)
            self.tables.put(node.table)
            parent = node.parent
            if parent is not None:
                parent.children.remove(node)
            node = parent
        if node is not None and len(node.children) == 1:
            self._merge_into_child(node, node.children[0])

    def _merge_into_child(self, node: Node, child: Node) -> None:
        """Merge a sealed node into its only child."""
        last = -(-node.end // self.pool.page_size) - 1
        if child.length == 0:
            child.table = node.table
        else:
            if self.tables.page(node.table, last) != self.tables.page(child.table, last):
                self.pool.release([node.pages.pop()])  # the child continued in a copy of it
            self.tables.put(node.table)
        child.pages = node.pages + child.pages
        child.start = node.start
        child.length += node.length
        child.parent = node.parent
        if node.parent is not None:
            node.parent.children[node.parent.children.index(node)] = child

    def _pages_of(self, node: Node) -> list[int]:
        """Return the pages of all positions from 0 to a node's end."""
        return self.tables.pages(node.table, -(-node.end // self.pool.page_size)) if node.length else []
