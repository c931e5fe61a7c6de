"""Time the filters of given logits, the losses under a head and their parts at several configurations on this GPU.

    python -m bench.tuning.row_passes --json row_passes.jsonl [--only filters,parts,losses] [--seconds 80]

Prints one JSON line per measurement as soon as it is known. Draws are compared with plain torch's before they are
timed; a configuration that fails prints its error. "parts" times the products and the row-wise passes of the losses
alone, "losses" the operators with the time of each of their kernels.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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


class Report:
    """Measurements, printed and written one JSON object per line, until a time limit."""

    def __init__(self, path: Path | None, seconds: float) -> None:
        self._file = path.open("w") if path else None
        self._started = time.monotonic()
        self._deadline = self._started + seconds

    def add(self, **values: Any) -> None:
        """Print a measurement and write it to the file."""
        rounded = {key: round(value, 4) if isinstance(value, float) else value for key, value in values.items()}
        line = json.dumps({**rounded, "at_s": round(time.monotonic() - self._started, 1)})
        print(line, flush=True)
        if self._file:
            self._file.write(line + "\n")
            self._file.flush()

    def attempt(self, run: Callable[[], object], **names: Any) -> None:
        """Call run() unless the time is over; a failure becomes a line of its own."""
        if time.monotonic() > self._deadline:
            return
        try:
            run()
        except Exception as error:
            self.add(**names, failed=f"{type(error).__name__}: {str(error)[:300]}")
            torch.cuda.empty_cache()


def graph_microseconds(runs: list[Callable[[], object]], rounds: int = 10) -> float:
    """Return the median time of one of several runs over different memory, captured together in a graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for run in runs:
            run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for run in runs:
            run()
    times = []
    for _ in range(rounds + 2):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return 1e3 * statistics.median(times[2:]) / len(runs)


def event_milliseconds(run: Callable[[], object], rounds: int = 4) -> float:
    """Return the median time of run(), which takes at least some hundred microseconds."""
    run()
    times = []
    for _ in range(rounds):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def kernel_times(run: Callable[[], object], most: int = 14) -> dict[str, str]:
    """Return the total microseconds and the number of calls of the longest kernels of one run, by their names."""
    run()
    torch.cuda.synchronize()
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            run()
            torch.cuda.synchronize()
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {str(error)[:200]}"}
    events = sorted(profile.key_averages(), key=lambda event: -event.self_device_time_total)
    return {event.key[:70]: f"{event.self_device_time_total:.1f} us x{event.count}" for event in events[:most]}


def warm(runs: Iterable[Callable[[], object]]) -> None:
    """Compile the kernels of several runs side by side; what does not compile fails again where it is timed."""

    def attempt(run: Callable[[], object]) -> None:
        try:
            run()
        except Exception as error:
            print(f"warming: {type(error).__name__}: {str(error)[:200]}", file=sys.stderr)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(attempt, runs))
    torch.cuda.synchronize()


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


