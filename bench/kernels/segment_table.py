"""Time on the host for the segment table of a decode step, in microseconds, and how it grows.

    python -m bench.kernels.segment_table [--rounds 200] [--json bench/results/segment_table.json]

The branches are those of a search: every branch has its own row of the page tables, shares the pages of its prompt's
prefix, and continues in its own pages. No model and no device take part. Three times are measured per shape:

    append   append one token to every branch
    table    build the segment table
    pack     write it into the buffer that is copied to the device
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path as FilePath
from typing import Any

import numpy as np
import torch

from genssd.engine.cache.tree import BranchTree, Path
from genssd.engine.models.pages import PagePool
from genssd.kernels.attention import QUERY_VECTORS_PER_UNIT, SEGMENT_TOKENS, SegmentTable, build_segment_table
from genssd.kernels.device_table import Capacity, write_table

GROUP = 4  # query heads per kv head
PAGE = 16
OWN = 100  # tokens of a branch after its prefix, up to PAGE more

BRANCHES = [(64, 8, 1024)] + [(1, n, 1024) for n in (8, 64, 256, 512, 1024, 2048)]
PREFIXES = [(64, 8, n) for n in (128, 512, 2048, 8192, 32768)]
"""(problems, branches of each problem, tokens of the prefix) of every measured shape; PREFIXES likewise."""


def grow(problems: int, branches: int, prefix: int) -> tuple[BranchTree, list[Path]]:
    """Return a tree with the branches of every problem after its prefix, and the paths to their last tokens."""
    pages = problems * (prefix // PAGE + 1) + problems * branches * (2 * OWN // PAGE + 3)
    tree, leaves = BranchTree(PagePool(torch.zeros(1, 2, pages, PAGE, 1, 1))), []
    for problem in range(problems):
        trunk = tree.root()
        tree.append(trunk, prefix)
        for i in range(branches):
            path = tree.fork(trunk)
            tree.append(path, OWN + (problem + 7 * i) % PAGE)
            leaves.append(path)
    return tree, leaves


def build(tree: BranchTree, paths: list[Path], segment: int) -> SegmentTable:
    """Build the segment table for the last token of every path, as engine/models/segments.py does."""
    numbers = [[path.leaf.table for path in paths], [path.length - 1 for path in paths], [1] * len(paths)]
    return build_segment_table(
        torch.from_numpy(tree.tables.rows),
        *torch.from_numpy(np.array(numbers, dtype=np.int32)),
        page_size=PAGE,
        segment=segment,
        unit_rows=QUERY_VECTORS_PER_UNIT["cuda"] // GROUP,
    )


def measure(problems: int, branches: int, prefix: int, segment: int, rounds: int) -> dict[str, Any]:
    """Time the three steps over some rounds and return a row of the results."""
    tree, paths = grow(problems, branches, prefix)
    capacity = Capacity.required_by(build(tree, paths, segment))
    capacity = capacity.enlarge(capacity, rows=len(paths), item_rows=QUERY_VECTORS_PER_UNIT["cuda"] // GROUP)
    host = np.empty(4 * capacity.length, dtype=np.int32)
    seconds: dict[str, list[float]] = {"append": [], "table": [], "pack": []}
    for _ in range(rounds):
        if min(path.length for path in paths) > prefix + 2 * OWN - PAGE:
            tree, paths = grow(problems, branches, prefix)
        started = time.perf_counter()
        for path in paths:
            tree.append(path, 1)
        appended = time.perf_counter()
        table = build(tree, paths, segment)
        built = time.perf_counter()
        needed = Capacity.required_by(table)
        if not capacity.covers(needed):
            capacity = needed.enlarge(capacity, rows=len(paths), item_rows=QUERY_VECTORS_PER_UNIT["cuda"] // GROUP)
        write_table(table, capacity, host)
        packed = time.perf_counter()
        for name, took in zip(seconds, (appended - started, built - appended, packed - built), strict=True):
            seconds[name].append(took)
    row = {"problems": problems, "branches": branches, "prefix": prefix, "segment": segment}
    sizes = {"items": len(table.items), "entries": len(table.entries), "bytes": 4 * capacity.length}
    times = {
        f"{name}_us": {"min": round(1e6 * min(took), 1), "median": round(1e6 * statistics.median(took), 1)}
        for name, took in seconds.items()
    }
    return {**row, **sizes, **times}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--json", type=FilePath)
    options = parser.parse_args()
    rows = []
    for segment in SEGMENT_TOKENS.values():
        for shape in BRANCHES + PREFIXES:
            rows.append(measure(*shape, segment, options.rounds))
            print(rows[-1])
    if options.json:
        command = f"python -m bench.kernels.segment_table --rounds {options.rounds} --json {options.json}"
        settings = {"page_size": PAGE, "unit_rows": QUERY_VECTORS_PER_UNIT["cuda"] // GROUP, "numpy": np.__version__}
        lines = ",\n".join("  " + json.dumps(row) for row in rows)
        head = json.dumps({"command": command, "rounds": options.rounds, **settings})[:-1]
        options.json.write_text(f'{head},\n "rows": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
