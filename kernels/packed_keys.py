"""The layout of keys in the pages of a CPU's cache: the one in which the native kernels multiply them.

A kernel multiplies a query by several keys with one instruction, so it wants the first numbers of these keys side by
side, then the second ones, and so on: as the keys were written, row by row, every step of decoding would have to
transpose them. Packed keys are transposed once, when they are written. The layout depends on the dtype alone and is one
for all instruction sets, as that of a packed weight (weight.py), whose panels have 64 rows where a page has S keys.

Shapes:  P pages   S page size   G kv heads   E head dim   v numbers of a cell   C cells of a key, E / v rounded up
"""

from __future__ import annotations

import torch
from torch import Tensor


def numbers_per_cell(dtype: torch.dtype) -> int:
    """Return how many consecutive numbers of a key lie side by side: 2 of bfloat16, 1 of other dtypes."""
    return 2 if dtype == torch.bfloat16 else 1


def pack_keys(k_PSGE: Tensor) -> Tensor:
    """Return a packed copy of the keys, [P, G, C, S, v]. Where E is odd, the last cell is filled up with zeros."""
    v = numbers_per_cell(k_PSGE.dtype)
    P, S, G, E = k_PSGE.shape
    padded = torch.nn.functional.pad(k_PSGE, (0, -E % v))
    return padded.view(P, S, G, -(-E // v), v).permute(0, 2, 3, 1, 4).contiguous()


def unpack_keys(k_PGCSv: Tensor, head_dim: int) -> Tensor:
    """Return a copy of packed keys as rows, [P, S, G, E]."""
    return k_PGCSv.permute(0, 3, 1, 2, 4).flatten(3)[..., :head_dim]


def split_layer(kv_2PSGE: Tensor) -> tuple[Tensor, Tensor]:
    """Return the pages of keys and of values of one layer of a cache, as its device holds them.

    kv_2PSGE: the memory of the layer, of which the first half is that of the keys. On a CPU it must be contiguous and
    E even for bfloat16, and the keys are a packed view of it, [P, G, C, S, v]; on other devices they are rows, [P, S,
    G, E], as the values are everywhere.
    """
    k_PSGE, v_PSGE = kv_2PSGE
    if k_PSGE.device.type != "cpu":
        return k_PSGE, v_PSGE
    v = numbers_per_cell(k_PSGE.dtype)
    P, S, G, E = k_PSGE.shape
    return k_PSGE.view(P, G, E // v, S, v), v_PSGE
