"""Memory that each operator over a head allocates beyond its inputs and outputs, at 8192 rows and 151936 tokens.

    python -m bench.kernels.memory [--rows 8192] [--vocabulary 151936] [--width 64] [--json bench/results/memory.json]

On a GPU the allocator's peak is measured, on a CPU (Linux) the process's resident peak, reset before each operator. The
eager baseline keeps several [rows, vocabulary] tensors, so it is measured at fewer rows (--eager-rows).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from genssd.kernels.cross_entropy import linear_cross_entropy
from genssd.kernels.divergence import linear_divergence
from genssd.kernels.logprob import linear_logprob
from genssd.kernels.sampling import linear_sample
from genssd.kernels.topk_divergence import topk_divergence

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPE = torch.bfloat16 if GPU else torch.float32


def peak_bytes(run: Callable[[], list[Tensor]]) -> int:
    """Return the peak of the memory during run(), minus the memory before it and the bytes of its outputs."""
    if GPU:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        outputs = run()
        peak = torch.cuda.max_memory_allocated() - before
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the peak restarts from what is resident now
        before = _read_status("VmRSS")
        outputs = run()
        peak = _read_status("VmHWM") - before
    return peak - sum(output.nbytes for output in outputs)


def _read_status(field: str) -> int:
    """Return a field of /proc/self/status that is given in kB, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field + ":"))


def gradients(loss: Tensor, *inputs: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, inputs))


def operators(rows: int, vocabulary: int, width: int) -> dict[str, Callable[[], list[Tensor]]]:
    """Return a function per operator that runs it on random inputs and returns its outputs or gradients."""
    hidden = torch.randn(rows, width, device=DEVICE).to(DTYPE).requires_grad_()
    weight = torch.randn(vocabulary, width, device=DEVICE).to(DTYPE).requires_grad_()
    frozen = weight.detach()
    teacher = torch.randn(rows, width, device=DEVICE).to(DTYPE)
    target = torch.randint(0, vocabulary, (rows,), device=DEVICE)
    ids = torch.arange(64, device=DEVICE).expand(rows, 64).contiguous()
    logprob = torch.full((rows, 64), 1 / 65, device=DEVICE).log()

    def score() -> list[Tensor]:
        with torch.no_grad():
            stats = linear_logprob(hidden, weight, target)
        return [stats.logprob, stats.logsumexp, stats.entropy, stats.sum_p2, stats.rank]

    return {
        "linear_logprob": score,
        "linear_sample": lambda: list(linear_sample(hidden.detach(), frozen, target)),
        "linear_cross_entropy": lambda: gradients(linear_cross_entropy(hidden, weight, target).total, hidden, weight),
        "linear_cross_entropy, frozen head": lambda: gradients(
            linear_cross_entropy(hidden, frozen, target).total, hidden
        ),
        "linear_divergence (jsd)": lambda: gradients(
            linear_divergence(hidden, weight, teacher, frozen, kind="jsd").total, hidden, weight
        ),
        "topk_divergence (64, bucket)": lambda: gradients(
            topk_divergence(hidden, weight, ids, logprob, kind="forward_kl").total, hidden, weight
        ),
        "eager cross-entropy": lambda: gradients(
            torch.nn.functional.cross_entropy((hidden @ weight.T).float(), target), hidden, weight
        ),
    }


def measure(name: str, rows: int, vocabulary: int, width: int) -> int:
    operators(2, 50, 8)[name]()  # a first call loads libraries, which would count as memory
    return peak_bytes(operators(rows, vocabulary, width)[name])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--eager-rows", type=int, default=8192 if GPU else 1024)
    parser.add_argument("--vocabulary", type=int, default=151936)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    table = []
    for name in operators(1, 1, 1):
        rows = options.eager_rows if name.startswith("eager") else options.rows
        # in a process of its own: memory that one operator leaves to the allocator would hide what the next allocates
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            mib = pool.apply(measure, (name, rows, options.vocabulary, options.width)) / 2**20
        logits = rows * options.vocabulary * 4 / 2**20
        table.append({"operator": name, "rows": rows, "peak_mib": round(mib), "float32_logits_mib": round(logits)})
        print(f"{name:36} {rows:6} rows {mib:8.0f} MiB   ({logits:.0f} MiB would be one [rows, vocabulary] tensor)")
    if options.json:
        shape = {"vocabulary": options.vocabulary, "width": options.width, "device": DEVICE, "dtype": str(DTYPE)}
        options.json.write_text(json.dumps({**shape, "torch": torch.__version__, "operators": table}, indent=2) + "\n")


if __name__ == "__main__":
    main()
