"""Time the attention kernel at many tile configurations on this GPU, and list the fastest first.

    python -m bench.tuning.attention_tiles --json bench/results/attention_tiles.json

A configuration is timed only if its results equal those of the shipped one up to rounding. A faster one goes into
kernels/attention_triton.py and must then pass tests/kernels/test_ahead_of_time.py.
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

from genssd.kernels.attention import QUERY_VECTORS_PER_UNIT, SEGMENT_TOKENS, build_segment_table
from genssd.kernels.device_table import DeviceTable

SHAPES = [(64, 4096, 1), (64, 512, 1), (1, 32768, 1), (2, 8192, 1024)]
"""(branches, tokens of the prefix, rows of each branch): decoding, and the extension of a long prefix."""
HEADS, KV_HEADS, WIDTH, PAGE, OWN = 32, 8, 128, 16, 64
BLOCKS_M, BLOCKS_T, WARPS, STAGES, PER_SM = (16, 32, 64, 128), (32, 64, 128), (4, 8), (2, 3), (1, 2)


def build_table(branches: int, prefix: int, rows: int) -> tuple[DeviceTable, int]:
    """Return the table of branches after a shared prefix, and the number of pages that it reads."""
    shared, own = prefix // PAGE, -(-max(OWN, rows) // PAGE)
    common = torch.arange(shared, dtype=torch.int32).expand(branches, -1)
    pages = torch.cat((common, shared + torch.arange(branches * own, dtype=torch.int32).view(branches, own)), 1)
    one = torch.ones(branches, dtype=torch.int32)
    table = build_segment_table(
        pages, torch.arange(branches, dtype=torch.int32), one * (prefix + own * PAGE - rows), one * rows,
        page_size=PAGE, segment=SEGMENT_TOKENS["cuda"], unit_rows=QUERY_VECTORS_PER_UNIT["cuda"] // (HEADS // KV_HEADS),
    )  # fmt: skip
    return DeviceTable.upload(table, torch.device("cuda")), shared + branches * own


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("tuning tile sizes needs a GPU")
    from genssd.kernels.attention_triton import AttentionLaunch, AttentionTiles, attend_rows, choose_launch

    limits = measure_device_limits("cuda", torch.bfloat16)
    multiprocessors = torch.cuda.get_device_properties("cuda").multi_processor_count
    rows: list[dict[str, Any]] = []
    for branches, prefix, count in SHAPES:
        table, pages = build_table(branches, prefix, count)
        q = torch.randn(branches * count, HEADS, WIDTH, device="cuda", dtype=torch.bfloat16)
        kv = torch.randn(2, pages, PAGE, KV_HEADS, WIDTH, device="cuda", dtype=torch.bfloat16)
        shipped = choose_launch(q, KV_HEADS)
        expected = attend_rows(q, kv[0], kv[1], table, WIDTH**-0.5, None, None, launch=shipped)
        measured: list[dict[str, Any]] = []
        for m, t, warps, stages, per_sm in itertools.product(BLOCKS_M, BLOCKS_T, WARPS, STAGES, PER_SM):
            tiles = AttentionTiles(block_m=m, block_t=t, num_warps=warps, num_stages=stages)
            launch = AttentionLaunch(programs=per_sm * multiprocessors, tiles=tiles)
            run = functools.partial(attend_rows, q, kv[0], kv[1], table, WIDTH**-0.5, None, None, launch=launch)
            try:
                torch.testing.assert_close(run(), expected, atol=2e-2, rtol=2e-2)
                seconds = best_seconds(run, "cuda")
            except Exception as error:  # a configuration that does not fit the device is left out
                print(f"{tiles}: {type(error).__name__}", file=sys.stderr)
                continue
            measured.append(
                {
                    "shape": [branches, prefix, count],
                    "tiles": dataclasses.asdict(tiles),
                    "programs_per_multiprocessor": per_sm,
                    "seconds": seconds,
                    "share_of_copy": kv.nbytes / seconds / limits.bytes,
                    "share_of_matmul": 4
                    * branches
                    * count
                    * (prefix + count / 2)
                    * HEADS
                    * WIDTH
                    / seconds
                    / limits.flops,
                    "shipped": launch == shipped,
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
