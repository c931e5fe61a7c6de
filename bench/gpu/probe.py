"""Time our operators and those of other libraries on this GPU, in one run of about a minute and a half.

    python -m bench.gpu.probe [--json rows.jsonl] [--only score "branch decode"] [--seconds 90] [--commit HASH]

Short kernels are timed in captured graphs over buffers that exceed the L2 cache, or by the profiler where the host has
to wait for a result; what takes milliseconds, between events. Each time is written as a line of JSON at once, with the
card, the versions and the commit; a table follows at the end. A library that is not installed is left out; an
implementation that fails has a row with its error, and the exit code is 1 where one of ours fails.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from bench.gpu import attention_operations, head_operations
from bench.gpu.operations import NotInstalled, Operation
from bench.gpu.rows import OURS, Machine, Row, format_table, format_time
from bench.gpu.timing import Implementation, measure

OPERATIONS: Mapping[str, Callable[[], Iterator[Operation]]] = {
    "score": head_operations.iter_scores,
    "draw": head_operations.iter_draws,
    "top-p": head_operations.iter_filtered_draws,
    "branch decode": attention_operations.iter_decode_steps,
    "prefill": attention_operations.iter_prefills,
    "extend": attention_operations.iter_extensions,
    "cross-entropy": head_operations.iter_cross_entropies,
    "divergence": head_operations.iter_divergences,
}
"""Families of operations by name, in the order in which they are measured."""


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file to which the rows are written; none without it")
    parser.add_argument("--only", nargs="+", choices=OPERATIONS, default=list(OPERATIONS), help="families to measure")
    parser.add_argument("--seconds", type=float, default=90.0, help="no operation is begun after so many seconds")
    parser.add_argument("--commit", help="commit that is measured; taken from git where it is not given")
    return parser.parse_args(arguments)


def find_commit() -> str:
    """Return the abbreviated commit of this tree, "unknown" outside of a repository."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def describe_machine(commit: str) -> Machine:
    """Measure the rates of a product and of a copy, and return them with the names of card and versions."""
    import triton

    a, b = head_operations.normal(8192, 8192), head_operations.normal(8192, 8192, seed=1)
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    product = measure(Implementation(calls=[lambda: a @ b], method="events")).microseconds
    copy = measure(Implementation(calls=[lambda: target.copy_(source)], method="events")).microseconds
    return Machine(
        card=torch.cuda.get_device_name(),
        torch=torch.__version__,
        triton=triton.__version__,
        commit=commit,
        matmul_tflops=2 * 8192**3 / product / 1e6,
        copy_gbps=2 * source.nbytes / copy / 1e3,
    )


def measure_operation(operation: Operation, machine: Machine) -> Iterator[Row]:
    """Yield a row per implementation; one whose library is missing has none."""
    floor = machine.floor_microseconds(operation.flops, operation.num_bytes)
    for name, build in operation.implementations.items():
        error, timing = "", None
        try:
            timing = measure(build())
        except NotInstalled as reason:
            print(f"   {operation.name} {operation.shape}: no {name} ({reason})", flush=True)
            continue
        except Exception as failure:  # the others are measured all the same
            error = f"{type(failure).__name__}: {str(failure).splitlines()[0][:200] if str(failure) else ''}"
        torch.cuda.empty_cache()
        yield Row(
            operation=operation.name,
            shape=operation.shape,
            implementation=name,
            floor_microseconds=floor,
            microseconds=None if timing is None else timing.microseconds,
            method="" if timing is None else timing.method,
            peak_mib=None if timing is None else timing.peak_mib,
            error=error,
        )


def run_probe(families: Sequence[str], machine: Machine, seconds: float) -> Iterator[Row]:
    """Yield the rows of all operations that begin within so many seconds."""
    started = time.monotonic()
    for family in families:
        for operation in OPERATIONS[family]():
            if time.monotonic() - started > seconds:
                print(f"   {operation.name} {operation.shape}: left out, the time is over", flush=True)
                continue
            yield from measure_operation(operation, machine)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    if not torch.cuda.is_available():
        print("bench.gpu.probe needs a GPU", file=sys.stderr)
        return 2
    machine = describe_machine(options.commit or find_commit())
    rows: list[Row] = []
    for row in run_probe(options.only, machine, options.seconds):
        rows.append(row)
        time_or_error = row.error or format_time(row.microseconds or 0.0)
        print(f"{row.operation:26} {row.shape:22} {row.implementation:20} {time_or_error} {row.method}", flush=True)
        if options.json is not None:
            with options.json.open("a") as file:
                file.write(row.to_json(machine) + "\n")
    print(format_table(rows, machine))
    return int(any(row.error for row in rows if row.implementation == OURS))


if __name__ == "__main__":
    sys.exit(main())
