"""What a workload needs at least, and how long the machine needs at least for that.

A phase is one pass over the weights: prefill, one decoding step, one scoring pass. It takes at least

    max(flops / F, bytes / B)      F: operations per second   B: bytes read per second

flops: two per weight and row, of the head only for the rows whose logits are needed; four per attended position, head
and lane. bytes: weights once per phase, keys and values of every distinct position once. F and B are measured: F is the
best rate of bf16 products through torch or, if that is more, of the multiplying instruction alone (peak.cpp); B that of
a sum over an array that no cache holds.
"""

from __future__ import annotations

import subprocess
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from bench.engine.peers.workloads import ModelShape, Sizes
from bench.support.device_limits import best_seconds

BF16 = 2  # bytes
PRODUCTS = ((1024, 1024, 1024), (2048, 2048, 2048), (1024, 1024, 3072), (1024, 3072, 1024), (1024, 1024, 16384))
"""Rows, inner and columns: square ones and those of the model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Operations and bytes per second. instruction_flops: None where there is no compiler or no such instruction."""

    product_flops: float
    instruction_flops: float | None
    bytes: float

    @property
    def flops(self) -> float:
        return max(self.product_flops, self.instruction_flops or 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    flops: float
    bytes: float

    def seconds(self, limits: Limits) -> float:
        return max(self.flops / limits.flops, self.bytes / limits.bytes)


def measure_limits(threads: int) -> Limits:
    torch.set_num_threads(threads)
    array = torch.ones(1 << 28)
    return Limits(
        product_flops=max(_product_flops(*shape) for shape in PRODUCTS),
        instruction_flops=_instruction_flops(threads),
        bytes=array.nbytes / best_seconds(array.sum, "cpu"),
    )


def _product_flops(rows: int, inner: int, columns: int) -> float:
    a, b = torch.randn(rows, inner).bfloat16(), torch.randn(columns, inner).bfloat16()
    return 2 * rows * inner * columns / best_seconds(lambda: a @ b.T, "cpu", rounds=5)


def _instruction_flops(threads: int) -> float | None:
    with TemporaryDirectory() as directory:
        program = Path(directory) / "peak"
        source = Path(__file__).with_name("peak.cpp")
        try:
            subprocess.run(["c++", "-O3", "-march=native", "-pthread", source, "-o", program], check=True)
        except (FileNotFoundError, subprocess.CalledProcessError):
            return None
        done = subprocess.run([program, str(threads)], capture_output=True, text=True)
        return float(done.stdout) if done.returncode == 0 else None


def phases(sizes: Sizes, workload: str) -> list[Phase]:
    """What a workload consists of."""
    model = sizes.model
    if workload == "prefill":
        return [_prefill(model, 1, sizes.prefix)]
    if workload == "decode":
        return _decoding(model, 1, sizes.branches, 1 + sizes.prefix, sizes.decoded)
    if workload == "score":
        return [_scoring(model, 1, sizes.candidates, sizes.prefix, sizes.scored)]
    found = []
    for _ in ("teacher", "student"):
        found.append(_prefill(model, sizes.prompts, sizes.prompt))
    for start in range(sizes.prompt, sizes.prompt + sizes.response, sizes.chunk):
        found += _decoding(model, sizes.prompts, sizes.per_prompt, start, sizes.chunk)
        found.append(_scoring(model, sizes.prompts, sizes.per_prompt, start, sizes.chunk))
    return found


def limit_seconds(sizes: Sizes, workload: str, limits: Limits) -> float:
    return sum(phase.seconds(limits) for phase in phases(sizes, workload))


def _prefill(model: ModelShape, prompts: int, tokens: int) -> Phase:
    """All but the last token of a prompt need no more of the last layer than their keys and values."""
    rows, attended = prompts * tokens, prompts * _triangle(0, tokens)
    whole = _pass(model, rows=rows, logits=prompts, attended=attended, cached=rows)
    own = model.width * model.head_dim * 2 * model.heads + 3 * model.width * model.inner
    unread = attended - prompts * tokens
    return replace(
        whole, flops=whole.flops - 2 * own * (rows - prompts) - 4 * model.heads * model.head_dim * unread
    )  # fmt: skip


def _decoding(model: ModelShape, prompts: int, branches: int, prefix: int, steps: int) -> list[Phase]:
    """Steps of `branches` rows behind each of `prompts` prefixes."""
    rows = prompts * branches
    return [
        _pass(
            model, rows=rows, logits=rows, attended=rows * (prefix + step), cached=prompts * prefix + rows * step
        )
        for step in range(1, 1 + steps)
    ]  # fmt: skip


def _scoring(model: ModelShape, prompts: int, candidates: int, prefix: int, tokens: int) -> Phase:
    """A candidate's last token is predicted, not read; the first is predicted by the prefix's last state."""
    responses = prompts * candidates
    return _pass(
        model,
        rows=responses * (tokens - 1),
        logits=responses * (tokens - 1) + prompts,
        attended=responses * _triangle(prefix, tokens - 1),
        cached=prompts * prefix + responses * (tokens - 1),
    )


def _pass(model: ModelShape, *, rows: int, logits: int, attended: int, cached: int) -> Phase:
    """attended: pairs of a row and a position that it sees. cached: distinct positions read or written."""
    projections = model.width * model.head_dim * (2 * model.heads + 2 * model.kv_heads)
    trunk = model.layers * (projections + 3 * model.width * model.inner)
    head = model.width * model.vocabulary
    attention = 4 * model.heads * model.head_dim * model.layers
    position_bytes = BF16 * 2 * model.kv_heads * model.head_dim * model.layers
    return Phase(
        flops=2 * trunk * rows + 2 * head * logits + attention * attended,
        bytes=BF16 * (trunk + head) + position_bytes * cached,
    )


def _triangle(before: int, rows: int) -> int:
    """Positions that `rows` rows see together behind `before` others; each sees itself."""
    return rows * before + rows * (rows + 1) // 2
