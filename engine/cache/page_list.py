"""The free list of a cache's pages: how many tokens there is room for, whatever holds their keys and values."""

from __future__ import annotations

from weakref import WeakSet

import torch

from genssd.engine.common.amounts import format_count
from genssd.engine.common.errors import CapacityError


class PageList:
    """The pages of one model's cache by number: a page is free or held by exactly one node of the branch tree.

    page_size: number of tokens that a page holds. page_nbytes: size of one page on its device. The pages themselves
    hold no tensors here; those of PagePool do.
    """

    def __init__(self, num_pages: int, page_size: int, page_nbytes: int, device: torch.device) -> None:
        self.page_size = page_size
        self.page_nbytes = page_nbytes
        self.device = device
        self.page_bytes = page_nbytes
        """Bytes of the memory budget for one page: of as many tokens in every cache that shares the budget."""
        # a stack: the page freed last is written next
        self._free = list(range(num_pages - 1, -1, -1))
        self._is_free = [True] * num_pages
        _lists.add(self)

    @property
    def nbytes(self) -> int:
        """Size of all pages in bytes."""
        return self.page_nbytes * self.num_pages

    @property
    def num_pages(self) -> int:
        """Number of all pages."""
        return len(self._is_free)

    @property
    def num_free(self) -> int:
        """Number of free pages."""
        return len(self._free)

    def describe(self, num_pages: int | None = None) -> str:
        """Return a number of pages with the memory budget that holds them, for messages. None for all pages.

        The bytes are those of memory_bytes: pages in all caches that share the budget.
        """
        count = self.num_pages if num_pages is None else num_pages
        return f"{format_count(count, 'page')} (memory_bytes={count * self.page_bytes})"

    @property
    def promised_bytes(self) -> int:
        """Number of bytes that the cache will still take when its pages fill."""
        return self.page_nbytes * self.num_free

    def allocate(self, count: int) -> list[int]:
        """Take pages out of the free list. Raises CapacityError, taking none, when too few are free."""
        if count > len(self._free):
            raise CapacityError(
                f"a key-value cache of {self.describe()} has too few free pages: {len(self._free)} of the {count} that "
                "are needed"
            )
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._is_free[page] = False
        return pages

    def release(self, pages: list[int]) -> None:
        """Return pages to the free list."""
        for page in pages:
            assert not self._is_free[page], f"page {page} released twice"
            self._is_free[page] = True
        self._free.extend(reversed(pages))

    def copy(self, source: int, destination: int) -> None:
        """Copy what one page holds to another: nothing here."""


_lists: WeakSet[PageList] = WeakSet()


def count_promised_bytes() -> int:
    """Return how much memory the caches on the CPU will still take when they fill."""
    return sum(pages.promised_bytes for pages in _lists if pages.device.type == "cpu")
