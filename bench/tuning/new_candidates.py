"""Time on this GPU what no GPU has timed yet, so that one run decides what ships.

    python -m bench.tuning.new_candidates [--json FILE] [--seconds 50] [--vocabulary 151936]

Attention: branches that decode after a shared prefix, one layer of an 8B model, with every candidate of `genssd tune`
that reads several segments in one program or shares the begin of unfinished segments (candidates_triton.py), compared
with float32 first. One that wins goes into `attention_launch_triton.choose_tiles`; whether a row has the same bits with
it is checked by `python -m bench.tuning.attention_tiles`.

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
from typing import Any

import torch
from bench.support.tuning import Report, warm

from genssd.engine.models.pages import PAGE_SIZE
from genssd.engine.models.tuning import time_in_graph
from genssd.kernels.candidates_triton import ATTENTION_SAMPLES, AttentionWorkload, Device
from genssd.kernels.filter_candidates_triton import CANDIDATES, FilterWorkload
from genssd.kernels.tune_file import Configuration

HEADS = (32, 8, 128)
SEGMENTS = (512, 1024)


def measure_attention(report: Report) -> None:
    """Time the shipped configuration of attention, and those with chains or shared begins of segments."""
    workload = AttentionWorkload(Device.of(torch.device("cuda", 0)), torch.bfloat16, HEADS, PAGE_SIZE["cuda"])
    shipped = workload.shipped(0)
    joined = [values for values in workload.candidates(0) if values["chained"] and values["segment"] in SEGMENTS]
    chosen = [shipped, *joined]
    warm([workload.make_run(values, 1) for values in chosen])
    report.add(done="compiling attention")
    for sample, (rows, tokens, queries) in enumerate(ATTENTION_SAMPLES):
        for values in chosen if queries == 1 else ():
            changed = {name: value for name, value in values.items() if value != shipped[name]}
            names = {"op": "attention", "rows": rows, "tokens": tokens, **changed}
            report.attempt(functools.partial(measure_sample, report, workload, values, sample, names), **names)


def measure_sample(
    report: Report, workload: AttentionWorkload, values: Configuration, sample: int, names: dict[str, Any]
) -> None:
    """Check and time one candidate on one sample."""
    run = workload.make_run(values, sample)
    workload.check(run(), sample)
    report.add(us=1e6 * time_in_graph(run, False), **names)


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
    measure_attention(report)
    measure_filters(report, options.vocabulary)


if __name__ == "__main__":
    main()
