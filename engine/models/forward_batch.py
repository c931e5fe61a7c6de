"""The batch of one forward pass: where its tokens lie in the cache, and what they read.

Shapes:  N tokens   M tokens whose hidden states are returned
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
class ForwardBatch:
    """The inputs of a forward pass except the token ids: where the tokens lie, and what they read."""

    position_N: Tensor
    """Position of each token in its sequence, int32."""
    slot_N: Tensor
    """Place of each token in the cache, page * page_size + offset, int64."""
    tables: Mapping[int, SegmentTable | DeviceTable]
    """Segment table for each attention window; on a CUDA device it lies there already, once for all layers."""
    output_M: Tensor | None = None
    """Indices of the tokens whose hidden states are returned, int64; None returns all."""

    @staticmethod
    def from_tables(
        tables: Mapping[int, SegmentTable], device: torch.device, output: NDArray[np.int64] | None = None
    ) -> ForwardBatch:
        """Make the batch of the rows of segment tables. Does not wait for the device."""
        output_M = None if output is None else upload(output, device)
        table = next(iter(tables.values()))  # positions and slots are the same in all
        slot_N = upload(table.slot, device)
        if device.type != "cuda":
            position_N = upload(table.position, device)
            return ForwardBatch(position_N=position_N, slot_N=slot_N, tables=tables, output_M=output_M)
        on_device = {window: DeviceTable.upload(table, device) for window, table in tables.items()}
        position_N = next(iter(on_device.values())).position
        return ForwardBatch(position_N=position_N, slot_N=slot_N, tables=on_device, output_M=output_M)
