"""What one forward pass needs to know of its tokens besides their ids: where they lie and what they read.

Shapes:  N tokens
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from genssd.kernels.attention import SegmentTable


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """position: int32 [N]. slot: int64 [N], page * page_size + offset. tables: by the window of a layer."""

    position_N: Tensor
    slot_N: Tensor
    tables: Mapping[int, SegmentTable]
