"""Attention problems over shared pages of a KV cache, and their results by brute force, for the tests of kernels."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from genssd.kernels.attention import SegmentTable, build_segment_table
from genssd.kernels.packed_keys import pack_keys

PROMPT = 1000
"""Smallest name of a token in a random tree; every token of a tree has a name of its own."""


@dataclass(kw_only=True)
class Problem:
    """Sequences of named tokens, with their KV cache. Tokens of equal name have the same key and value.

    Slots of the cache that hold no token are NaN. Shapes: H heads, G KV heads, E head dimension.
    """

    sequences: list[list[int]]
    """Names of every sequence's tokens."""
    rows: list[int]
    """Number of each sequence's last tokens that are queries."""
    q: Tensor
    """[sum of rows, H, E]."""
    k_pages: Tensor
    """[pages, page size, G, E], as rows; see packed_keys."""
    v_pages: Tensor
    """[pages, page size, G, E]."""
    tables: np.ndarray
    """Page numbers of every sequence, int32 [sequences, pages]."""
    vectors: dict[int, Tensor]
    """Key and value of every name, [2, G, E], rounded to the dtype of the pages."""

    @property
    def packed_keys(self) -> Tensor:
        """The pages of keys as a CPU's cache holds them and the native kernels read them."""
        return pack_keys(self.k_pages)

    def table(
        self, *, window: int = 0, segment: int = 8, unit_rows: int = 64, keep: Sequence[int] = ()
    ) -> SegmentTable:
        """Return the segment table. keep: indices of the sequences in it; empty for all."""
        kept = list(keep or range(len(self.sequences)))
        lengths = np.array([len(self.sequences[i]) for i in kept], dtype=np.int32)
        rows = np.array([self.rows[i] for i in kept], dtype=np.int32)
        size = self.k_pages.shape[1]
        return build_segment_table(
            self.tables, np.array(kept, dtype=np.int32), lengths - rows, rows,
            page_size=size, segment=-(-segment // size) * size, window=window, unit_rows=unit_rows,
        )  # fmt: skip

    def truth(
        self,
        *,
        scale: float,
        window: int = 0,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        sizes: bool = False,
    ) -> Tensor:
        """Return attention of every row over its own tokens in float64, one head at a time, [rows, H, E].

        sizes: take the magnitudes of the values instead of the values, for error bounds.
        """
        outs = []
        row = 0
        for sequence, count in zip(self.sequences, self.rows, strict=True):
            for last in range(len(sequence) - count, len(sequence)):
                visible = sequence[max(0, last + 1 - window) if window else 0 : last + 1]
                k, v = torch.stack([self.vectors[name].double() for name in visible]).unbind(1)
                v = v.abs() if sizes else v
                heads = self.q.shape[1]
                out = []
                for head in range(heads):
                    g = head // (heads // k.shape[1])
                    z = k[:, g] @ self.q[row, head].double() * scale
                    z = softcap * torch.tanh(z / softcap) if softcap is not None else z
                    z = z if sinks is None else torch.cat((z, sinks[head : head + 1].double()))
                    out.append(z.softmax(0)[: len(visible)] @ v[:, g])
                outs.append(torch.stack(out))
                row += 1
        return torch.stack(outs)


def build(
    sequences: list[list[int]],
    rows: list[int],
    *,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    page_size: int = 4,
    dtype: torch.dtype = torch.float32,
    private: bool = False,
    layout_seed: int = 0,
    seed: int = 0,
) -> Problem:
    """Build a problem in which sequences with the same prefix share the pages that the prefix fills.

    private: no page is shared. layout_seed: of the order of the pages in memory. seed: of queries, keys and values.
    """
    names = sorted({name for sequence in sequences for name in sequence})
    vectors = {name: _vector(name, seed, kv_heads, head_dim).to(dtype) for name in names}
    numbers: dict[tuple[object, ...], int] = {}
    width = max((-(-len(s) // page_size) for s in sequences), default=1)
    keys: list[list[tuple[object, ...]]] = []
    for i, sequence in enumerate(sequences):
        starts = range(0, len(sequence), page_size)
        full = [start + page_size <= len(sequence) for start in starts]
        keys.append(
            [
                (tuple(sequence[: start + page_size]), None if is_full and not private else i)
                for start, is_full in zip(starts, full, strict=True)
            ]
        )
        for key in keys[-1]:
            numbers.setdefault(key, len(numbers))
    pages = len(numbers) + 3
    order = torch.randperm(pages, generator=torch.Generator().manual_seed(layout_seed)).tolist()
    kv = torch.full((2, pages, page_size, kv_heads, head_dim), torch.nan, dtype=dtype)
    tables = np.full((len(sequences), max(1, width)), pages + 7, dtype=np.int32)  # no page has this number
    for i, sequence in enumerate(sequences):
        for index, key in enumerate(keys[i]):
            page = tables[i, index] = order[numbers[key]]
            for offset, name in enumerate(sequence[index * page_size : (index + 1) * page_size]):
                kv[:, page, offset] = vectors[name]
    q = torch.randn(sum(rows), heads, head_dim, generator=torch.Generator().manual_seed(seed + 1)).to(dtype)
    return Problem(
        sequences=sequences, rows=rows, q=q, k_pages=kv[0], v_pages=kv[1], tables=tables, vectors=vectors
    )  # fmt: skip


def random_tree(seed: int, *, depth: int, fan_out: int, chunk: int, trees: int = 2) -> list[list[int]]:
    """Return the leaves of random trees in random order, as sequences of names; chunks differ in length."""
    rng = random.Random(seed)
    names = iter(range(PROMPT, 1 << 30))

    def grow(stem: list[int], level: int) -> list[list[int]]:
        stem = stem + [next(names) for _ in range(rng.randint(1, chunk))]
        if level == 0:
            return [stem]
        return [leaf for _ in range(rng.randint(1, fan_out)) for leaf in grow(stem, level - 1)]

    leaves = [leaf for _ in range(trees) for leaf in grow([], depth)]
    rng.shuffle(leaves)
    return leaves


def _vector(name: int, seed: int, kv_heads: int, head_dim: int) -> Tensor:
    return torch.randn(2, kv_heads, head_dim, generator=torch.Generator().manual_seed(1_000_003 * seed + name))
