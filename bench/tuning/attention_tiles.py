"""Time the variants of the attention kernels at the shapes of an 8B model, on a GPU, within two minutes.

    python -m bench.tuning.attention_tiles [--json FILE] [--seconds 100]

Every variant differs in one or two settings from the first. It is timed only if it agrees with attention in float64,
inside a captured graph over caches that take turns, so that no cache stays in the L2 cache. Every line of output is one
JSON object, and a variant that fails prints one line. A faster variant goes into kernels/attention_launch_triton.py and
must then pass tests/kernels/test_ahead_of_time.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genssd.kernels.attention import SegmentTable, build_segment_table
from genssd.kernels.attention_launch_triton import AttentionConfiguration, AttentionLaunch, AttentionTiles, choose_tiles
from genssd.kernels.attention_triton import KernelCall, attend_rows, plan_calls
from genssd.kernels.device_table import DeviceTable

HEADS, KV_HEADS, WIDTH, OWN = 32, 8, 128, 64
SCALE = WIDTH**-0.5
DECODING = [(64, 4096), (64, 16384), (8, 4096), (256, 4096), (64, 512), (512, 1024), (64, 4416), (8, 4416)]
"""(branches, tokens of the prefix); every branch has OWN tokens after it and one query. The last prefixes end within a
segment."""
EXTENDING = [(1, 0, 2048), (1, 0, 8192), (64, 4096, 64)]
"""(sequences, tokens of the shared prefix, query rows of each sequence)."""
ROTATED_BYTES = 400 << 20
"""Least size of all caches that take turns together."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One setting of everything that decides the speed and no value."""

    name: str
    tiles: AttentionTiles
    segment: int = 512
    page: int = 64
    boxes: bool = True
    """Whether the tokens of a page and head are contiguous."""


BASE = choose_tiles(torch.bfloat16, WIDTH, amd=False, capability=90)


def variant(name: str, *, segment: int = 512, page: int = 64, boxes: bool = True, **tiles: Any) -> Variant:
    """Return the first variant with some settings replaced."""
    return Variant(name=name, tiles=dataclasses.replace(BASE, **tiles), segment=segment, page=page, boxes=boxes)


NARROW = {"block_m": 64, "num_warps": 4, "num_stages": 2, "per_sm": 2}
FEW = {"tail_m": 16, "tail_warps": 1, "tail_stages": 2, "tail_tma": False}
JOINED = {"chained": True, "resumed": True}
DECODE_VARIANTS = [
    variant("base"),
    variant("no overlap", overlap=False),
    variant("segment 256", segment=256),
    variant("segment 1024", segment=1024),
    variant("tail 16", **FEW),
    variant("tail 16, segment 1024", segment=1024, **FEW),
    variant("tail 16, no overlap", overlap=False, **FEW),
    variant("m 64", **NARROW),
    variant("stages 4", num_stages=4),
    variant("pointers", tma=False),
    variant("masked tma", masked_tma=True),
    variant("not fused", fused=False),
    variant("chained", chained=True),
    variant("joined", **JOINED),
    variant("joined, tail 16", **JOINED, **FEW),
    variant("joined, segment 256", segment=256, **JOINED),
    variant("joined, segment 1024", segment=1024, **JOINED),
]
EXTEND_VARIANTS = [
    variant("base"),
    variant("segment 1024", segment=1024),
    variant("segment 2048", segment=2048),
    variant("not flat", flat=False),
    variant("not flat, segment 1024", flat=False, segment=1024),
    variant("masked tma", masked_tma=True),
    variant("not flat, masked tma, segment 1024", flat=False, masked_tma=True, segment=1024),
    variant("stages 4", unit_stages=4),
    variant("m 64", unit_m=64, unit_warps=4, unit_stages=2, unit_per_sm=2),
    variant("pointers", tma=False),
    variant("not fused", fused=False),
]


def normal(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, device="cuda", generator=generator, dtype=torch.bfloat16)


