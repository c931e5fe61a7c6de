"""Reads of a device's values that begin at once and end later: the host does not wait for what is queued after them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class PendingRead:
    """The values of a tensor on their way to the host. The copy begins when this is made, and `tolist` waits for it."""

    def __init__(self, values: Tensor) -> None:
        self._values = values
        self._arrived: Any = None
        if values.is_cuda:
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record()

    def tolist(self) -> list[Any]:
        """Wait for the values and return them."""
        if self._arrived is not None:
            self._arrived.synchronize()
        values: list[Any] = self._values.tolist()
        return values
