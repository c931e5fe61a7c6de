"""What `genssd tune` times of the losses under a head: the workloads and their candidates (see candidates_triton.py).

Shapes:  N rows   V vocabulary   D model width   E teacher's width
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from genssd.kernels import tune_file, tuned
from genssd.kernels.candidates_triton import Device, Run
from genssd.kernels.cross_entropy import compute_cross_entropy
from genssd.kernels.divergence import compute_divergence
from genssd.kernels.head_triton import HOPPER_MANY, HOPPER_SOME, HOPPER_TALL, HeadTiles
from genssd.kernels.loss_launch_triton import LossConfiguration, choose_shipped
from genssd.kernels.rows_triton import EVERY_ROW

ROWS = 8192
"""Number of rows that are timed: two chunks of cross-entropy, four of a divergence."""
CHECKED_ROWS = 32
"""Number of rows whose losses and gradients are compared with float32."""
CHECKED_TOKENS = 64
"""Number of first rows of the weight whose gradient is compared."""
PART = 8192
"""Vocabulary entries that are multiplied at once for the comparison."""
KINDS = ("forward_kl", "jsd")
"""Divergences that are timed: one whose gradient takes one pass over normalized logits, and one that takes two."""
CHUNK_ROWS = {"cross_entropy": (2048, 1024), "divergence": (1024,)}
"""Rows of a chunk that are timed beside as many as fit."""
SQUARE = HeadTiles(block_n=128, block_v=128, block_d=64, num_warps=8, num_stages=4, descriptors=True)
"""Tiles for sm_100, where the registers do not hold larger ones beside the places that they are written to."""


def fused_tiles(device: Device, dtype: torch.dtype, shipped: HeadTiles) -> list[HeadTiles]:
    """Return the tiles of the product that takes normalizers; none where no matrix unit multiplies the dtype."""
    if dtype == torch.float32:
        return []
    if not device.has_descriptors:
        return [shipped]
    return [SQUARE] if device.capability >= 100 else [HOPPER_MANY, HOPPER_SOME, HOPPER_TALL]


def loss_candidates(operator: tune_file.Operator, device: Device, dtype: torch.dtype) -> list[LossConfiguration]:
    """Return the configurations of "cross_entropy" or "divergence" to time; the shipped one is the first.

    None takes more rows at once than the shipped one, and so none more memory but the partial sums of a fused product,
    a few MiB.
    """
    shipped = choose_shipped(operator, dtype, amd=device.amd, capability=device.capability)
    products = [
        dataclasses.replace(shipped, fused=True, tiles=tiles)
        for tiles in fused_tiles(device, dtype, shipped.tiles)
    ]  # fmt: skip
    per_warp = shipped.block_entries // shipped.row_warps
    programs = {4: EVERY_ROW, 16: device.multiprocessors, 32: max(1, device.multiprocessors // 2)}
    changes: list[dict[str, Any]] = [
        {"block_entries": warps * per_warp, "row_warps": warps, "programs": count} for warps, count in programs.items()
    ]
    changes += [{"chunk_rows": rows} for rows in CHUNK_ROWS[operator]]
    bases = [shipped, *products[:1]]
    return [*bases, *products[1:], *(dataclasses.replace(base, **change) for base in bases for change in changes)]


def make_head(device: torch.device, dtype: torch.dtype, vocabulary: int, width: int, seed: int) -> list[Tensor]:
    """Return hidden states [ROWS, D] and a head [V, D] of random numbers, whose logits have a deviation of 3."""
    generator = torch.Generator(device).manual_seed(seed)
    hidden = torch.empty(ROWS, width, device=device, dtype=dtype).normal_(generator=generator)
    weight = torch.empty(vocabulary, width, device=device, dtype=dtype)
    return [hidden, weight.normal_(std=3 / width**0.5, generator=generator)]


def iter_logits(hidden: Tensor, weight: Tensor) -> Iterator[Tensor]:
    """Yield the logits of all rows in float32, for PART entries of the vocabulary after the other."""
    for part in torch.split(weight, PART):
        yield hidden.float() @ part.float().T


def row_normalizers(hidden: Tensor, weight: Tensor) -> Tensor:
    """Return the log-sum-exps of the logits of all rows, float32 [N]."""
    sums = [part.logsumexp(1) for part in iter_logits(hidden, weight)]
    return torch.stack(sums).logsumexp(0)


class LossWorkload:
    """What the losses have in common: outputs (total, losses [N], d_hidden [N, D], d_weight [V, D]) and their check.

    There is one class of rows: a training has its own number of rows in every batch, and its bits are promised to be
    the same in every run, not for every batch.
    """

    operator: tune_file.Operator

    def __init__(self, device: Device, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        self.problem = tune_file.Problem(operator=self.operator, dtype=tuned.name_of(dtype), shape=shape)
        self._device, self._dtype = device, dtype

    def shipped(self, row_class: int) -> tune_file.Configuration:
        """Return the values of the configuration that ships."""
        device = self._device
        return choose_shipped(self.operator, self._dtype, amd=device.amd, capability=device.capability).values()

    def candidates(self, row_class: int) -> list[tune_file.Configuration]:
        """Return the values of all configurations to time."""
        return [candidate.values() for candidate in loss_candidates(self.operator, self._device, self._dtype)]

    @property
    def _small_shape(self) -> tuple[int, ...]:
        """The shape of a small problem that has the same specialisations of the kernels."""
        vocabulary, *widths = self.problem.shape
        return (4096 + vocabulary % 16, *(256 + width % 16 for width in widths))

    def _head(self, side: int) -> list[Tensor]:
        """Return hidden states and weight: of the student (0) or of the teacher (1)."""
        vocabulary, *widths = self.problem.shape
        return loss_head(self._device.torch_device, self._dtype, vocabulary, widths[side], side)

    def _compare(self, outputs: Sequence[Tensor], losses: Tensor, d_first: Tensor, d_tokens: Tensor) -> None:
        """Raise AssertionError unless outputs agree with float32.

        losses: of the first CHECKED_ROWS rows. d_first: gradient in their logits [., V]. d_tokens: gradient in the
        logits of the first CHECKED_TOKENS tokens for all rows, [N, .].
        """
        hidden, weight = self._head(0)
        torch.testing.assert_close(outputs[1][: len(losses)], losses, atol=2e-3, rtol=1e-4)
        for computed, exact in (
            (outputs[2][: len(losses)], d_first @ weight.float()),
            (outputs[3][: d_tokens.shape[1]], d_tokens.T @ hidden.float()),
        ):
            error = (computed.float() - exact).norm() / exact.norm()
            assert error < 1e-2, f"a gradient differs from float32 by {error:.4f} of its norm"


@functools.lru_cache(maxsize=2)
def loss_head(device: torch.device, dtype: torch.dtype, vocabulary: int, width: int, seed: int) -> list[Tensor]:
    """Return `make_head`, kept for the workloads that have it in common."""
    return make_head(device, dtype, vocabulary, width, seed)


class CrossEntropyWorkload(LossWorkload):
    """Cross-entropy of rows under a head [V, D], with the gradients of both."""

    operator: tune_file.Operator = "cross_entropy"
    samples = ((ROWS,),)

    @cached_property
    def _target(self) -> Tensor:
        device = self._device.torch_device
        generator = torch.Generator(device).manual_seed(2)
        return torch.randint(0, self.problem.shape[0], (ROWS,), device=device, generator=generator)

    @cached_property
    def _exact(self) -> tuple[Tensor, Tensor, Tensor]:
        """Losses and gradients in the logits, as `_compare` takes them."""
        hidden, weight = self._head(0)
        lse, first = row_normalizers(hidden, weight), torch.cat(list(iter_logits(hidden[:CHECKED_ROWS], weight)), 1)
        target = self._target[: len(first), None]
        d_first = (first - lse[: len(first), None]).exp()
        d_first.scatter_add_(1, target, torch.full_like(d_first[:, :1], -1.0))
        tokens = torch.arange(min(CHECKED_TOKENS, len(weight)), device=weight.device)
        d_tokens = (hidden.float() @ weight[: len(tokens)].float().T - lse[:, None]).exp()
        d_tokens -= (self._target[:, None] == tokens).float()
        return lse[: len(first)] - first.gather(1, target)[:, 0], d_first, d_tokens

    def make_small(self) -> CrossEntropyWorkload:
        """Return the workload of a small head that has the same specialisations of the kernels, to compile them."""
        return CrossEntropyWorkload(self._device, self._dtype, self._small_shape)

    def make_run(self, values: tune_file.Configuration, sample: int, first: int = 0) -> Run:
        """Return the call of a candidate on so many rows as the sample says, from row `first`."""
        hidden, weight = self._head(0)
        rows = slice(first, first + sample)
        hidden, target = hidden[rows], self._target[rows]
        ones = torch.ones(len(hidden), device=hidden.device)
        configuration = LossConfiguration.from_values(values)
        return lambda: compute_cross_entropy(
            hidden, weight, target, ones, 1.0, None, True, True, configuration=configuration
        )

    def check(self, outputs: Sequence[Tensor], sample: int) -> None:
        """Raise AssertionError unless the outputs agree with float32."""
        self._compare(outputs, *self._exact)


class DivergenceWorkload(LossWorkload):
    """Divergence of a student's head [V, D] from a teacher's [V, E], with the student's gradients.

    A sample is the index of a kind in KINDS.
    """

    operator: tune_file.Operator = "divergence"
    samples = (tuple(range(len(KINDS))),)

    @functools.cache  # noqa: B019  a workload lives as long as the command
    def _exact(self, sample: int) -> tuple[Tensor, Tensor, Tensor]:
        """Losses and gradients in the logits, as `_compare` takes them."""
        student, teacher = self._head(0), self._head(1)
        lse_p, lse_q = row_normalizers(*student), row_normalizers(*teacher)
        dz: list[Tensor] = []
        losses = torch.zeros_like(lse_p)
        mean = torch.zeros_like(lse_p)
        for x, y in zip(iter_logits(*student), iter_logits(*teacher), strict=True):
            log_p, log_q = x - lse_p[:, None], y - lse_q[:, None]
            p, q = log_p.exp(), log_q.exp()
            if KINDS[sample] == "forward_kl":
                losses += (q * (log_q - log_p)).sum(1)
                g, mean_of_part = -q, -q.sum(1)
            else:
                log_m = torch.logaddexp(log_p, log_q) - math.log(2.0)
                student_term = 0.5 * p * (log_p - log_m)
                losses += (0.5 * q * (log_q - log_m) + student_term).sum(1)
                g, mean_of_part = student_term, student_term.sum(1)
            mean += mean_of_part
            dz.append(torch.stack((g[:CHECKED_ROWS], p[:CHECKED_ROWS])))
            if len(dz) == 1:
                tokens = g[:, :CHECKED_TOKENS], p[:, :CHECKED_TOKENS]
        g_first, p_first = torch.cat(dz, 2)
        few = len(g_first)
        return losses[:few], g_first - p_first * mean[:few, None], tokens[0] - tokens[1] * mean[:, None]

    def make_small(self) -> DivergenceWorkload:
        """Return the workload of small heads that have the same specialisations of the kernels, to compile them."""
        return DivergenceWorkload(self._device, self._dtype, self._small_shape)

    def make_run(self, values: tune_file.Configuration, sample: int, first: int = 0) -> Run:
        """Return the call of a candidate on all rows, by the kind of the sample."""
        (hidden, weight), (teacher_hidden, teacher_weight) = self._head(0), self._head(1)
        ones = torch.ones(ROWS, device=hidden.device)
        configuration = LossConfiguration.from_values(values)
        return lambda: compute_divergence(
            hidden, weight, teacher_hidden, teacher_weight, ones, KINDS[sample], [0.5], [ROWS], 1.0, None, None,
            True, True, configuration=configuration,
        )  # fmt: skip

    def check(self, outputs: Sequence[Tensor], sample: int) -> None:
        """Raise AssertionError unless the outputs agree with float32."""
        self._compare(outputs, *self._exact(sample))
