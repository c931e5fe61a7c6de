"""What one forward pass needs to know of its tokens besides their ids: where they lie and what they read.

Shapes:  N tokens   M of them
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from genssd.kernels.attention import SegmentTable
from genssd.kernels.device_table import DeviceTable, upload


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """position: int32 [N]. slot: int64 [N], page * page_size + offset. tables: by the window of a layer; on a CUDA
    device they are there already, once for all layers. wanted: int64 [M], the rows whose hidden states are asked for;
    None: all."""

    position_N: Tensor
    slot_N: Tensor
    tables: Mapping[int, SegmentTable | DeviceTable]
    wanted_M: Tensor | None = None

    @staticmethod
    def of(tables: Mapping[int, SegmentTable], device: torch.device, wanted: NDArray[np.int64] | None = None) -> Batch:
        """Of the rows of one batch. Does not wait for the device."""
        wanted_M = None if wanted is None else upload(wanted, device)
        some = next(iter(tables.values()))  # where rows stand and lie is the same in all
        if device.type != "cuda":
            position, slot = upload(some.position, device), upload(some.slot, device)
            return Batch(position_N=position, slot_N=slot, tables=tables, wanted_M=wanted_M)
        there = {window: DeviceTable.upload(table, device) for window, table in tables.items()}
        position = next(iter(there.values())).position
        return Batch(position_N=position, slot_N=upload(some.slot, device), tables=there, wanted_M=wanted_M)
