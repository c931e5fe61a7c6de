"""Attention over the paged cache for the GPU probe: one layer of an 8B model (32 query heads, 8 kv heads of 128).

Shapes:  N rows   H query heads   G kv heads   E head dim   P pages   S page size
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest
import torch
from bench.gpu.head_operations import normal
from bench.gpu.operations import Build, NotInstalled, Operation
from bench.gpu.rows import OURS
from bench.gpu.timing import Implementation, Method
from bench.kernels import bench_attention as decoding
from torch import Tensor

from genssd.engine.models.segments import rows_per_unit
from genssd.kernels.attention import SEGMENT_TOKENS, build_segment_table, paged_attention
from genssd.kernels.device_table import DeviceTable

H, G, E, S = 32, 8, 128, 64
DECODED = [(64, 4096), (64, 16384), (8, 4096), (256, 4096), (64, 512), (512, 1024)]
"""(branches, tokens of the prefix that they share)."""
PREFILLED = [2048, 8192]
EXTENDED = [(64, 64, 4096)]
"""(branches, new tokens of each, tokens of the prefix)."""
ROTATED_BYTES = 400 << 20
LARGEST_GATHER = 24 << 30


def iter_decode_steps() -> Iterator[Operation]:
    """Yield decode steps of branches after a shared prefix: one query per branch."""
    for branches, prefix in DECODED:
        own = decoding.OWN
        unique_bytes = 2 * (prefix + branches * own) * G * E * 2
        yield Operation(
            name="branch decode",
            shape=f"{branches} after {prefix}",
            flops=4 * branches * (prefix + own) * H * E,
            num_bytes=unique_bytes,
            implementations=_decode_implementations(branches, prefix, unique_bytes),
        )


def _decode_implementations(branches: int, prefix: int, unique_bytes: int) -> dict[str, Build]:
    buffers = min(16, max(2, -(-ROTATED_BYTES // unique_bytes)))

    def build(name: str, method: Method = "graph", *, gathers: bool = False) -> Implementation:
        steps = [decoding.Step.random(branches, prefix)]
        copies = max(1, LARGEST_GATHER // steps[0].copy_bytes) if gathers else buffers
        if gathers and steps[0].copy_bytes > LARGEST_GATHER:
            raise NotInstalled(f"would gather {steps[0].copy_bytes >> 30} GiB")
        steps += [decoding.Step.random(branches, prefix) for _ in range(min(buffers, copies) - 1)]
        try:
            return Implementation(calls=[decoding.IMPLEMENTATIONS[name](step) for step in steps], method=method)
        except pytest.skip.Exception as reason:
            raise NotInstalled(str(reason)) from None

    return {
        OURS: functools.partial(build, "genssd"),
        "unshared": functools.partial(build, "genssd-unshared"),
        "SDPA": functools.partial(build, "sdpa", gathers=True),
        "flashinfer": functools.partial(build, "flashinfer", "kernels"),
        "flashinfer-cascade": functools.partial(build, "flashinfer-cascade", "kernels"),
    }


def make_table(pages: Tensor, first: int, new: int) -> DeviceTable:
    """Return the table of sequences that have `first` tokens in the cache and add `new` ones. pages: int32 [B, P]."""
    one = torch.ones(len(pages), dtype=torch.int32)
    table = build_segment_table(
        pages, torch.arange(len(pages), dtype=torch.int32), first * one, new * one, page_size=S,
        segment=SEGMENT_TOKENS["cuda"], unit_rows=rows_per_unit(H // G, torch.device("cuda:0")),
    )  # fmt: skip
    return DeviceTable.upload(table, torch.device("cuda:0"))


def paged(pages: Tensor, first: int, new: int) -> Implementation:
    """Return our attention of `new` tokens of every sequence."""
    q, kv = normal(len(pages) * new, H, E), normal(2, int(pages.max()) + 1, G, S, E, seed=1).transpose(2, 3)
    table = make_table(pages, first, new)
    return Implementation(calls=[lambda: paged_attention(q, kv[0], kv[1], table, scale=E**-0.5)], method="graph")


def causal_sdpa(tokens: int) -> Implementation:
    """Return torch's attention of one sequence over keys and values that lie together."""
    q, k, v = normal(1, H, tokens, E), normal(1, G, tokens, E, seed=1), normal(1, G, tokens, E, seed=2)
    attend = torch.nn.functional.scaled_dot_product_attention
    return Implementation(calls=[lambda: attend(q, k, v, is_causal=True, enable_gqa=True)], method="graph")


def iter_prefills() -> Iterator[Operation]:
    """Yield the prefill of one sequence."""
    for tokens in PREFILLED:
        pages = torch.arange(tokens // S, dtype=torch.int32)[None]
        yield Operation(
            name="prefill",
            shape=f"{tokens}",
            flops=2 * tokens * tokens * H * E,
            num_bytes=2 * tokens * (2 * H + 2 * G) * E,
            implementations={
                OURS: functools.partial(paged, pages, 0, tokens),
                "SDPA": functools.partial(causal_sdpa, tokens),
            },
        )


def iter_extensions() -> Iterator[Operation]:
    """Yield several new tokens of every branch after a shared prefix, as when the student reads candidates."""
    for branches, new, prefix in EXTENDED:
        shared, own = prefix // S, new // S
        pages = torch.cat(
            (
                torch.arange(shared, dtype=torch.int32).expand(branches, -1),
                shared + torch.arange(branches * own, dtype=torch.int32).view(branches, own),
            ),
            1,
        )
        yield Operation(
            name="extend",
            shape=f"{branches} x {new} after {prefix}",
            flops=4 * branches * new * (prefix + new / 2) * H * E,
            num_bytes=2 * (prefix + branches * new) * 2 * G * E,
            implementations={OURS: functools.partial(paged, pages, prefix, new)},
        )
