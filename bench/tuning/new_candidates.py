"""Time on this GPU what no GPU has timed yet, so that one run decides what ships.

    python -m bench.tuning.new_candidates [--json FILE] [--only losses attention filters] [--seconds 50]
        [--vocabulary 151936]

Every candidate of `genssd tune` for the losses under a head (loss_candidates_triton.py) at widths of 4096 and 1024, and
for the filters of a draw (filter_candidates_triton.py); for attention, one layer of an 8B model, those that read
several segments in one program or share the begin of unfinished segments between branches
(attention_candidates_triton.py). All are compared with plain torch first and timed in captured graphs; the shipped
configuration is the first. A candidate that wins at all shapes ships next: in `loss_launch_triton.choose_shipped`,
`filter_triton.SHIPPED`, `attention_launch_triton.choose_tiles` (`python -m bench.tuning.attention_tiles` checks its
bits). The student's own stream is compared by `python -m bench.engine.search_gpu --streams 2`. Every line of output is
one JSON object.
"""

from __future__ import annotations

import argparse
import functools
import sys
from pathlib import Path
from typing import Any

import torch
from bench.support.tuning import Report, gibibytes_of, warm

from genssd.engine.models.pages import PAGE_SIZE
from genssd.engine.models.tuning import Workload, time_in_graph
from genssd.kernels.attention_candidates_triton import ATTENTION_SAMPLES, AttentionWorkload
from genssd.kernels.candidates_triton import Device
from genssd.kernels.filter_candidates_triton import FilterWorkload
from genssd.kernels.loss_candidates_triton import KINDS, ROWS, CrossEntropyWorkload, DivergenceWorkload
from genssd.kernels.tune_file import Configuration

WIDTHS = (4096, 1024)
"""Widths of the teacher and of the student: Qwen3-8B and Qwen3-0.6B."""
HEADS = (32, 8, 128)
"""Query heads, kv heads and head dim of the layer of attention."""
SEGMENTS = (512, 1024)
"""Tokens of a segment that are timed."""


def measure_one(report: Report, workload: Workload, values: Configuration, sample: int, names: dict[str, Any]) -> None:
    """Check and time one candidate on one sample of a workload."""
    run = workload.make_run(values, sample)
    workload.check(run(), sample)
    is_loss = workload.operator in ("cross_entropy", "divergence")
    more = {"gib": gibibytes_of(run)} if is_loss else {}
    report.add(**names, us=1e6 * time_in_graph(run, is_loss), **more, tiles=dict(values))


def measure_workload(report: Report, workload: Workload, samples: dict[int, dict[str, Any]]) -> None:
    """Time all candidates of a workload. samples: what a line says of each of them."""
    candidates, small = workload.candidates(0), workload.make_small()
    warm([small.make_run(values, next(iter(samples))) for values in candidates])
    report.add(done=f"compiling {workload.operator} {workload.problem.shape}")
    for sample, names in samples.items():
        for values in candidates:
            named = {"op": workload.operator, **names}
            measure = functools.partial(measure_one, report, workload, values, sample, named)
            report.attempt(measure, **named, tiles=dict(values))


def measure_losses(report: Report, vocabulary: int) -> None:
    """Time the candidates of cross-entropy at both widths, and of the divergences between them."""
    device = Device.of(torch.device("cuda", 0))
    for width in WIDTHS:
        cross_entropy = CrossEntropyWorkload(device, torch.bfloat16, (vocabulary, width))
        measure_workload(report, cross_entropy, {ROWS: {"rows": ROWS, "width": width}})
    teacher, student = WIDTHS
    divergence = DivergenceWorkload(device, torch.bfloat16, (vocabulary, student, teacher))
    samples: dict[int, dict[str, Any]] = {i: {"kind": kind, "rows": ROWS} for i, kind in enumerate(KINDS)}
    measure_workload(report, divergence, samples)


def measure_filters(report: Report, vocabulary: int) -> None:
    """Time the candidates of the filters."""
    workload = FilterWorkload(Device.of(torch.device("cuda", 0)), vocabulary)
    measure_workload(report, workload, {rows: {"rows": rows} for rows in (64, 256, 16)})


def measure_attention(report: Report, vocabulary: int) -> None:
    """Time what ships of attention, and the candidates with chains or shared begins of segments, on decoding rows."""
    workload = AttentionWorkload(Device.of(torch.device("cuda", 0)), torch.bfloat16, HEADS, PAGE_SIZE["cuda"])
    shipped = workload.shipped(0)
    joined = [values for values in workload.candidates(0) if values["chained"] and values["segment"] in SEGMENTS]
    chosen = [shipped, *joined]
    warm([workload.make_run(values, 1) for values in chosen])
    report.add(done="compiling attention")
    for sample, (rows, tokens, queries) in enumerate(ATTENTION_SAMPLES):
        for values in chosen if queries == 1 else ():
            named = {"op": "attention", "rows": rows, "tokens": tokens}
            measure = functools.partial(measure_one, report, workload, values, sample, named)
            report.attempt(measure, **named, tiles=dict(values))


PARTS = {"losses": measure_losses, "attention": measure_attention, "filters": measure_filters}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seconds", type=float, default=50.0)
    parser.add_argument("--vocabulary", type=int, default=151936)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("timing the candidates needs a GPU")
    report = Report(options.json, options.seconds)
    report.add(gpu=torch.cuda.get_device_name(), torch=torch.__version__)
    for part in options.only:
        PARTS[part](report, options.vocabulary)


if __name__ == "__main__":
    main()
