"""The page pool of one model: a fixed tensor of key-value pages, and the list of free pages.

Shapes:  L layers   P pages   S page size   G kv heads   E head dim
"""

from __future__ import annotations

from weakref import WeakSet

import numpy as np
import torch
from torch import Tensor

from genssd.engine.amounts import format_count
from genssd.engine.errors import CapacityError
from genssd.engine.model import Decoder
from genssd.kernels.cache import copy_pages
from genssd.kernels.device_table import upload

PAGE_SIZE = {"cpu": 16, "cuda": 64}
"""Number of tokens that a page holds, by device type. On a GPU a page of one head is a tile of its attention kernel."""


def count_pages(start: int, end: int, page_size: int) -> int:
    """Return the number of pages that tokens from position start to end touch: a fork writes them to pages of its own.

    A half-filled page before `start` counts, because its copy is written.
    """
    return -(-end // page_size) - start // page_size if end > start else 0


class PagePool:
    """The owner of `kv`, [L, 2, P, S, G, E], and of its free list: a page is free or held by exactly one tree node.

    On a GPU `kv` is a view of memory in the order [L, 2, P, G, S, E], in which the tokens of a page and head are
    contiguous.
    """

    def __init__(self, kv_L2PSGE: Tensor) -> None:
        self.kv = kv_L2PSGE
        self.page_size = kv_L2PSGE.shape[3]
        self.page_bytes = kv_L2PSGE.nbytes // kv_L2PSGE.shape[2]
        """Bytes of the memory budget for one page: of a page in every cache that shares the budget with this one."""
        # a stack: the page freed last is written next, so memory that was never needed is never touched
        self._free = list(range(kv_L2PSGE.shape[2] - 1, -1, -1))
        self._is_free = [True] * kv_L2PSGE.shape[2]
        self._num_written = 0
        _pools.add(self)

    @staticmethod
    def for_model(decoder: Decoder, num_pages: int, page_size: int | None = None) -> PagePool:
        """Allocate an uninitialised pool on the decoder's device, in its dtype.

        page_size: number of tokens that a page holds; None for that of PAGE_SIZE. Raises CapacityError when the device
        has too little memory.
        """
        c = decoder.config
        size, heads = page_size or PAGE_SIZE[decoder.device.type], c.num_key_value_heads
        on_gpu = decoder.device.type == "cuda"
        page = (heads, size) if on_gpu else (size, heads)
        try:
            kv = torch.empty(
                c.num_hidden_layers, 2, num_pages, *page, c.head_dim, dtype=decoder.dtype, device=decoder.device
            )
            return PagePool(kv.transpose(3, 4) if on_gpu else kv)
        except RuntimeError as error:
            reason, num_bytes = str(error).splitlines()[0], num_pages * size * decoder.kv_bytes_per_token
            raise CapacityError(
                f"a key-value cache of {format_count(num_pages, 'page')} ({num_bytes} bytes) cannot be had: {reason}"
            ) from None

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
        """Size of the pages that were never held; on a CPU they take no memory until then."""
        return self.kv.nbytes // max(1, self.num_pages) * (self.num_pages - self._num_written)

    def allocate(self, count: int) -> list[int]:
        """Take pages out of the free list. Raises CapacityError, taking none, when too few are free."""
        if count > len(self._free):
            raise CapacityError(
                f"a key-value cache of {self.describe()} has too few free pages: {len(self._free)} of the {count} that "
                "are needed"
            )
        pages = [self._free.pop() for _ in range(count)]
        self._num_written = max((self._num_written, *(page + 1 for page in pages)))
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
        """Copy one page: the keys and values of all layers."""
        pages = upload(np.array([source, destination]), self.kv.device)
        copy_pages(self.kv, pages[:1], pages[1:])


_pools: WeakSet[PagePool] = WeakSet()


def count_promised_bytes() -> int:
    """Return how much memory the pools on the CPU will still take when they fill."""
    return sum(pool.promised_bytes for pool in _pools if pool.kv.device.type == "cpu")


def pages_within(budget_bytes: int, decoders: list[Decoder], page_size: int | None = None) -> int:
    """Return how many pages each pool gets when one budget is split so that all models hold as many tokens.

    All decoders are on one device. page_size: as for `PagePool.for_model`. Raises CapacityError when not even one page
    fits.
    """
    size = page_size or PAGE_SIZE[decoders[0].device.type]
    page_bytes = size * sum(d.kv_bytes_per_token for d in decoders)
    if budget_bytes < page_bytes:
        raise CapacityError(
            f"a key-value budget of {budget_bytes} bytes does not hold one page, which takes {page_bytes}; raise "
            "memory_bytes or memory_utilization"
        )
    return budget_bytes // page_bytes
