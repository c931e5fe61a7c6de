"""Time the kernels over the head at many configurations on this GPU: scoring, and the logits that a draw reads.

    python -m bench.tuning.head_tiles --json bench/results/gpu-head-tiles.jsonl

Every configuration is checked against float32 before it is timed, and one line per configuration is written at once. A
faster one goes into kernels/head_triton.py and must then pass tests/kernels/test_ahead_of_time.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from bench.support.device_limits import measure_device_limits
from bench.support.gpu_timing import kernel_microseconds
from torch import Tensor

from genssd.engine.host.machine import available_cores
from genssd.kernels.draw_triton import DrawTiling, draw_from_logits, draw_rows, write_logits
from genssd.kernels.gpu_timing import captured_seconds, compile_in_parallel
from genssd.kernels.head_triton import HeadLaunch, HeadTiles
from genssd.kernels.logprob_triton import score_rows

VOCABULARY = 151936
FEW = [(64, 4096), (64, 1024), (16, 4096)]
MIDDLE = [(128, 4096), (256, 4096), (512, 1024)]
MANY = [(8192, 1024), (8192, 4096)]


Timer = Callable[[Sequence[Callable[[], object]]], float]


@dataclasses.dataclass(frozen=True, slots=True)
class Variant:
    """A configuration to time: its launch, and how many programs run on a multiprocessor."""

    tiles: HeadTiles
    splits: int
    per_multiprocessor: int
    group: int = 16

    def launch(self) -> HeadLaunch:
        processors = torch.cuda.get_device_properties(0).multi_processor_count
        return HeadLaunch(
            programs=self.per_multiprocessor * processors, tiles=self.tiles, splits=self.splits, group=self.group
        )


def few_variants() -> list[Variant]:
    sizes = [
        # block_v, block_d, stages, programs per multiprocessor, splits
        (256, 64, 5, 1, 132), (256, 64, 2, 2, 132), (256, 64, 2, 2, 264), (256, 128, 2, 1, 132), (256, 64, 4, 1, 132),
        (128, 64, 3, 3, 396), (128, 64, 3, 2, 264), (128, 128, 4, 1, 132), (64, 64, 4, 3, 396),
    ]  # fmt: skip
    return [
        Variant(HeadTiles(block_n=64, block_v=v, block_d=d, num_warps=4, num_stages=s, descriptors=True), splits, per)
        for v, d, s, per, splits in sizes
    ]


def many_variants() -> list[Variant]:
    sizes = [
        # block_n, block_v, block_d, warps, stages, programs per multiprocessor, splits, group
        (128, 256, 64, 8, 4, 1, 132, 16), (128, 256, 64, 8, 3, 1, 132, 16), (128, 256, 64, 8, 4, 1, 132, 12),
        (128, 256, 64, 8, 4, 1, 132, 24), (256, 128, 64, 8, 4, 1, 132, 16),
    ]  # fmt: skip
    return [
        Variant(
            HeadTiles(block_n=n, block_v=v, block_d=d, num_warps=w, num_stages=s, descriptors=True), splits, per, group
        )
        for n, v, d, w, s, per, splits, group in sizes
    ]


DRAW_TILINGS = [
    DrawTiling(split=split, block=block, num_warps=warps)
    for split, block, warps in [
        (16384, 1024, 4), (8192, 1024, 4), (32768, 2048, 8), (4096, 256, 1), (8192, 256, 1), (8192, 512, 2),
        (16384, 2048, 4),
    ]
]  # fmt: skip


def variants() -> list[Variant]:
    return few_variants() + many_variants()


def inputs(rows: int, width: int, vocabulary: int = VOCABULARY) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(rows, width, device="cuda", generator=generator).bfloat16()
    weight = (3 / width**0.5 * torch.randn(vocabulary, width, device="cuda", generator=generator)).bfloat16()
    return hidden, weight, torch.randint(0, vocabulary, (rows,), device="cuda", generator=generator)


def compile_variant(index: int) -> None:
    """Compile the kernels of one variant, by running them on few rows."""
    launch = variants()[index].launch()
    hidden, weight, target = inputs(launch.tiles.block_n, 1024, 4096)
    score_rows(hidden, weight, target, None, 1.0, None, launch=launch)
    logits = write_logits(hidden, weight, None, None, launch=launch)
    draw_from_logits(logits, target, 1.0, 4096, tiling=DRAW_TILINGS[index % len(DRAW_TILINGS)])
    torch.cuda.synchronize()


def check(hidden: Tensor, weight: Tensor, target: Tensor, launch: HeadLaunch) -> None:
    """Raise AssertionError unless the kernels agree with float32 on the first rows."""
    logits = hidden[:64].float() @ weight.float().T
    exact = logits.log_softmax(1)
    values = score_rows(hidden, weight, target, None, 1.0, None, launch=launch)
    rows = slice(0, 64)
    torch.testing.assert_close(values[0][rows], exact.gather(1, target[rows, None])[:, 0], atol=2e-3, rtol=1e-4)
    torch.testing.assert_close(values[2][rows], -(exact.exp() * exact).sum(1), atol=2e-3, rtol=1e-4)
    best = score_rows(hidden[rows], weight, logits.argmax(1), None, 1.0, None, launch=launch)
    assert int((best[4] != 1).sum()) <= 1, f"ranks of the most likely tokens: {best[4].tolist()}"
    if len(hidden) <= 512:
        own = write_logits(hidden, weight, None, None, launch=launch)[rows]
        torch.testing.assert_close(own, logits, atol=2e-3, rtol=1e-3)


def eager(hidden: Tensor, weight: Tensor, target: Tensor) -> Callable[[], object]:
    def run() -> object:
        logprob = (hidden @ weight.T).float().log_softmax(1)
        chosen = logprob.gather(1, target[:, None])
        return chosen, -(logprob.exp() * logprob).sum(1), 1 + (logprob > chosen).sum(1)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path("head-tiles.jsonl"), help="file of the rows")
    parser.add_argument("--seconds", type=float, default=90.0, help="time after which no further shape begins")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("tuning tile sizes needs a GPU")
    started = time.perf_counter()
    compile_in_parallel(compile_variant, len(variants()), processes=available_cores())
    print(f"compiled in {time.perf_counter() - started:.0f} s", flush=True)
    torch.backends.cuda.matmul.allow_tf32 = False
    limits = measure_device_limits("cuda", torch.bfloat16)
    with options.json.open("w") as file:

        def write(**row: Any) -> None:
            print(json.dumps(row), f"[{time.perf_counter() - started:.0f} s]", flush=True)
            file.write(json.dumps(row) + "\n")
            file.flush()

        write(gpu=torch.cuda.get_device_name(), torch=torch.__version__, limits=dataclasses.asdict(limits))
        for rows, width in [*FEW, *MIDDLE, *MANY]:
            if time.perf_counter() - started < options.seconds:
                time_shape(rows, width, limits.flops, limits.bytes, write)


def time_shape(rows: int, width: int, flops: float, rate: float, write: Callable[..., None]) -> None:
    """Time every variant that suits a number of rows, and the library's product and plain torch next to them."""
    hidden, weight, target = inputs(rows, width)
    floor = max(2 * rows * VOCABULARY * width / flops, weight.nbytes / rate)
    seconds: Timer = functools.partial(captured_seconds, per_graph=5)
    if rows > 1024:
        seconds = functools.partial(captured_seconds, per_graph=1, repeats=4)
    shape = {"rows": rows, "width": width, "floor_us": 1e6 * floor}
    out = torch.empty(rows, VOCABULARY, dtype=torch.bfloat16, device="cuda")
    product = seconds([functools.partial(torch.mm, hidden, weight.T, out=out)])
    wide = seconds([functools.partial(torch.mm, hidden, weight.T, out_dtype=torch.float32)])
    plain = seconds([eager(hidden, weight, target)])
    write(**shape, product_us=1e6 * product, float32_product_us=1e6 * wide, eager_us=1e6 * plain)
    if rows <= 512:
        logits = hidden.float() @ weight.float().T
        for tiling in DRAW_TILINGS:
            run = functools.partial(draw_from_logits, logits, target, 1.0, VOCABULARY, tiling=tiling)
            greedy = functools.partial(draw_from_logits, logits, target, 0.0, VOCABULARY, tiling=tiling)
            write(
                **shape, **dataclasses.asdict(tiling), draw_pass_us=1e6 * seconds([run]),
                greedy_pass_us=1e6 * seconds([greedy]), tokens=int(run()[0].sum()),
            )  # fmt: skip
    candidates = {64: few_variants(), 8192: many_variants()}.get(rows, few_variants()[:2] + many_variants())
    for variant in candidates if rows != 16 else few_variants():
        launch = variant.launch()
        name = {**dataclasses.asdict(variant.tiles), "splits": variant.splits, "per_sm": variant.per_multiprocessor,
                "group": variant.group}  # fmt: skip
        try:
            write(**shape, **name, **time_variant(hidden, weight, target, launch, seconds, floor))
        except Exception as error:  # a configuration that does not fit the device is left out
            write(**shape, **name, failed=f"{type(error).__name__}: {str(error)[:300]}")


def time_variant(
    hidden: Tensor, weight: Tensor, target: Tensor, launch: HeadLaunch, seconds: Timer, floor: float
) -> dict[str, Any]:
    """Check one configuration, and return its times in microseconds and a checksum of its bits."""
    check(hidden, weight, target, launch)
    score = functools.partial(score_rows, hidden, weight, target, None, 1.0, None, launch=launch)
    took = seconds([score])
    bits = score()[1][:16].view(torch.int32).sum().item()  # rows of all shapes of a width are equal
    row: dict[str, Any] = {"score_us": 1e6 * took, "share": floor / took, "bits": bits}
    if len(hidden) <= 512:
        write_all = functools.partial(write_logits, hidden, weight, None, None, launch=launch)
        both = functools.partial(draw_rows, hidden, weight, target, None, 1.0, None, VOCABULARY, launch=launch)
        row |= {"logits_us": 1e6 * seconds([write_all]), "draw_us": 1e6 * seconds([both])}
    row["kernels_us"] = {key.split("(")[0][:40]: value for key, value in kernel_microseconds(score).items()}
    return row


if __name__ == "__main__":
    main()
