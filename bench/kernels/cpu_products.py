"""Products of the native CPU kernels on every instruction set of this processor, beside torch and the limit.

    python -m bench.kernels.cpu_products [--threads 1] [--rounds 5] [--small] [--json FILE]

Times bf16 products of a model's layers and a pass over a head, for 1 to 1024 rows, with packed weights. The
implementations of a row alternate, and each value is the median over the rounds. `share_of_limit` is the fraction of
the rate that the best instruction reaches with operands in the first cache (in registers, where there is no AMX),
measured in the same run; for one row the weights come from memory, and `gigabytes_per_second` is what counts.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from bench.engine.peers.limits import instruction_flops
from bench.engine.peers.machine import describe_machine
from torch import Tensor

from genssd import _core
from genssd.kernels.linear import linear
from genssd.kernels.logprob import linear_logprob
from genssd.kernels.weight import pack_weight

ROWS = (1, 4, 16, 32, 64, 256, 1024)
LAYERS = ((1024, 3072), (3072, 1024), (4096, 1024), (1024, 8192))
"""(inputs, outputs) of the products."""
HEAD = (1024, 32768)
"""(inputs, vocabulary) of the scoring pass."""
SMALL = (1, 16), ((64, 96),), (64, 300)
"""Rows, layers and head of --small."""
LEAST_SECONDS = 0.02
"""Seconds that a measurement takes at least; short calls are repeated."""


def seconds_of(run: Callable[[], object]) -> float:
    """Return the seconds of one call."""
    count, taken = 1, 0.0
    while taken < LEAST_SECONDS:
        started = time.perf_counter()
        for _ in range(count):
            run()
        taken = time.perf_counter() - started
        count *= 1 if taken >= LEAST_SECONDS else 2
    return taken / count


def implementations(
    sets: list[str], native: Callable[[], Tensor], torch_product: Callable[[], Tensor]
) -> dict[str, Callable[[], float]]:
    """Return a function per instruction set, and one for torch, that times one call."""

    def timed(name: str) -> float:
        _core.use_instruction_set(name)
        return seconds_of(native)

    return {**{name: lambda name=name: timed(name) for name in sets}, "torch": lambda: seconds_of(torch_product)}


def measure(
    operator: str, inputs: int, outputs: int, rows: int, *, sets: list[str], rounds: int, limit: float | None
) -> list[dict[str, object]]:
    """Return a row of results per implementation."""
    x, weight = torch.randn(rows, inputs).bfloat16(), torch.randn(outputs, inputs).bfloat16()
    packed, target = pack_weight(weight), torch.arange(rows) % outputs
    if operator == "linear":
        calls = implementations(sets, lambda: linear(x, packed), lambda: torch.nn.functional.linear(x, weight))
    else:
        calls = implementations(
            sets,
            lambda: linear_logprob(x, packed, target).logprob,
            lambda: torch.nn.functional.linear(x, weight).float().log_softmax(-1).gather(1, target[:, None]),
        )
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(call())
    flops = 2 * rows * inputs * outputs
    results = []
    for name, seconds in ((name, median(values)) for name, values in times.items()):
        results.append(
            {
                "operator": operator,
                "inputs": inputs,
                "outputs": outputs,
                "rows": rows,
                "implementation": name,
                "microseconds": seconds * 1e6,
                "gflops": flops / seconds / 1e9,
                "gigabytes_per_second": weight.nbytes / seconds / 1e9,
                "share_of_limit": None if limit is None else flops / seconds / limit,
                "ratio_to_torch": median(times["torch"]) / seconds,
            }
        )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="number of threads of every implementation")
    parser.add_argument("--rounds", type=int, default=5, help="number of measurements of each implementation")
    parser.add_argument("--small", action="store_true", help="multiply tiny matrices, to check the program")
    parser.add_argument("--json", type=Path, help="file for the results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    sets = [name for name in _core.instruction_sets() if name not in ("amx_model", "generic")]
    limits = {"registers": instruction_flops(options.threads), "cache": instruction_flops(options.threads, "cache")}
    limit = limits["cache"] or limits["registers"]
    results = []
    row_counts, layers, head = SMALL if options.small else (ROWS, LAYERS, HEAD)
    for operator, inputs, outputs in [*(("linear", *layer) for layer in layers), ("score", *head)]:
        for rows in row_counts:
            measured = measure(
                operator, inputs, outputs, rows, sets=sets, rounds=options.rounds, limit=limit
            )  # fmt: skip
            results += measured
            shown = "  ".join(f"{r['implementation']} {r['gflops']:.0f}" for r in measured)
            print(f"{operator} {inputs} -> {outputs}, {rows} rows, GFLOP/s: {shown}", flush=True)
    if options.json:
        report = {"machine": describe_machine(options.threads), "limits_flops": limits, "results": results}
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
