"""Time of the filters of given logits at several configurations; run by row_passes.py."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from bench.support.gpu_timing import event_seconds
from bench.support.tuning import Report, kernel_times, warm
from torch import Tensor

from genssd.kernels.gpu_timing import captured_seconds

V = 151936
FILTERS: dict[str, dict[str, float]] = {
    "top_p .95": {"top_p": 0.95},
    "top_k 50": {"top_k": 50},
    "min_p .05": {"min_p": 0.05},
    "k 50, p .95": {"top_k": 50, "top_p": 0.95},
    "k 50, p .95, min_p .05": {"top_k": 50, "top_p": 0.95, "min_p": 0.05},
    "none": {},
    "greedy": {"temperature": 0.0},
}
TUNED = ("top_p .95", "k 50, p .95")


def make_logits(rows: int, shape: str) -> Tensor:
    """Return float32 logits [rows, V]: "normal" with a nucleus of some ten thousand tokens, "peaked" with a small one
    like a language model's, or "flat", where a nucleus holds most tokens."""
    generator = torch.Generator("cuda").manual_seed(0)
    noise = torch.randn(rows, V, device="cuda", generator=generator)
    if shape == "peaked":
        noise[:, :40] += 12.0 - 2.5 * torch.rand(rows, 40, device="cuda", generator=generator).cumsum(1).sqrt()
        return 1.5 * noise
    return {"normal": 3.0, "flat": 0.5}[shape] * noise


def expected_tokens(logits: Tensor, keys: Tensor, options: dict[str, float]) -> Tensor:
    from genssd.kernels.sampling import gumbel_reference, keep_likely

    if options.get("temperature") == 0.0:
        return logits.argmax(1)
    filters = (int(options.get("top_k", 0)), options.get("top_p", 1.0), options.get("min_p", 0.0))
    kept = keep_likely(logits, *filters) if options else logits
    return (kept + gumbel_reference(keys, V)).argmax(1)


def draw(logits: Tensor, keys: Tensor, options: dict[str, float], tiles: Any) -> Tensor:
    from genssd.kernels.filter_triton import sample_rows

    min_p = options.get("min_p", 0.0)
    return sample_rows(
        logits, keys, options.get("temperature", 1.0), int(options.get("top_k", 0)), options.get("top_p", 1.0),
        min_p, math.log(min_p) if min_p else 0.0, tiles=tiles,
    )  # fmt: skip


def draw_sorted(logits: Tensor, top_p: float) -> Tensor:
    """Draw by top-p in plain torch, which sorts every row."""
    p, ids = logits.softmax(1).sort(dim=1, descending=True)
    return ids.gather(1, torch.multinomial(p.masked_fill(p.cumsum(1) - p >= top_p, 0.0), 1))


def list_variants() -> list[Any]:
    """Return the shipped configuration, and others that differ from it in one respect."""
    from genssd.kernels.filter_triton import SHIPPED

    changes: list[dict[str, Any]] = [{}]
    for split, warps, part in ((8192, 4, 512), (8192, 8, 512), (4096, 8, 1024), (16384, 8, 1024), (16384, 16, 2048)):
        changes.append({"split": split, "split_warps": warps, "part": part})
    changes += [{"list_part": 1024}, {"list_part": 4096}, {"rounds": 2}]
    changes += [{"cuts": cuts, "steps": steps} for cuts, steps in ((16, 4), (4, 1), (8, 4))]
    changes += [{"judged": True}, {"judged": True, "cuts": 4}, {"judged": True, "row_warps": 16}]
    changes += [{"tile": tile, "row_warps": warps} for tile, warps in ((512, 4), (1024, 16), (1024, 4), (512, 8))]
    return [dataclasses.replace(SHIPPED, **change) for change in changes]


def measure_one(report: Report, rows: int, shape: str, name: str, tiles: Any, *, in_detail: bool) -> None:
    """Time one filter at one configuration. in_detail: with the time of every kernel, and of plain torch."""
    options = FILTERS[name]
    copies = max(2, min(8, (400 << 20) // (4 * V * rows)))
    logits = [make_logits(rows, shape).roll(i, 0) for i in range(copies)]
    keys = torch.arange(rows, device="cuda") * 7919
    differing = int((draw(logits[0], keys, options, tiles) != expected_tokens(logits[0], keys, options)).sum())

    def run(z: Tensor) -> Callable[[], object]:
        return lambda: draw(z, keys, options, tiles)

    micros = 1e6 * captured_seconds([run(z) for z in logits])
    row: dict[str, Any] = {
        "op": "filters", "rows": rows, "logits": shape, "filters": name, "us": micros, "differing": differing,
        "gbps_of_one_read": logits[0].nbytes / micros / 1e3, "tiles": dataclasses.asdict(tiles),
    }  # fmt: skip
    if in_detail:
        row["kernels"] = kernel_times(run(logits[1]), 5)
        if "top_p" in options:
            row["eager_us"] = 1e6 * event_seconds(lambda: draw_sorted(logits[0], options["top_p"]))
    report.add(**row)


def measure_filters(report: Report) -> None:
    """Time every filter as it ships at several shapes, then the most used ones at other configurations."""
    shipped, *others = list_variants()
    one, key = make_logits(1, "peaked"), torch.zeros(1, dtype=torch.int64, device="cuda")

    def warming(options: dict[str, float], tiles: Any) -> Callable[[], object]:
        return lambda: draw(one, key, options, tiles)

    runs = [warming(options, shipped) for options in FILTERS.values()]
    warm(runs + [warming(FILTERS[name], tiles) for name in TUNED for tiles in others])
    report.add(done="compiling the filters")

    def attempt(rows: int, shape: str, name: str, tiles: Any, in_detail: bool) -> None:
        report.attempt(
            lambda: measure_one(report, rows, shape, name, tiles, in_detail=in_detail),
            op="filters", rows=rows, logits=shape, filters=name, tiles=str(tiles),
        )  # fmt: skip

    for rows, shape, name in itertools.product((64, 8, 256), ("normal", "peaked", "flat"), FILTERS):
        if shape != "flat" or name == "top_p .95":
            attempt(rows, shape, name, shipped, rows == 64)
    for shape, name, tiles in itertools.product(("normal", "peaked"), TUNED, others):
        attempt(64, shape, name, tiles, False)
