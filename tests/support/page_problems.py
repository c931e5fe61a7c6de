"""Attention problems over shared pages, and their answers by brute force: what tests of several kernels start from."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from genssd.kernels.attention import SegmentTable, build_segment_table

PROMPT = 1000
"""Tokens of different stems never have the same name."""


@dataclass(kw_only=True)
class Problem:
    """Sequences of named tokens; a name stands for a key and a value. Slots that no token was written to hold NaN."""

    sequences: list[list[int]]
    rows: list[int]
    """How many of each sequence's last tokens are queried."""
    q: Tensor
    k_pages: Tensor
    v_pages: Tensor
    tables: np.ndarray
    vectors: dict[int, Tensor]
    """[2, G, E] of every name, rounded to the dtype of the pages."""

    def table(
        self, *, window: int = 0, segment: int = 8, unit_rows: int = 64, keep: Sequence[int] = ()
    ) -> SegmentTable:
        """The segment table; keep: of these sequences alone."""
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
        """float64 attention of every row over its own tokens, one head at a time; sizes: of the values' magnitudes."""
        outs = []
        row = 0
        for sequence, count in zip(self.sequences, self.rows, strict=True):
            for last in range(len(sequence) - count, len(sequence)):
                seen = sequence[max(0, last + 1 - window) if window else 0 : last + 1]
                k, v = torch.stack([self.vectors[name].double() for name in seen]).unbind(1)
                v = v.abs() if sizes else v
                heads = self.q.shape[1]
                out = []
                for head in range(heads):
                    g = head // (heads // k.shape[1])
                    z = k[:, g] @ self.q[row, head].double() * scale
                    z = softcap * torch.tanh(z / softcap) if softcap is not None else z
                    z = z if sinks is None else torch.cat((z, sinks[head : head + 1].double()))
                    out.append(z.softmax(0)[: len(seen)] @ v[:, g])
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
    """Pages are shared by sequences that begin alike, as far as their pages are full; private: by none."""
    names = sorted({name for sequence in sequences for name in sequence})
    vectors = {name: _vector(name, seed, kv_heads, head_dim).to(dtype) for name in names}
    held: dict[tuple[object, ...], int] = {}
    width = max((-(-len(s) // page_size) for s in sequences), default=1)
    keys: list[list[tuple[object, ...]]] = []
    for i, sequence in enumerate(sequences):
        starts = range(0, len(sequence), page_size)
        full = [start + page_size <= len(sequence) for start in starts]
        keys.append(
            [
                (tuple(sequence[: start + page_size]), None if whole and not private else i)
                for start, whole in zip(starts, full, strict=True)
            ]
        )
        for key in keys[-1]:
            held.setdefault(key, len(held))
    pages = len(held) + 3
    place = torch.randperm(pages, generator=torch.Generator().manual_seed(layout_seed)).tolist()
    kv = torch.full((2, pages, page_size, kv_heads, head_dim), torch.nan, dtype=dtype)
    tables = np.full((len(sequences), max(1, width)), pages + 7, dtype=np.int32)  # beyond the end: no page at all
    for i, sequence in enumerate(sequences):
        for index, key in enumerate(keys[i]):
            page = tables[i, index] = place[held[key]]
            for offset, name in enumerate(sequence[index * page_size : (index + 1) * page_size]):
                kv[:, page, offset] = vectors[name]
    q = torch.randn(sum(rows), heads, head_dim, generator=torch.Generator().manual_seed(seed + 1)).to(dtype)
    return Problem(
        sequences=sequences, rows=rows, q=q, k_pages=kv[0], v_pages=kv[1], tables=tables, vectors=vectors
    )  # fmt: skip


def random_tree(seed: int, *, depth: int, fan_out: int, chunk: int, trees: int = 2) -> list[list[int]]:
    """Leaves of random trees of ragged chunks, in random order."""
    chance = random.Random(seed)
    names = iter(range(PROMPT, 1 << 30))

    def grow(stem: list[int], level: int) -> list[list[int]]:
        stem = stem + [next(names) for _ in range(chance.randint(1, chunk))]
        if level == 0:
            return [stem]
        return [leaf for _ in range(chance.randint(1, fan_out)) for leaf in grow(stem, level - 1)]

    leaves = [leaf for _ in range(trees) for leaf in grow([], depth)]
    chance.shuffle(leaves)
    return leaves


def _vector(name: int, seed: int, kv_heads: int, head_dim: int) -> Tensor:
    return torch.randn(2, kv_heads, head_dim, generator=torch.Generator().manual_seed(1_000_003 * seed + name))
