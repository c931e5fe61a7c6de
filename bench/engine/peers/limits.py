"""Operations and bytes that a workload requires at least, and the time that the machine requires for them at least.

A phase is one pass over the weights: prefill, one decoding step, one scoring pass. It takes at least

    max(flops / F, bytes / B)      F: operations per second   B: bytes read per second

flops: two per weight and row (the head's weights count only for the rows whose logits are needed), and four per
attended position, query head and entry of the head. bytes: weights once per phase, keys and values of every distinct
position once. F and B are measured: F is the larger of the best rate of bf16 products through torch and the rate of the
multiplying instruction alone (peak.cpp: that of float32, where the processor has none for bf16); B is the rate of a sum
over an array that is larger than every cache.
"""

from __future__ import annotations

import subprocess
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import torch
from bench.engine.peers.workloads import ModelShape, Sizes
from bench.support.device_limits import best_seconds

BF16 = 2  # bytes of a bfloat16 value
PRODUCTS = ((1024, 1024, 1024), (2048, 2048, 2048), (1024, 1024, 3072), (1024, 3072, 1024), (1024, 1024, 16384))
"""(rows, inner, columns) of the measured products: square ones and those of the model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Rates that the machine reaches at most.

    product_flops: operations per second of bf16 products through torch. instruction_flops: those of the multiplying
    instruction alone; None without a C++ compiler or without such an instruction. bytes: bytes read per second.
    """

    product_flops: float
    instruction_flops: float | None
    bytes: float

    @property
    def flops(self) -> float:
        return max(self.product_flops, self.instruction_flops or 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """Operations and bytes of one pass over the weights."""

    flops: float
    bytes: float

    def seconds(self, limits: Limits) -> float:
        """Return the least time of the phase in seconds."""
        return max(self.flops / limits.flops, self.bytes / limits.bytes)


def measure_limits(threads: int) -> Limits:
    """Measure the limits of this machine on a number of threads."""
    torch.set_num_threads(threads)
    array = torch.ones(1 << 28)
    return Limits(
        product_flops=max(_product_flops(*shape) for shape in PRODUCTS),
        instruction_flops=instruction_flops(threads),
        bytes=array.nbytes / best_seconds(array.sum, "cpu"),
    )


def _product_flops(rows: int, inner: int, columns: int) -> float:
    a, b = torch.randn(rows, inner).bfloat16(), torch.randn(columns, inner).bfloat16()
    return 2 * rows * inner * columns / best_seconds(lambda: a @ b.T, "cpu", rounds=5)


def instruction_flops(threads: int, operands: Literal["registers", "cache"] = "registers") -> float | None:
    """Return the operations per second of the best instruction for products of bf16 alone (peak.cpp).

    operands: cache loads those of every product from the first cache, on processors with AMX. None without a C++
    compiler or without such an instruction.
    """
    with TemporaryDirectory() as directory:
        program = Path(directory) / "peak"
        source = Path(__file__).with_name("peak.cpp")
        try:
            subprocess.run(["c++", "-std=c++20", "-O3", "-pthread", source, "-o", program], check=True)
        except (FileNotFoundError, subprocess.CalledProcessError):
            return None
        done = subprocess.run([program, str(threads), operands], capture_output=True, text=True)
        return float(done.stdout) if done.returncode == 0 else None


def phases(sizes: Sizes, workload: str) -> list[Phase]:
    """Return the phases of a workload in order."""
    model = sizes.model
    if workload == "prefill":
        return [_prefill(model, 1, sizes.prefix)]
    if workload == "decode":
        return _decoding(model, 1, sizes.branches, 1 + sizes.prefix, sizes.decoded)
    if workload == "score":
        return [_scoring(model, 1, sizes.candidates, sizes.prefix, sizes.scored)]
    search = []
    for _ in ("teacher", "student"):
        search.append(_prefill(model, sizes.prompts, sizes.prompt))
    for start in range(sizes.prompt, sizes.prompt + sizes.response, sizes.chunk):
        search += _decoding(model, sizes.prompts, sizes.per_prompt, start, sizes.chunk)
        search.append(_scoring(model, sizes.prompts, sizes.per_prompt, start, sizes.chunk))
    return search


def limit_seconds(sizes: Sizes, workload: str, limits: Limits) -> float:
    """Return the seconds that a workload takes at least on a machine with these limits."""
    return sum(phase.seconds(limits) for phase in phases(sizes, workload))


def _prefill(model: ModelShape, prompts: int, tokens: int) -> Phase:
    """Return the phase of reading prompts.

    In the last layer, all tokens but a prompt's last need only their keys and values.
    """
    rows, attended = prompts * tokens, prompts * _triangle(0, tokens)
    full = _pass(model, rows=rows, logits=prompts, attended=attended, cached=rows)
    own = model.width * model.head_dim * 2 * model.heads + 3 * model.width * model.inner
    unread = attended - prompts * tokens
    return replace(
        full, flops=full.flops - 2 * own * (rows - prompts) - 4 * model.heads * model.head_dim * unread
    )  # fmt: skip


def _decoding(model: ModelShape, prompts: int, branches: int, prefix: int, steps: int) -> list[Phase]:
    """Return one phase per decoding step of `branches` rows after each of `prompts` prefixes."""
    rows = prompts * branches
    return [
        _pass(
            model, rows=rows, logits=rows, attended=rows * (prefix + step), cached=prompts * prefix + rows * step
        )
        for step in range(1, 1 + steps)
    ]  # fmt: skip


def _scoring(model: ModelShape, prompts: int, candidates: int, prefix: int, tokens: int) -> Phase:
    """Return the phase of scoring candidates.

    A candidate's last token is predicted but not read, and its first is predicted by the prefix's last state.
    """
    responses = prompts * candidates
    return _pass(
        model,
        rows=responses * (tokens - 1),
        logits=responses * (tokens - 1) + prompts,
        attended=responses * _triangle(prefix, tokens - 1),
        cached=prompts * prefix + responses * (tokens - 1),
    )


def _pass(model: ModelShape, *, rows: int, logits: int, attended: int, cached: int) -> Phase:
    """Return the phase of one pass over the weights.

    rows: tokens read. logits: rows whose logits are computed. attended: pairs of a row and a position that it sees.
    cached: distinct positions of the cache that are read or written.
    """
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
    """Return how many positions `rows` consecutive rows see in total after `before` others; each row sees itself."""
    return rows * before + rows * (rows + 1) // 2
