"""Weights packed for the native CPU kernels.

The kernels read a matrix in panels of 64 interleaved rows, so that one instruction multiplies several rows by one
input. A packed weight already has this order and is read from memory in one stream, which bounds the speed of decoding;
any other weight is brought into this order piece by piece, each time it is used. The results are the same, bit for bit.

Shapes:  M rows (outputs)   D inputs
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from genssd import _core
from genssd.kernels.native import runs_natively

PANEL = 64
"""Number of interleaved rows of a panel."""


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A matrix [M, D] on the CPU, packed for the native kernels; it is not trained."""

    cells: Tensor
    """[ceil(M / 64), ceil(D / v), 64, v], where a cell is v values of a row: 2 of bfloat16, 1 of other dtypes; padded
    with zeros."""
    shape: tuple[int, int]
    """The shape (M, D) of the matrix without padding."""

    @property
    def dtype(self) -> torch.dtype:
        return self.cells.dtype

    @property
    def device(self) -> torch.device:
        return self.cells.device


Weight = Tensor | PackedWeight


def pack_weight(weight_MD: Tensor) -> Weight:
    """Return a packed copy of a weight, or the weight itself where the native kernels do not compute with it."""
    if not runs_natively(weight_MD):
        return weight_MD
    (M, D), v = weight_MD.shape, 2 if weight_MD.dtype == torch.bfloat16 else 1
    if M % PANEL or D % v:
        weight_MD = torch.nn.functional.pad(weight_MD, (0, -D % v, 0, -M % PANEL))
    rows, inputs = weight_MD.shape
    cells = weight_MD.view(rows // PANEL, PANEL, inputs // v, v).transpose(1, 2).contiguous()
    return PackedWeight(cells, (M, D))


def select_rows(weight_MD: Weight, index_N: Tensor) -> Tensor:
    """Return the rows of a weight with the indices index_N (int64), [N, D]."""
    if not isinstance(weight_MD, PackedWeight):
        return weight_MD.index_select(0, index_N)  # indexing would wake torch's threads, which then occupy the cores
    M, D = weight_MD.shape
    out_ND = weight_MD.cells.new_empty(len(index_N), D)
    _core.packed_rows(weight_MD.cells, M, index_N, out_ND)
    return out_ND


def cells_of(weight_MD: Weight) -> Tensor:
    """Return the tensor that represents a weight to the native kernels, without its autograd history."""
    return weight_MD.cells if isinstance(weight_MD, PackedWeight) else weight_MD.detach()
