"""Time the scoring kernel at many tile configurations on this GPU, and list the fastest first.

    python -m bench.tuning.head_tiles --json bench/results/head_tiles.json

A configuration is timed only if its log-probabilities equal those of the shipped one up to rounding. A faster one goes
into kernels/head_triton.py and must then pass tests/kernels/test_ahead_of_time.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import torch
from bench.support.device_limits import best_seconds, measure_device_limits

SHAPES = [(64, 151936, 4096), (8192, 151936, 1024), (8192, 151936, 4096)]
BLOCKS, BLOCKS_D, WARPS, STAGES = (64, 128), (32, 64, 128), (4, 8), (2, 3, 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("tuning tile sizes needs a GPU")
    from genssd.kernels.head_triton import HeadLaunch, HeadTiles, choose_launch
    from genssd.kernels.logprob_triton import score_rows

    limits = measure_device_limits("cuda", torch.bfloat16)
    rows: list[dict[str, Any]] = []
    for N, V, D in SHAPES:
        hidden = torch.randn(N, D, device="cuda", dtype=torch.bfloat16)
        weight = torch.randn(V, D, device="cuda", dtype=torch.bfloat16) / D**0.5
        target = torch.randint(0, V, (N,), device="cuda")
        shipped = choose_launch(hidden)
        expected = score_rows(hidden, weight, target, None, 1.0, None, launch=shipped)[0]
        measured: list[dict[str, Any]] = []
        for block, block_d, warps, stages in itertools.product(BLOCKS, BLOCKS_D, WARPS, STAGES):
            tiles = HeadTiles(block=block, block_d=block_d, num_warps=warps, num_stages=stages)
            for per_sm in (1, 2):
                launch = HeadLaunch(programs=per_sm * shipped.programs, tiles=tiles)
                run = functools.partial(score_rows, hidden, weight, target, None, 1.0, None, launch=launch)
                try:
                    logprob = run()[0]
                    torch.testing.assert_close(logprob, expected, atol=1e-3, rtol=1e-3)
                    seconds = best_seconds(run, "cuda", rounds=3 if N > 1000 else 10)
                except Exception as error:  # a configuration that does not fit the device is left out
                    print(f"{tiles}: {type(error).__name__}", file=sys.stderr)
                    continue
                measured.append(
                    {
                        "shape": [N, V, D],
                        "tiles": dataclasses.asdict(tiles),
                        "programs_per_multiprocessor": per_sm,
                        "seconds": seconds,
                        "share_of_matmul": 2 * N * V * D / seconds / limits.flops,
                        "share_of_copy": weight.nbytes / seconds / limits.bytes,
                        "same_bits_as_shipped": torch.equal(logprob, expected),
                        "shipped": tiles == shipped.tiles and per_sm == 1,
                    }
                )
        measured.sort(key=lambda row: row["seconds"])
        rows += measured
        for row in measured[:5]:
            print(row)
    if options.json:
        machine = {
            "gpu": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "limits": dataclasses.asdict(limits),
        }
        options.json.write_text(json.dumps({**machine, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
