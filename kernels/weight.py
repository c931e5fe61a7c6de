"""Weights packed for the native CPU kernels.

They read a matrix 64 rows at a time, side by side, so that one instruction multiplies several rows by one input. A
weight that lies so already is read from memory in one stream, which is what decoding waits for; another is brought into
that order piece by piece, each time it is used. The results are the same, bit for bit.

Shapes:  M rows (outputs)   D inputs
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from genssd import _core
from genssd.kernels.native import runs_natively

PANEL = 64
"""Rows side by side."""


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A matrix [M, D] on the CPU that is not trained.

    cells: [ceil(M / 64), ceil(D / v), 64, v], where a cell is v values of a row, 2 of bfloat16 and 1 of others; zeros
    where there is no row or no value.
    """

    cells: Tensor
    shape: tuple[int, int]

    @property
    def dtype(self) -> torch.dtype:
        return self.cells.dtype

    @property
    def device(self) -> torch.device:
        return self.cells.device


Weight = Tensor | PackedWeight


def pack_weight(weight_MD: Tensor) -> Weight:
    """A copy for the native kernels; the weight itself where they would not take it."""
    if not runs_natively(weight_MD):
        return weight_MD
    (M, D), v = weight_MD.shape, 2 if weight_MD.dtype == torch.bfloat16 else 1
    if M % PANEL or D % v:
        weight_MD = torch.nn.functional.pad(weight_MD, (0, -D % v, 0, -M % PANEL))
    rows, inputs = weight_MD.shape
    cells = weight_MD.view(rows // PANEL, PANEL, inputs // v, v).transpose(1, 2).contiguous()
    return PackedWeight(cells, (M, D))


def select_rows(weight_MD: Weight, index_N: Tensor) -> Tensor:
    """Some of its rows, [N, D]. index_N: int64."""
    if not isinstance(weight_MD, PackedWeight):
        return weight_MD.index_select(0, index_N)  # indexing would wake torch's threads, which then hold the cores
    M, D = weight_MD.shape
    out_ND = weight_MD.cells.new_empty(len(index_N), D)
    _core.packed_rows(weight_MD.cells, M, index_N, out_ND)
    return out_ND


def cells_of(weight_MD: Weight) -> Tensor:
    """The tensor that the kernels are given, without its history."""
    return weight_MD.cells if isinstance(weight_MD, PackedWeight) else weight_MD.detach()
