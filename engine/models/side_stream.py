"""A CUDA stream for the passes of one model, beside the stream of all other work.

    main    teacher's step --- teacher's step --- teacher's step ---
    side          student reads candidates ---- student reads ----

Everything that the model's passes touch (its cache, hidden states, captured graphs) is used in the order in which the
host queued it, whichever of the two streams it was queued on: a pass on the main stream waits for the side stream, and
the side stream waits for the main one where the model worked there since. What the other models do is never waited for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class SideStream:
    """The side stream of one model. Streams are made for `device`, a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._main: Any = torch.cuda.current_stream(device)
        self._main_has_news = True
        """Whether the model worked on the main stream since the side stream last waited for it; its weights did."""
        self._side_has_news = False
        """Whether the model worked on the side stream since the main stream last waited for it."""

    @contextmanager
    def enter(self) -> Iterator[None]:
        """Queue on the side stream what the block computes; the model's earlier work is done before."""
        if self._main_has_news:
            self._wait_for_main()
            self._main_has_news = False
        self._side_has_news = True
        with torch.cuda.stream(self._stream):
            yield

    def _wait_for_main(self) -> None:
        """Let the side stream wait for all that is queued on the main one."""
        self._stream.wait_stream(self._main)

    def follow(self) -> None:
        """Let the current stream wait for the model's work on the other one; called before each of its passes."""
        if torch.cuda.current_stream(self._device) == self._stream:
            return
        self._main = torch.cuda.current_stream(self._device)
        self._main_has_news = True
        if self._side_has_news:
            self._main.wait_stream(self._stream)
            self._side_has_news = False

    def share(self, tensor: Tensor) -> None:
        """Keep the memory of a tensor until both streams are done with what they do with it when it is freed."""
        for stream in (self._stream, self._main):
            tensor.record_stream(stream)
