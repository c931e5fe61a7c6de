"""What `genssd tune` times: candidates of the kernels over a head, on inputs of a model's shape.

A workload is one operator at one shape. Its samples are inputs of different sizes, one tuple of samples per class of
numbers of rows; the candidate of a class must be good on all samples of the class.

Those of attention, of the filters of a draw and of the losses have files of their own (attention_candidates_triton.py,
filter_candidates_triton.py, loss_candidates_triton.py).

Shapes:  N rows   V vocabulary   D model width
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from genssd.kernels import tune_file, tuned
from genssd.kernels.draw_triton import DRAW_TILING, LOGITS_BYTES, DrawTiling, draw_from_logits, write_logits
from genssd.kernels.head_triton import AMPERE, HeadConfiguration, HeadTiles, choose_shipped, make_launch
from genssd.kernels.logprob_triton import score_rows
from genssd.kernels.sampling import gumbel_reference

Run = Callable[[], tuple[Tensor, ...]]
"""A call that launches a candidate once and returns its outputs."""

CHECKED_ROWS = 64
"""Number of rows that are compared with float32."""
MOST_ROWS = 2048
"""Number of rows in the sample of the last class."""
SAMPLES = ((16, 64), (128,), (256,), (MOST_ROWS,))
"""Numbers of rows that are timed, for each class."""


@dataclass(frozen=True, slots=True)
class Device:
    """What the candidates depend on. capability: NVIDIA's, 80 for sm_80; ignored on AMD."""

    torch_device: torch.device
    amd: bool
    capability: int
    multiprocessors: int

    @staticmethod
    def of(device: torch.device) -> Device:
        """Return the properties of a CUDA device."""
        properties = torch.cuda.get_device_properties(device)
        capability = 10 * properties.major + properties.minor
        return Device(device, torch.version.hip is not None, capability, properties.multi_processor_count)

    @property
    def has_descriptors(self) -> bool:
        """Whether tensor descriptors are loaded by hardware."""
        return not self.amd and self.capability >= 90


def head_candidates(device: Device, dtype: torch.dtype, rows: int) -> list[HeadConfiguration]:
    """Return the configurations to time for a number of rows; the library's product is one of them."""
    sizes: list[tuple[int, ...]] = []  # block_n, block_v, block_d, warps, stages, splits, group, programs
    processors = device.multiprocessors
    if dtype == torch.float32:
        sizes = [(32, 32, 32, 8, 3, 132, 16, 2), (32, 32, 32, 4, 2, 132, 16, 2), (32, 64, 32, 8, 3, 132, 16, 1)]
    elif device.has_descriptors:
        splits = dict.fromkeys((132, processors))
        if rows <= 512:
            sizes += [(64, 256, 64, 4, stages, n, 16, 1) for stages in (5, 4) for n in splits]
            sizes += [(64, 128, 128, 4, 4, n, 16, 1) for n in splits]
            sizes += [(64, 256, 128, 4, 2, 132, 16, 1), (64, 128, 64, 4, 3, 3 * processors, 16, 3)]
        if rows > 64:
            sizes += [(128, 256, 64, 8, stages, n, 16, 1) for stages in (4, 3) for n in splits]
            sizes += [(128, 256, 64, 8, stages, 132, group, 1) for stages in (4, 3) for group in (8, 12, 24)]
            sizes += [(128, 128, 64, 8, 4, 132, 16, 1)]
        if rows > 128:
            sizes += [(256, 128, 64, 8, 4, 132, group, 1) for group in (16, 8)]
    else:
        stages = (2,) if device.amd else (4, 3)
        sizes += [(128, 128, 32, 8, n, splits, 16, 1) for n in stages for splits in dict.fromkeys((132, processors))]
        sizes += [(128, 256, 32, 8, stages[-1], processors, 16, 1), (128, 64, 32, 4, stages[-1], 2 * processors, 16, 2)]
        if rows <= 512:
            sizes += [(64, 128, 32, 4, stages[0], splits, 16, 2) for splits in dict.fromkeys((132, processors))]
            sizes += [
                (64, 256, 32, 8, stages[-1], processors, 16, 1),
                (64, 64, 32, 4, stages[0], 2 * processors, 16, 2),
            ]
    fields = ("block_n", "block_v", "block_d", "num_warps", "num_stages")
    candidates = [
        HeadConfiguration(
            tiles=HeadTiles(
                **dict(zip(fields, tiles, strict=True)),
                descriptors=dtype != torch.float32 and device.has_descriptors,
            ),
            splits=splits, group=group, per_multiprocessor=programs,
        )
        for *tiles, splits, group, programs in sizes
    ]  # fmt: skip
    if device.has_descriptors and dtype != torch.float32:
        candidates.append(HeadConfiguration(tiles=AMPERE))
    return [*candidates, dataclasses.replace(candidates[0], library=True)]


