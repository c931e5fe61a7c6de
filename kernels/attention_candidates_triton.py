"""What `genssd tune` times of attention: the workload and its candidates (see candidates_triton.py).

Shapes:  N rows   P pages   S page size   H query heads   G kv heads   E head dim
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from genssd.kernels import tune_file, tuned
from genssd.kernels.attention import QUERY_VECTORS_PER_UNIT, SEGMENT_TOKENS, build_segment_table
from genssd.kernels.attention_launch_triton import AttentionConfiguration, choose_tiles, make_launch
from genssd.kernels.attention_triton import attend_rows
from genssd.kernels.candidates_triton import Device, Run
from genssd.kernels.device_table import DeviceTable

ATTENTION_SAMPLES = ((64, 4096, 1), (8, 4096, 1), (64, 16384, 1), (64, 4416, 1), (1, 2048, 2048))
"""(sequences, tokens of each, query rows of each): decoding after a shared prefix, which ends with a segment or within
one, and a prefill."""
ROTATED_BYTES = 200 << 20
"""Size of all copies of a cache of keys and values that take turns, at most four in addition to the first."""
OWN_TOKENS = 64
"""Tokens of a decoding sequence that it does not share."""


def attention_candidates(device: Device, dtype: torch.dtype, head_dim: int) -> list[AttentionConfiguration]:
    """Return the configurations of attention to time; the shipped one is the first."""
    shipped = choose_tiles(dtype, head_dim, amd=device.amd, capability=device.capability)
    changes: list[dict[str, Any]] = [{}]
    joined = {"chained": True, "resumed": True}
    changes += [joined]
    if dtype != torch.float32 and not device.amd and head_dim <= 128:
        changes += [
            {"chained": True},
            {"num_stages": 2},
            {"block_m": 64, "num_warps": 4},
            {"unit_m": 64, "unit_warps": 4},
        ]
        if device.capability >= 90:
            changes += [{"num_stages": 4}, {"overlap": False}, {"masked_tma": True}, {"fused": False}]
            few = {"tail_m": 16, "tail_warps": 1, "tail_stages": 2, "tail_tma": False}
            changes += [few, joined | few]
            changes += [{"tma": False, "window_tma": False, "tail_tma": False}]
    tiles = dict.fromkeys(dataclasses.replace(shipped, **change) for change in changes)
    segments = dict.fromkeys((SEGMENT_TOKENS["cuda"], 256, 1024))
    choices = [AttentionConfiguration(tiles=tile, segment=segment) for tile in tiles for segment in segments]
    if len(tiles) > 2:  # chains make up for the number of short segments, and long ones lengthen the rows' last ones
        further = dataclasses.replace(shipped, **joined)
        choices += [AttentionConfiguration(tiles=further, segment=segment) for segment in (128, 2048)]
    return choices


class AttentionWorkload:
    """Paged attention of sequences that share a prefix; one class, because a model has one segment length."""

    operator: tune_file.Operator = "attention"

    def __init__(self, device: Device, dtype: torch.dtype, shape: tuple[int, int, int], page_size: int) -> None:
        self.problem = tune_file.Problem(operator="attention", dtype=tuned.name_of(dtype), shape=shape)
        self.samples = (tuple(range(len(ATTENTION_SAMPLES))),)
        self._device, self._dtype, self._page_size = device, dtype, page_size

    @functools.cache  # noqa: B019  a workload lives as long as the command
    def _inputs(self, sample: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the queries [N, H, E], keys and values [2, P, S, G, E] and the pages of every sequence, on the CPU."""
        (H, G, E), S = self.problem.shape, self._page_size
        sequences, tokens, rows = ATTENTION_SAMPLES[sample]
        own = -(-(OWN_TOKENS if rows == 1 else 0) // S)
        shared = -(-tokens // S)
        pages = torch.arange(shared, dtype=torch.int32).expand(sequences, -1)
        ends = shared + torch.arange(sequences * own, dtype=torch.int32).view(sequences, own)
        generator = torch.Generator(self._device.torch_device).manual_seed(3 + sample)
        like = torch.empty(0, device=self._device.torch_device, dtype=self._dtype)
        kv = like.new_empty(2, shared + sequences * own, G, S, E).normal_(generator=generator).transpose(2, 3)
        q = like.new_empty(sequences * rows, H, E).normal_(generator=generator)
        return q, kv, torch.cat((pages, ends), 1)

    def make_small(self) -> AttentionWorkload:
        """Return the workload itself, which is small."""
        return self

    def shipped(self, row_class: int) -> tune_file.Configuration:
        """Return the values of the configuration that ships."""
        return self.candidates(row_class)[0]

    def candidates(self, row_class: int) -> list[tune_file.Configuration]:
        """Return the values of all configurations to time."""
        shape = self.problem.shape
        return [choice.values() for choice in attention_candidates(self._device, self._dtype, shape[2])]

    def make_run(self, values: tune_file.Configuration, sample: int, first: int = 0) -> Run:
        """Return the call of a candidate on a sample."""
        configuration = AttentionConfiguration.from_values(values)
        q, kv, pages = self._inputs(sample)
        H, G, E = self.problem.shape
        options = configuration.table_options(self._device.multiprocessors, G)
        sequences, _, rows = ATTENTION_SAMPLES[sample]
        ones, S = torch.ones(sequences, dtype=torch.int32), self._page_size
        table = build_segment_table(
            pages, torch.arange(sequences, dtype=torch.int32), ones * (pages.shape[1] * S - rows), ones * rows,
            page_size=S, segment=-(-options.segment // S) * S,
            unit_rows=max(1, QUERY_VECTORS_PER_UNIT["cuda"] // (H // G)),
            chain_programs=options.chain_programs, resume_tokens=options.resume_tokens,
        )  # fmt: skip
        on_device = DeviceTable.upload(table, q.device)
        launch = make_launch(configuration, q.device)
        # copies take turns, as layers do in a model: one of them would stay in the L2 cache
        copies = itertools.cycle([kv, *(kv.clone() for _ in range(min(4, ROTATED_BYTES // kv.nbytes)))])

        def run() -> tuple[Tensor, ...]:
            k, v = next(copies)
            return (attend_rows(q, k, v, on_device, E**-0.5, None, None, launch=launch),)

        return run

    def check(self, outputs: Sequence[Tensor], sample: int) -> None:
        """Raise AssertionError unless the outputs of the first and the last row agree with float32."""
        q, kv, pages = self._inputs(sample)
        H, G, E = self.problem.shape
        rows = ATTENTION_SAMPLES[sample][2]
        for row in (0, len(q) - 1):
            seen = pages.shape[1] * self._page_size - rows + row % rows + 1
            k, v = kv[:, pages[row // rows].long()].float().reshape(2, -1, G, E)[:, :seen].repeat_interleave(H // G, 2)
            weights = (torch.einsum("he,the->ht", q[row].float(), k) * E**-0.5).softmax(1)
            exact = torch.einsum("ht,the->he", weights, v)
            error = (outputs[0][row].float() - exact).norm() / exact.norm()
            assert error < 2e-2, f"row {row} differs from float32 by {error:.3f} of its norm"