def measure_filters(report: Report) -> None:
    from genssd.kernels.filter_triton import SHIPPED, FilterTiles, sample_rows

    def draw(logits: Tensor, keys: Tensor, options: dict[str, float], tiles: FilterTiles) -> Tensor:
        min_p = options.get("min_p", 0.0)
        return sample_rows(
            logits, keys, options.get("temperature", 1.0), int(options.get("top_k", 0)), options.get("top_p", 1.0),
            min_p, math.log(min_p) if min_p else 0.0, tiles=tiles,
        )  # fmt: skip

    variants = [SHIPPED]
    for split, warps, part in ((8192, 4, 512), (8192, 8, 512), (4096, 8, 1024), (16384, 8, 1024), (16384, 16, 2048)):
        variants.append(dataclasses.replace(SHIPPED, split=split, split_warps=warps, part=part))
    for list_part in (1024, 4096):
        variants.append(dataclasses.replace(SHIPPED, list_part=list_part))
    for cuts, step in ((16, 1.0), (4, 4.0), (8, 1.0)):
        variants.append(dataclasses.replace(SHIPPED, cuts=cuts, step=step))
    for tile, row_warps in ((512, 4), (1024, 16), (1024, 4), (2048, 8)):
        variants.append(dataclasses.replace(SHIPPED, tile=tile, row_warps=row_warps))
    variants.append(dataclasses.replace(SHIPPED, rounds=2))
    one, key = make_logits(1, "peaked"), torch.zeros(1, dtype=torch.int64, device="cuda")

    def warming(options: dict[str, float], tiles: FilterTiles) -> Callable[[], object]:
        return lambda: draw(one, key, options, tiles)

    tuned = ("top_p .95", "k 50, p .95")
    warm(
        [warming(options, SHIPPED) for options in FILTERS.values()]
        + [warming(FILTERS[name], tiles) for name in tuned for tiles in variants[1:]]
    )
    report.add(done="compiling the filters")

    def one_variant(rows: int, shape: str, name: str, tiles: FilterTiles, *, eager: bool) -> None:
        options = FILTERS[name]
        copies = max(2, min(8, (400 << 20) // (4 * V * rows)))
        logits = [make_logits(rows, shape).roll(i, 0) for i in range(copies)]
        keys = torch.arange(rows, device="cuda") * 7919
        differing = int((draw(logits[0], keys, options, tiles) != expected_tokens(logits[0], keys, options)).sum())
        micros = graph_microseconds([lambda z=z: draw(z, keys, options, tiles) for z in logits])  # type: ignore[misc]
        row: dict[str, Any] = {
            "op": "filters", "rows": rows, "logits": shape, "filters": name, "us": micros, "differing": differing,
            "gbps_of_one_read": logits[0].nbytes / micros / 1e3,
        }  # fmt: skip
        if tiles != SHIPPED:
            row["tiles"] = {
                key: value
                for key, value in dataclasses.asdict(tiles).items()
                if value != dataclasses.asdict(SHIPPED)[key]
            }
        if eager:
            row["kernels"] = kernel_times(lambda: draw(logits[1], keys, options, tiles), 5)
            if "top_p" in options:

                def sorted_draw() -> Tensor:
                    p, ids = logits[0].softmax(1).sort(dim=1, descending=True)
                    p = p.masked_fill(p.cumsum(1) - p >= options["top_p"], 0.0)
                    return ids.gather(1, torch.multinomial(p, 1))

                row["eager_us"] = 1e3 * event_milliseconds(sorted_draw)
        report.add(**row)

    for rows, shape, name in itertools.product((64, 8, 256), ("normal", "peaked", "flat"), FILTERS):
        if shape != "flat" or name == "top_p .95":
            report.attempt(
                lambda a=(rows, shape, name): one_variant(*a, SHIPPED, eager=a[0] == 64),  # type: ignore[misc]
                op="filters", rows=rows, logits=shape, filters=name,
            )  # fmt: skip
    for shape, name, tiles in itertools.product(("normal", "peaked"), tuned, variants[1:]):
        report.attempt(
            lambda a=(64, shape, name, tiles): one_variant(*a, eager=False),  # type: ignore[misc]
            op="filters", logits=shape, filters=name, tiles=str(tiles),
        )  # fmt: skip


def random_head(rows: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(rows, width, device="cuda", generator=generator).bfloat16()
    weight = (3.0 / width**0.5 * torch.randn(V, width, device="cuda", generator=generator)).bfloat16()
    return hidden, weight, torch.randint(0, V, (rows,), device="cuda", generator=generator)


def measure_products(report: Report, rows: int, width: int) -> None:
    """Time the three products of a chunk in every form that could be used."""
    h, w, _ = random_head(rows, width)
    x = torch.empty(rows, V, device="cuda")
    half = torch.empty(rows, V, device="cuda", dtype=torch.bfloat16)
    strided = x.view(torch.bfloat16)[:, V:]
    strided.normal_()
    half.normal_()
    total = torch.zeros(V, width, device="cuda")
    flat = total.view(width, V)
    d_hidden = torch.empty_like(h)
    wide: dict[str, Any] = {"out_dtype": torch.float32}
    runs: dict[str, Callable[[], object]] = {
        "logits, bf16": lambda: torch.mm(h, w.T, out=half),
        "logits, float32": lambda: torch.mm(h, w.T, out=x, **wide),
        "logits, float32, copied": lambda: x.copy_(torch.mm(h, w.T, **wide)),
        "d_hidden": lambda: torch.mm(half, w, out=d_hidden),
        "d_hidden, rows apart": lambda: torch.mm(strided, w, out=d_hidden),
        "d_weight, bf16": lambda: torch.mm(half.T, h),
        "d_weight, float32": lambda: torch.mm(half.T, h, out=total, **wide),
        "d_weight, float32, rows apart": lambda: torch.mm(strided.T, h, out=total, **wide),
        "d_weight, added": lambda: torch.addmm(total, half.T, h, out=total, **wide),
        "d_weight, added, rows apart": lambda: torch.addmm(total, strided.T, h, out=total, **wide),
        "d_weight, added after": lambda: total.add_(torch.mm(half.T, h, **wide)),
        "d_weight, transposed, added": lambda: torch.addmm(flat, h.T, half, out=flat, **wide),
    }  # fmt: skip
    for name, run in runs.items():

        def timed(name: str = name, run: Callable[[], object] = run) -> None:
            ms = event_milliseconds(run, 3)
            report.add(op="product", product=name, rows=rows, width=width, ms=ms, tflops=2e-9 * rows * V * width / ms)

        report.attempt(timed, op="product", product=name)


def measure_row_passes(report: Report, rows: int) -> None:
    """Time the row-wise passes alone. Repeated runs read the gradients that the run before them wrote as logits."""
    from genssd.kernels import divergence_triton, rows_triton
    from genssd.kernels.rows_triton import RowTiles

    generator = torch.Generator("cuda").manual_seed(0)
    x = 3 * torch.randn(rows, V, device="cuda", generator=generator)
    y = 3 * torch.randn(rows, V, device="cuda", generator=generator)
    target = torch.randint(0, V, (rows,), device="cuda", generator=generator)
    weight, lse = torch.ones(rows, device="cuda"), torch.full((rows,), 16.0, device="cuda")
    dtype, total = torch.bfloat16, x.numel()
    few = slice(0, 16)

    def divergence(kind: str) -> Callable[[slice, RowTiles], object]:
        mix = 0.5 if kind == "jsd" else 0.0
        return lambda span, tiles: divergence_triton.divergence_rows(
            x[span], y[span], weight[span], kind, mix, 1.0, None, None, dtype, tiles=tiles
        )

    runs: dict[str, tuple[int, Callable[[slice, RowTiles], object]]] = {
        "logsumexp": (4, lambda span, tiles: rows_triton.logsumexp_rows(x[span], 1.0, None, tiles=tiles)),
        "softmax gradient": (
            6,
            lambda span, tiles: rows_triton.softmax_gradient_rows(
                x[span], lse[span], weight[None, span], 1.0, None, dtype, tiles=tiles
            ),
        ),
        "cross-entropy": (
            10,
            lambda span, tiles: rows_triton.cross_entropy_rows(
                x[span], target[span], weight[span], 1.0, None, dtype, tiles=tiles
            ),
        ),
        "forward_kl": (18, divergence("forward_kl")),
        "jsd": (26, divergence("jsd")),
    }
    variants = [RowTiles(block=b, num_warps=n) for b, n in ((4096, 8), (2048, 8), (4096, 16), (2048, 4), (16384, 32))]
    variants += [RowTiles(block=16384, num_warps=32, programs=count) for count in (66, 88, 132)]
    variants += [RowTiles(block=8192, num_warps=16, programs=count) for count in (132, 264)]
    warm([lambda r=run, t=tiles: r(few, t) for _, run in runs.values() for tiles in variants])  # type: ignore[misc]
    report.add(done="compiling the row passes")
    x.normal_()
    loss, dx = rows_triton.cross_entropy_rows(x[few].clone(), target[few], weight[few], 1.0, None, dtype)
    z = x[few].double().requires_grad_()
    exact = torch.nn.functional.cross_entropy(z, target[few], reduction="none")
    (gradient,) = torch.autograd.grad(exact.sum(), z)
    error = float((dx.double() - gradient).norm() / gradient.norm())
    report.add(check="cross-entropy", loss_error=float((loss - exact).abs().max()), gradient_error=error)

    def timed(name: str, num_bytes: int, run: Callable[[slice, RowTiles], object], tiles: RowTiles) -> None:
        x.normal_()
        ms = event_milliseconds(lambda: run(slice(None), tiles), 3)
        report.add(
            op="row pass", name=name, rows=rows, **dataclasses.asdict(tiles), ms=ms,
            gbps_as_if_uncached=num_bytes * total / ms / 1e6,
        )  # fmt: skip

    for name, (num_bytes, run) in runs.items():
        for tiles in variants if num_bytes > 6 else variants[:5]:
            report.attempt(
                lambda a=(name, num_bytes, run, tiles): timed(*a),  # type: ignore[misc]
                op="row pass", name=name, tiles=str(tiles),
            )  # fmt: skip


def gibibytes_of(run: Callable[[], object]) -> float:
    """Return the peak of memory that run() allocates beyond what is allocated before it."""
    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def measure_losses(report: Report) -> None:
    from genssd.kernels import head
    from genssd.kernels.cross_entropy import linear_cross_entropy
    from genssd.kernels.divergence import linear_divergence

    rows = 8192
    teacher, teacher_weight, _ = random_head(rows, 4096)

    def measure(name: str, width: int, loss: Callable[[Tensor, Tensor], Tensor], frozen: bool, mib: int) -> None:
        h, w, _ = random_head(rows, width)
        h.requires_grad_()
        w.requires_grad_(not frozen)
        head.CHUNK_BYTES["cuda"] = mib << 20

        def step() -> None:
            h.grad = w.grad = None
            loss(h, w).backward()  # type: ignore[no-untyped-call]

        ms = event_milliseconds(step)
        more = {} if mib != shipped else {"kernels": kernel_times(step), "gib": gibibytes_of(step)}
        report.add(op="loss", loss=name, width=width, frozen=frozen, chunk_mib=mib, ms=ms, **more)

    target = torch.randint(0, V, (rows,), device="cuda")
    shipped = head.CHUNK_BYTES["cuda"] >> 20
    losses: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "cross-entropy": lambda h, w: linear_cross_entropy(h, w, target).total,
        "eager cross-entropy": lambda h, w: torch.nn.functional.cross_entropy((h @ w.T).float(), target),
        "forward_kl": lambda h, w: linear_divergence(h, w, teacher, teacher_weight, kind="forward_kl").total,
        "jsd": lambda h, w: linear_divergence(h, w, teacher, teacher_weight, kind="jsd").total,
    }
    cases = [
        ("cross-entropy", 4096, False, shipped), ("cross-entropy", 1024, False, shipped),
        ("forward_kl", 1024, False, shipped), ("jsd", 1024, False, shipped),
        ("cross-entropy", 4096, True, shipped), ("cross-entropy", 1024, True, shipped),
        ("cross-entropy", 4096, False, 1280), ("cross-entropy", 1024, False, 1280),
        ("cross-entropy", 1024, False, 640), ("cross-entropy", 1024, False, 4800), ("forward_kl", 1024, False, 1280),
        ("eager cross-entropy", 4096, False, shipped), ("eager cross-entropy", 1024, False, shipped),
    ]  # fmt: skip
    for name, width, frozen, mib in cases:
        report.attempt(
            lambda a=(name, width, losses[name], frozen, mib): measure(*a),  # type: ignore[misc]
            op="loss", loss=name, width=width, frozen=frozen, chunk_mib=mib,
        )  # fmt: skip
        torch.cuda.empty_cache()
    head.CHUNK_BYTES["cuda"] = shipped << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", default="losses,filters,parts")
    parser.add_argument("--seconds", type=float, default=80.0)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("timing the row-wise kernels needs a GPU")
    report = Report(options.json, options.seconds)
    report.add(gpu=torch.cuda.get_device_name(), torch=torch.__version__)
    for part in options.only.split(","):
        if part == "filters":
            report.attempt(lambda: measure_filters(report), part=part)
        elif part == "losses":
            report.attempt(lambda: measure_losses(report), part=part)
        else:
            for width in (4096, 1024):
                report.attempt(lambda width=width: measure_products(report, 4096, width), part=part)  # type: ignore[misc]
            report.attempt(lambda: measure_row_passes(report, 2048), part=part)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