DRAW_CANDIDATES = [
    DRAW_TILING,
    *(
        DrawTiling(split=split, block=block, num_warps=warps)
        for split, block, warps in (
            (8192, 1024, 4), (32768, 2048, 8), (4096, 256, 1), (8192, 256, 1), (8192, 512, 2), (16384, 2048, 4),
        )
    ),
]  # fmt: skip


class HeadWorkload:
    """Scoring ("score") or logits ("logits") of rows under a head [V, D] of random numbers."""

    def __init__(
        self, operator: tune_file.Operator, device: Device, dtype: torch.dtype, vocabulary: int, width: int
    ) -> None:
        self.operator = operator
        self.problem = tune_file.Problem(operator=operator, dtype=tuned.name_of(dtype), shape=(vocabulary, width))
        max_rows = MOST_ROWS if operator == "score" else max(1, min(MOST_ROWS, LOGITS_BYTES // (4 * vocabulary)))
        self.samples = tuple(tuple(min(max_rows, rows) for rows in samples) for samples in SAMPLES)
        self._device, self._dtype = device, dtype

    @property
    def _inputs(self) -> tuple[Tensor, Tensor]:
        return head_inputs(self._device.torch_device, self._dtype, *self.problem.shape)

    @cached_property
    def _exact(self) -> tuple[Tensor, Tensor]:
        """Logits of the first rows in float32, and targets of all rows; every second one is its row's likeliest."""
        hidden, weight = self._inputs
        checked = hidden[:CHECKED_ROWS].float()
        logits = torch.cat([checked @ part.float().T for part in torch.split(weight, 8192)], 1)
        generator = torch.Generator(hidden.device).manual_seed(2)
        target = torch.randint(0, len(weight), (len(hidden),), device=hidden.device, generator=generator)
        target[: len(checked) : 2] = logits.argmax(1)[::2]
        return logits, target

    def make_small(self) -> HeadWorkload:
        """Return the workload of a small head that has the same specialisations of the kernels, to compile them."""
        vocabulary, width = self.problem.shape
        return HeadWorkload(self.operator, self._device, self._dtype, 4096 + vocabulary % 16, 256 + width % 16)

    def shipped(self, row_class: int) -> tune_file.Configuration:
        """Return the values of the configuration that ships for a class of rows."""
        rows = tune_file.SAMPLE_ROWS[row_class]
        device = self._device
        return choose_shipped(
            self.operator, self._dtype, rows, amd=device.amd, capability=device.capability
        ).values()  # fmt: skip

    def candidates(self, row_class: int) -> list[tune_file.Configuration]:
        """Return the values of all configurations to time for a class of rows."""
        rows = tune_file.SAMPLE_ROWS[row_class]
        return [candidate.values() for candidate in head_candidates(self._device, self._dtype, rows)]

    def make_run(self, values: tune_file.Configuration, sample: int, first: int = 0) -> Run:
        """Return the call of a candidate on so many rows as the sample says, from row `first`."""
        (hidden, weight), (_, target) = self._inputs, self._exact
        hidden, target = hidden[first : first + sample], target[first : first + sample]
        launch = make_launch(HeadConfiguration.from_values(values), hidden, weight)
        if self.operator == "score":
            return functools.partial(score_rows, hidden, weight, target, None, 1.0, None, launch=launch)
        return lambda: (write_logits(hidden, weight, None, None, launch=launch),)

    def check(self, outputs: Sequence[Tensor], sample: int) -> None:
        """Raise AssertionError unless the outputs on a sample agree with float32."""
        logits, target = self._exact
        logits, target = logits[:sample], target[: min(sample, CHECKED_ROWS)]
        outputs = [output[: len(logits)] for output in outputs]
        if self.operator == "logits":
            torch.testing.assert_close(outputs[0], logits, atol=2e-3, rtol=1e-3)
            return
        exact = logits.log_softmax(1)
        torch.testing.assert_close(outputs[0], exact.gather(1, target[:, None])[:, 0], atol=2e-3, rtol=1e-4)
        torch.testing.assert_close(outputs[2], -(exact.exp() * exact).sum(1), atol=2e-3, rtol=1e-4)
        assert int((outputs[4][::2] != 1).sum()) <= 1, "ranks of the likeliest tokens are not 1"


@functools.lru_cache(maxsize=1)
def head_inputs(device: torch.device, dtype: torch.dtype, vocabulary: int, width: int) -> tuple[Tensor, Tensor]:
    """Return hidden states [MOST_ROWS, D] and a head [V, D] of random numbers, whose logits have a deviation of 3."""
    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.empty(MOST_ROWS, width, device=device, dtype=dtype).normal_(generator=generator)
    weight = torch.empty(vocabulary, width, device=device, dtype=dtype)
    return hidden, weight.normal_(std=3 / width**0.5, generator=generator)


class DrawWorkload:
    """The pass over logits [N, V] that draws."""

    operator: tune_file.Operator = "draw"

    def __init__(self, device: Device, vocabulary: int) -> None:
        self.problem = tune_file.Problem(operator="draw", dtype="float32", shape=(vocabulary,))
        max_rows = max(1, min(256, LOGITS_BYTES // (4 * vocabulary)))
        self.samples = tuple(tuple(min(max_rows, rows) for rows in samples) for samples in SAMPLES)
        self._device, self._max_rows = device, max_rows

    @cached_property
    def _inputs(self) -> tuple[Tensor, Tensor]:
        device = self._device.torch_device
        generator = torch.Generator(device).manual_seed(1)
        logits = torch.randn(self._max_rows, self.problem.shape[0], device=device, generator=generator).mul_(3.0)
        return logits, torch.randint(1 << 62, (self._max_rows,), device=device, generator=generator)

    @cached_property
    def _exact(self) -> tuple[Tensor, Tensor]:
        """Tokens and log-probabilities of the first rows by plain torch."""
        logits, keys = (part[:16] for part in self._inputs)
        tokens = (logits + gumbel_reference(keys, logits.shape[1])).argmax(1)
        return tokens, logits.log_softmax(1)

    def make_small(self) -> DrawWorkload:
        """Return the workload of a small vocabulary with the same specialisations of the kernels, to compile them."""
        return DrawWorkload(self._device, 4096 + self.problem.shape[0] % 16)

    def shipped(self, row_class: int) -> tune_file.Configuration:
        """Return the values of the configuration that ships for a class of rows."""
        return DRAW_TILING.values()

    def candidates(self, row_class: int) -> list[tune_file.Configuration]:
        """Return the values of all configurations to time for a class of rows."""
        return [tiling.values() for tiling in DRAW_CANDIDATES]

    def make_run(self, values: tune_file.Configuration, sample: int, first: int = 0) -> Run:
        """Return the call of a candidate on so many rows as the sample says, from row `first`."""
        logits, keys = (part[first : first + sample] for part in self._inputs)
        tiling = DrawTiling.from_values(values)
        return functools.partial(draw_from_logits, logits, keys, 1.0, logits.shape[1], tiling=tiling)

    def check(self, outputs: Sequence[Tensor], sample: int) -> None:
        """Raise AssertionError unless the outputs on a sample agree with plain torch."""
        tokens, logprob = (part[:sample] for part in self._exact)
        drawn = outputs[0][: len(tokens)]
        # the logarithms of the noise may be rounded differently
        assert int((drawn != tokens).sum()) <= 1, "other tokens are drawn than by plain torch"
        chosen = logprob.gather(1, drawn[:, None])[:, 0]
        torch.testing.assert_close(outputs[1][: len(tokens)], chosen, atol=1e-3, rtol=1e-4)
