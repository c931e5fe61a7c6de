"""What `genssd tune` times of the filters of a draw: the workload and its candidates (see candidates_triton.py).

Shapes:  N rows   V vocabulary
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from genssd.kernels import tune_file
from genssd.kernels.candidates_triton import SAMPLES, Device, Run
from genssd.kernels.filter_triton import SHIPPED, FilterTiles, sample_rows
from genssd.kernels.sampling import gumbel_reference, keep_likely

FILTERS = ((0, 0.95), (50, 0.95))
"""(top_k, top_p) of the draws that are timed together."""
MOST_ROWS = 256
CHECKED_ROWS = 16
"""Number of rows that are compared with plain torch."""
_CHANGES: tuple[dict[str, Any], ...] = (
    {},
    {"rounds": 2},
    {"judged": True},
    {"judged": True, "cuts": 4, "row_warps": 16},
    {"judged": True, "split": 4096, "list_part": 1024},
    {"judged": True, "split": 4096, "list_part": 1024, "split_warps": 4},
    {"judged": True, "split": 16384, "split_warps": 16, "part": 2048},
    {"judged": True, "list_part": 4096},
    {"judged": True, "part": 512, "list_part": 1024},
)
CANDIDATES = [dataclasses.replace(SHIPPED, **change) for change in _CHANGES]
"""The configurations to time; the shipped one is the first."""


class FilterWorkload:
    """Draws from logits [N, V] by top-p, and by top-k and top-p.

    Rows are wide and peaked in turns: the most likely tokens of a wide one are many thousands, those of a peaked one a
    few dozens.
    """

    operator: tune_file.Operator = "filter"

    def __init__(self, device: Device, vocabulary: int) -> None:
        self.problem = tune_file.Problem(operator="filter", dtype="float32", shape=(vocabulary,))
        self.samples = tuple(tuple(min(MOST_ROWS, rows) for rows in samples) for samples in SAMPLES)
        self._device = device

    @cached_property
    def _inputs(self) -> tuple[Tensor, Tensor]:
        device, vocabulary = self._device.torch_device, self.problem.shape[0]
        generator = torch.Generator(device).manual_seed(1)
        logits = torch.randn(MOST_ROWS, vocabulary, device=device, generator=generator).mul_(3.0)
        few = min(40, vocabulary)
        logits[1::2, :few] += 12.0 - 2.5 * torch.rand(few, device=device, generator=generator).cumsum(0).sqrt()
        return logits, torch.randint(1 << 62, (MOST_ROWS,), device=device, generator=generator)

    @cached_property
    def _exact(self) -> list[Tensor]:
        """Tokens of the first rows by plain torch, for each of FILTERS."""
        logits, keys = (part[:CHECKED_ROWS] for part in self._inputs)
        noise = gumbel_reference(keys, logits.shape[1])
        return [(keep_likely(logits, top_k, top_p, 0.0) + noise).argmax(1) for top_k, top_p in FILTERS]

    def make_small(self) -> FilterWorkload:
        """Return the workload of a small vocabulary with the same specialisations of the kernels, to compile them."""
        return FilterWorkload(self._device, 4096 + self.problem.shape[0] % 16)

    def shipped(self, row_class: int) -> tune_file.Configuration:
        """Return the values of the configuration that ships."""
        return SHIPPED.values()

    def candidates(self, row_class: int) -> list[tune_file.Configuration]:
        """Return the values of all configurations to time for a class of rows."""
        return [tiles.values() for tiles in CANDIDATES]

    def make_run(self, values: tune_file.Configuration, sample: int, first: int = 0) -> Run:
        """Return the call of a candidate on so many rows as the sample says, from row `first`."""
        logits, keys = (part[first : first + sample] for part in self._inputs)
        tiles = FilterTiles.from_values(values)
        draw = functools.partial(sample_rows, logits, keys, 1.0, tiles=tiles)
        return lambda: tuple(draw(top_k, top_p, 0.0, 0.0) for top_k, top_p in FILTERS)

    def check(self, outputs: Sequence[Tensor], sample: int) -> None:
        """Raise AssertionError unless the outputs on a sample agree with plain torch."""
        for drawn, exact in zip(outputs, self._exact, strict=True):
            expected = exact[:sample]
            # sums are rounded otherwise, and with them a threshold
            differing = int((drawn[: len(expected)] != expected).sum())
            assert differing <= 1, "other tokens are drawn than by plain torch"