@dataclasses.dataclass(frozen=True, slots=True)
class Problem:
    """Sequences after a shared prefix, each with its own pages; the last `rows` tokens of each are queries."""

    sequences: int
    prefix: int
    own: int
    rows: int
    page: int
    boxes: bool

    @property
    def num_pages(self) -> int:
        return self.prefix // self.page + self.sequences * -(-self.own // self.page)

    def pages(self) -> Tensor:
        """Return the page numbers of every sequence, int32 [sequences, pages], in random order in memory."""
        order = torch.randperm(self.num_pages, generator=torch.Generator().manual_seed(0)).int()
        shared = self.prefix // self.page
        return torch.cat((order[:shared].expand(self.sequences, -1), order[shared:].view(self.sequences, -1)), 1)

    def table(self, segment: int, unit_rows: int, pages: Tensor | None = None, **joined: int) -> SegmentTable:
        one = torch.ones(self.sequences, dtype=torch.int32)
        return build_segment_table(
            self.pages() if pages is None else pages, torch.arange(self.sequences, dtype=torch.int32),
            one * (self.prefix + self.own - self.rows), one * self.rows, page_size=self.page, segment=segment,
            unit_rows=unit_rows, **joined,
        )  # fmt: skip

    def cache(self, seed: int) -> Tensor:
        """Return random keys and values, a view [2, P, S, G, E]."""
        if self.boxes:
            return normal(2, self.num_pages, KV_HEADS, self.page, WIDTH, seed=seed).transpose(2, 3)
        return normal(2, self.num_pages, self.page, KV_HEADS, WIDTH, seed=seed)

    def queries(self, seed: int) -> Tensor:
        return normal(self.sequences * self.rows, HEADS, WIDTH, seed=seed)

    def error(self, out: Tensor, q: Tensor, kv: Tensor) -> float:
        """Return the largest error of some rows against attention in float64."""
        pages, worst = self.pages(), 0.0
        for row in sorted({0, len(q) // 3, len(q) - 1}):
            sequence, last = row // self.rows, self.prefix + self.own - self.rows + row % self.rows
            k, v = kv[:, pages[sequence].to(kv.device).long()].flatten(1, 2)[:, : last + 1].double()
            k, v = (x.repeat_interleave(HEADS // KV_HEADS, 1) for x in (k, v))
            weight = (torch.einsum("he,the->ht", q[row].double(), k) * SCALE).softmax(1)
            exact = torch.einsum("ht,the->he", weight, v)
            worst = max(worst, float((out[row].double() - exact).abs().max() / exact.abs().max()))
        return worst


def unit_rows(tiles: AttentionTiles, rows: int) -> int:
    """Return the rows of a unit that fill the tile of the kernel that computes them."""
    return (tiles.block_m if rows == 1 else tiles.unit_m) * KV_HEADS // HEADS


class Call:
    """A variant at work on one problem and some caches that take turns."""

    def __init__(self, problem: Problem, chosen: Variant, caches: list[Tensor]) -> None:
        count = torch.cuda.get_device_properties("cuda").multi_processor_count
        self.launch = AttentionLaunch(multiprocessors=count, tiles=chosen.tiles)
        options = AttentionConfiguration(tiles=chosen.tiles, segment=chosen.segment).table_options(count, KV_HEADS)
        self.joined = {"chain_programs": options.chain_programs, "resume_tokens": options.resume_tokens}
        table = problem.table(chosen.segment, unit_rows(chosen.tiles, problem.rows), **self.joined)
        self.table = DeviceTable.upload(table, torch.device("cuda"))
        self.caches, self.q = caches, problem.queries(7)

    def run(self, kv: Tensor) -> Tensor:
        return attend_rows(self.q, kv[0], kv[1], self.table, SCALE, None, None, launch=self.launch)

    def kernel_calls(self) -> list[list[KernelCall]]:
        """Return the kernel calls of one call for every cache."""
        out = torch.empty_like(self.q)
        return [
            plan_calls(self.q, kv[0], kv[1], self.table, SCALE, None, None, out_NHE=out, launch=self.launch)
            for kv in self.caches
        ]

    def compile(self) -> None:
        for call in self.kernel_calls()[0]:
            call.kernel.warmup(*call.arguments, grid=(call.programs,), **call.options)


def graph_us(runs: list[Callable[[], object]]) -> float:
    """Return the microseconds of one run, where all follow each other in a captured graph."""
    for run in runs:
        run()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        runs[0]()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for run in runs:
            run()
    times = []
    for _ in range(8):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return 1e3 * statistics.median(times[2:]) / len(runs)


def measure(problem: Problem, chosen: Variant, call: Call) -> dict[str, Any]:
    """Check a variant and return its times in microseconds, all kernels together and one by one."""
    error = problem.error(call.run(call.caches[0]), call.q, call.caches[0])
    if not error < 2e-2:
        return {"failed": f"error {error}"}
    runs: list[Callable[[], object]] = [lambda kv=kv: call.run(kv) for kv in call.caches]
    row: dict[str, Any] = {"error": error, "us": graph_us(runs)}
    for calls in zip(*call.kernel_calls(), strict=True):
        if not calls[0].options.get("launch_pdl"):  # alone it would wait for nothing
            row[calls[0].kernel.fn.__name__.strip("_") + "_us"] = graph_us([part.run for part in calls])
    kv_bytes = call.caches[0].nbytes
    row["floor_us"] = max(kv_bytes / 4.237e6, flops(problem) / 808e6)
    row["tflops"] = flops(problem) / row["us"] / 1e6
    row["share"] = row["floor_us"] / row["us"]
    return row


def flops(problem: Problem) -> float:
    seen = problem.prefix + problem.own - problem.rows + (problem.rows + 1) / 2
    return 4 * problem.sequences * problem.rows * seen * HEADS * WIDTH


def check_bits(chosen: Variant) -> dict[str, Any]:
    """Return whether a row has the same bits shared, private, alone, and as a row of a cold sequence; and its bits."""
    count, prefix, own = 24, 2112, 64
    together = Problem(count, prefix, own, 1, chosen.page, chosen.boxes)
    call = Call(together, chosen, [together.cache(1)])
    kv, pages = call.caches[0], together.pages()
    out = call.run(kv)
    checks: dict[str, Any] = {}

    def compute(table: SegmentTable, q: Tensor, kv: Tensor) -> Tensor:
        on_device = DeviceTable.upload(table, torch.device("cuda"))
        return attend_rows(q, kv[0], kv[1], on_device, SCALE, None, None, launch=call.launch)

    one = torch.ones(1, dtype=torch.int32)
    rows = [0, 11, count - 1]
    settings = {"page_size": chosen.page, "segment": chosen.segment, "unit_rows": unit_rows(chosen.tiles, 1)}
    settings |= call.joined
    alone = [
        compute(build_segment_table(pages, one * i, one * (prefix + own - 1), one, **settings), call.q[i : i + 1], kv)
        for i in rows
    ]
    checks["alone"] = all(torch.equal(a[0], out[i]) for a, i in zip(alone, rows, strict=True))
    separate = kv.transpose(2, 3).contiguous().transpose(2, 3) if chosen.boxes else kv.contiguous()
    gathered = separate[:, pages.flatten().to(kv.device).long()]
    gathered = gathered.transpose(2, 3).contiguous().transpose(2, 3) if chosen.boxes else gathered
    private = torch.arange(pages.numel(), dtype=torch.int32).view_as(pages)
    table = together.table(chosen.segment, 32, private, **call.joined)
    checks["private"] = torch.equal(compute(table, call.q, gathered), out)
    cold_q = normal(prefix + own, HEADS, WIDTH, seed=3)
    cold_q[-1] = call.q[5]
    settings["unit_rows"] = unit_rows(chosen.tiles, 2)
    cold = compute(build_segment_table(pages, one * 5, one * 0, one * (prefix + own), **settings), cold_q, kv)
    checks["cold"] = torch.equal(cold[-1], out[5])
    settings["unit_rows"] = 1
    checks["cold by items"] = torch.equal(
        compute(build_segment_table(pages, one * 5, one * 2000, one * 176, **settings), cold_q[2000:], kv),
        cold[2000:],
    )
    return {"bits": checks, "digest": int(out.view(torch.int16).long().sum())}


def compile_variant(chosen: Variant, count: int) -> str:
    """Compile the kernels of a variant for decoding (count 1) or extending, and return why that failed, if so."""
    problem = Problem(2, 1024, OWN, 1, chosen.page, chosen.boxes)
    if count > 1:
        problem = Problem(1, 0, count, count, chosen.page, chosen.boxes)
    try:
        Call(problem, chosen, [problem.cache(0)]).compile()
    except Exception as error:
        return f"compile {chosen.name}: {type(error).__name__}: {str(error)[:300]}"
    return ""


def report(into: list[dict[str, Any]], started: float, **row: Any) -> None:
    row["at"] = round(time.time() - started, 1)
    rounded = {key: round(value, 5) if isinstance(value, float) else value for key, value in row.items()}
    print(json.dumps(rounded), flush=True)
    into.append(row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seconds", type=float, default=100.0)
    parser.add_argument("--only", default="", help="a part of the names of the variants that are timed")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("tuning the attention kernels needs a GPU")
    started, rows = time.time(), list[dict[str, Any]]()
    report(rows, started, card=torch.cuda.get_device_name(), torch=torch.__version__)
    decoding = [v for v in DECODE_VARIANTS if options.only in v.name]
    extending = [v for v in EXTEND_VARIANTS if options.only in v.name]
    parts = [(v, 1) for v in decoding] + [(v, 256) for v in extending]
    # in processes, because the compiler holds the interpreter's lock; they share the cache on the disk
    with ProcessPoolExecutor(14, mp_context=multiprocessing.get_context("spawn")) as pool:
        for failure in pool.map(compile_variant, *zip(*parts, strict=True)):
            if failure:
                report(rows, started, failed=failure)
    report(rows, started, compiled=len(parts))
    names = ("base", "no overlap", "m 64", "tail 16", "pointers", "not fused", "chained", "joined")
    for chosen in [v for v in decoding if v.name in names]:
        try:
            report(rows, started, variant=chosen.name, **check_bits(chosen))
        except Exception as error:
            report(rows, started, failed=f"bits {chosen.name}", error=f"{type(error).__name__}: {str(error)[:200]}")
    caches: dict[tuple[Any, ...], list[Tensor]] = {}
    problems = [(b, p, OWN, 1) for b, p in DECODING[:1]] + [(b, p, n, n) for b, p, n in EXTENDING]
    problems += [(b, p, OWN, 1) for b, p in DECODING[1:]]
    jobs = [
        (Problem(*sizes, v.page, v.boxes), v) for sizes in problems for v in (decoding if sizes[3] == 1 else extending)
    ]
    for problem, chosen in jobs:
        if time.time() - started > options.seconds:
            report(rows, started, stopped="out of time")
            break
        key = dataclasses.astuple(problem)
        name = {"sequences": problem.sequences, "prefix": problem.prefix, "rows": problem.rows, "variant": chosen.name}
        try:
            if key not in caches:
                if any(k[:2] != key[:2] for k in caches):
                    caches.clear()
                first = problem.cache(0)
                count = min(16, max(2, ROTATED_BYTES // first.nbytes)) if problem.rows == 1 else 2
                caches[key] = [first] + [problem.cache(i) for i in range(1, count)]
            report(rows, started, **name, **measure(problem, chosen, Call(problem, chosen, caches[key])))
        except Exception as error:
            report(rows, started, **name, failed=f"{type(error).__name__}: {str(error)[:200]}")
    if options.json:
        options.json.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
