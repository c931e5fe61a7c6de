"""Time on this GPU what no GPU has timed yet, so that one run decides what ships.

    python -m bench.tuning.new_candidates [--json FILE] [--seconds 50] [--vocabulary 151936]

Filters: every candidate of `genssd tune` (filter_candidates_triton.py), compared with plain torch first, in captured
graphs; the shipped configuration is the first. A candidate that wins at all rows
goes into `filter_triton.SHIPPED`. The student's own stream is compared by `python -m bench.engine.search_gpu --streams
2`. Every line of output is one JSON object.
"""

from __future__ import annotations

import argparse
import functools
import sys
from pathlib import Path

import torch
from bench.support.tuning import Report, warm

from genssd.engine.models.tuning import time_in_graph
from genssd.kernels.candidates_triton import Device
from genssd.kernels.filter_candidates_triton import CANDIDATES, FilterWorkload
from genssd.kernels.tune_file import Configuration


def measure_one(report: Report, workload: FilterWorkload, values: Configuration, rows: int) -> None:
    """Check and time one candidate at one number of rows."""
    run = workload.make_run(values, rows)
    workload.check(run(), rows)
    report.add(op="filter", rows=rows, us=1e6 * time_in_graph(run, False), tiles=dict(values))


def measure_filters(report: Report, vocabulary: int) -> None:
    """Time the candidates of the filters, the shipped one first."""
    workload = FilterWorkload(Device.of(torch.device("cuda", 0)), vocabulary)
    small = workload.make_small()
    warm([small.make_run(tiles.values(), 16) for tiles in CANDIDATES])
    report.add(done="compiling the filters")
    for rows in (64, 256, 16):
        for tiles in CANDIDATES:
            values = tiles.values()
            report.attempt(
                functools.partial(measure_one, report, workload, values, rows),
                op="filter",
                rows=rows,
                tiles=dict(values),
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seconds", type=float, default=50.0)
    parser.add_argument("--vocabulary", type=int, default=151936)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("timing the candidates needs a GPU")
    report = Report(options.json, options.seconds)
    report.add(gpu=torch.cuda.get_device_name(), torch=torch.__version__)
    measure_filters(report, options.vocabulary)


if __name__ == "__main__":
    main()
