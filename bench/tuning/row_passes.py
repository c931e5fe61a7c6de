"""Time the filters of given logits, the losses under a head and their parts at several configurations on this GPU.

    python -m bench.tuning.row_passes --json row_passes.jsonl [--only filters,parts,losses] [--seconds 80]

Prints one JSON line per measurement as soon as it is known. Draws are compared with plain torch's before they are
timed; a configuration that fails prints its error. "parts" times the products and the row-wise passes of the losses
alone, "losses" the operators with the time of each of their kernels.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench.support.gpu_timing import event_seconds
from bench.support.tuning import Report, gibibytes_of, kernel_times, warm
from bench.tuning.filter_passes import V, measure_filters
from torch import Tensor


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
            ms = 1e3 * event_seconds(run, repeats=3)
            report.add(op="product", product=name, rows=rows, width=width, ms=ms, tflops=2e-9 * rows * V * width / ms)

        report.attempt(timed, op="product", product=name)


Pass = Callable[[slice, Any], object]
"""Function of a slice of rows and a configuration of a kernel over rows."""


def list_passes(x: Tensor, y: Tensor, target: Tensor, weight: Tensor) -> dict[str, tuple[int, Pass]]:
    """Return the row-wise passes by name, with the bytes that each moves per logit if no cache helps."""
    from genssd.kernels import divergence_triton, rows_triton

    dtype, lse = torch.bfloat16, torch.full_like(weight, 16.0)

    def divergence(kind: str) -> Pass:
        mix = 0.5 if kind == "jsd" else 0.0
        return lambda span, tiles: divergence_triton.divergence_rows(
            x[span], y[span], weight[span], kind, mix, 1.0, None, None, dtype, tiles=tiles
        )

    return {
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


def check_cross_entropy(report: Report, x: Tensor, target: Tensor) -> None:
    """Report the errors of the losses and gradients of a few rows against float64."""
    from genssd.kernels.rows_triton import cross_entropy_rows

    loss, dx = cross_entropy_rows(x.clone(), target, torch.ones(len(x), device="cuda"), 1.0, None, torch.bfloat16)
    z = x.double().requires_grad_()
    exact = torch.nn.functional.cross_entropy(z, target, reduction="none")
    (gradient,) = torch.autograd.grad(exact.sum(), z)
    error = float((dx.double() - gradient).norm() / gradient.norm())
    report.add(check="cross-entropy", loss_error=float((loss - exact.detach()).abs().max()), gradient_error=error)


def measure_row_passes(report: Report, rows: int) -> None:
    """Time the row-wise passes alone. Repeated runs read the gradients that the run before them wrote as logits."""
    from genssd.kernels.rows_triton import RowTiles

    generator = torch.Generator("cuda").manual_seed(0)
    x = 3 * torch.randn(rows, V, device="cuda", generator=generator)
    y = 3 * torch.randn(rows, V, device="cuda", generator=generator)
    target = torch.randint(0, V, (rows,), device="cuda", generator=generator)
    few = slice(0, 16)
    check_cross_entropy(report, x[few], target[few])
    passes = list_passes(x, y, target, torch.ones(rows, device="cuda"))
    variants = [RowTiles(block=b, num_warps=n) for b, n in ((4096, 8), (2048, 8), (4096, 16), (2048, 4), (16384, 32))]
    variants += [RowTiles(block=16384, num_warps=32, programs=count) for count in (66, 88, 132)]
    variants += [RowTiles(block=8192, num_warps=16, programs=count) for count in (132, 264)]
    warm([lambda r=run, t=tiles: r(few, t) for _, run in passes.values() for tiles in variants])  # type: ignore[misc]
    report.add(done="compiling the row passes")

    def measure(name: str, num_bytes: int, run: Pass, tiles: RowTiles) -> None:
        x.normal_()
        ms = 1e3 * event_seconds(lambda: run(slice(None), tiles), repeats=3)
        report.add(
            op="row pass", name=name, rows=rows, **dataclasses.asdict(tiles), ms=ms,
            gbps_as_if_uncached=num_bytes * x.numel() / ms / 1e6,
        )  # fmt: skip

    for name, (num_bytes, run) in passes.items():
        for tiles in variants if num_bytes > 6 else variants[:5]:
            report.attempt(
                lambda a=(name, num_bytes, run, tiles): measure(*a),  # type: ignore[misc]
                op="row pass", name=name, tiles=str(tiles),
            )  # fmt: skip


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

        ms = 1e3 * event_seconds(step)
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
