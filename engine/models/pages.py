"""The page pool of one model: a fixed tensor of key-value pages, and how a memory budget is divided into pages.

Shapes:  L layers   P pages   S page size   G kv heads   E head dim
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from genssd.engine.cache.page_list import PageList
from genssd.engine.common.amounts import format_count
from genssd.engine.common.errors import CapacityError
from genssd.engine.models.model import Decoder
from genssd.kernels.cache import copy_pages
from genssd.kernels.device_table import upload

PAGE_SIZE = {"cpu": 16, "cuda": 64}
"""Number of tokens that a page holds, by device type. On a GPU a page of one head is a tile of its attention kernel."""
LARGEST_PAGE = 4096
"""Maximum number of tokens in a page of a model whose paths have a state."""


def count_pages(start: int, end: int, page_size: int) -> int:
    """Return the number of pages that tokens from position start to end touch: a fork writes them to pages of its own.

    A half-filled page before `start` counts, because its copy is written.
    """
    return -(-end // page_size) - start // page_size if end > start else 0


class CachedModel(Protocol):
    """What the sizes of a model's cache follow from; a `LanguageModel` is one."""

    @property
    def device(self) -> torch.device:
        """Device of the cache."""
        ...

    @property
    def kv_bytes_per_token(self) -> int:
        """Number of bytes that one token takes in the cache."""
        ...

    @property
    def state_bytes(self) -> int:
        """Number of bytes that the cache of a path takes however many tokens it has."""
        ...


class PagePool(PageList):
    """The owner of `kv`, [L, 2, P, S, G, E]: pages that hold the keys and values of their tokens.

    On a GPU `kv` is a view of memory in the order [L, 2, P, G, S, E], in which the tokens of a page and head are
    contiguous.
    """

    def __init__(self, kv_L2PSGE: Tensor) -> None:
        num_pages, page_size = kv_L2PSGE.shape[2:4]
        super().__init__(num_pages, page_size, kv_L2PSGE.nbytes // max(1, num_pages), kv_L2PSGE.device)
        self.kv = kv_L2PSGE
        self._num_written = 0

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
    def promised_bytes(self) -> int:
        """Size of the pages that were never held; on a CPU they take no memory until then."""
        return self.page_nbytes * (self.num_pages - self._num_written)

    def allocate(self, count: int) -> list[int]:
        """Take pages out of the free list, those that were held before first."""
        pages = super().allocate(count)
        self._num_written = max((self._num_written, *(page + 1 for page in pages)))
        return pages

    def copy(self, source: int, destination: int) -> None:
        """Copy one page: the keys and values of all layers."""
        pages = upload(np.array([source, destination]), self.kv.device)
        copy_pages(self.kv, pages[:1], pages[1:])


def page_size_of(model: CachedModel) -> int:
    """Return how many tokens a page of a model's cache holds by default.

    Where a path has a state besides its tokens, a page is so long that its tokens take as many bytes as the state.
    """
    size = PAGE_SIZE[model.device.type]
    while size < LARGEST_PAGE and size * model.kv_bytes_per_token < model.state_bytes:
        size *= 2
    return size


def bytes_of_page(model: CachedModel, page_size: int) -> int:
    """Return the size of one page of a model's cache.

    It has room for one state: a node of the branch tree that holds tokens owns a page, and a state belongs to a node.
    """
    return page_size * model.kv_bytes_per_token + model.state_bytes


def pages_within(
    budget_bytes: int, models: Sequence[CachedModel], page_size: int | None = None
) -> list[tuple[int, int]]:
    """Return the number of pages of each model's cache and the bytes of the budget for one of them.

    One budget is split so that all models hold as many tokens. All are on one device. page_size: number of tokens
    in a page; None for that of each model. Raises CapacityError when not even one page fits.
    """
    sizes = [page_size or page_size_of(model) for model in models]
    longest = max(sizes)
    block_bytes = sum(longest // size * bytes_of_page(model, size) for model, size in zip(models, sizes, strict=True))
    if budget_bytes < block_bytes:
        raise CapacityError(
            f"a key-value budget of {budget_bytes} bytes does not hold one page, which takes {block_bytes}; raise "
            "memory_bytes or memory_utilization"
        )
    return [(budget_bytes // block_bytes * (longest // size), block_bytes * size // longest) for size in sizes]
