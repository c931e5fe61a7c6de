"""Rows of the GPU probe: one per operation, shape and implementation, and the table of them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass

OURS = "genssd"


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What a time belongs to."""

    card: str
    torch: str
    triton: str
    commit: str
    matmul_tflops: float
    """Rate of a bfloat16 product of 8192 x 8192 matrices, measured in the same run."""
    copy_gbps: float
    """Rate at which a copy reads and writes, measured in the same run."""

    def floor_microseconds(self, flops: float, num_bytes: float) -> float:
        """Return the time that operations and bytes take at the rates of this machine, whichever is longer."""
        return max(flops / self.matmul_tflops / 1e6, num_bytes / self.copy_gbps / 1e3)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Time of one implementation of an operation, or the reason why it has none."""

    operation: str
    shape: str
    implementation: str
    floor_microseconds: float
    microseconds: float | None = None
    method: str = ""
    peak_mib: float | None = None
    error: str = ""

    def to_json(self, machine: Machine) -> str:
        """Return the row as one line of JSON, with the machine's fields."""
        return json.dumps({**dataclasses.asdict(self), **dataclasses.asdict(machine)})


def format_table(rows: Sequence[Row], machine: Machine) -> str:
    """Return a table with a line per operation and shape: our time and memory, and the times of the others."""
    lines: list[tuple[str, ...]] = [("operation", "shape", "floor", OURS, "of floor", "MiB", "others")]
    for operation, shape in dict.fromkeys((row.operation, row.shape) for row in rows):
        group = [row for row in rows if (row.operation, row.shape) == (operation, shape)]
        lines.append(_format_line(operation, shape, group))
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    body = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    head = (
        f"{machine.card}, torch {machine.torch}, triton {machine.triton}, genssd {machine.commit}: product "
        f"{machine.matmul_tflops:.0f} TFLOP/s, copy {machine.copy_gbps:.0f} GB/s; medians, floor = the longer of both"
    )
    return "\n".join([head, *body])


def _format_line(operation: str, shape: str, group: Sequence[Row]) -> tuple[str, ...]:
    ours = next((row for row in group if row.implementation == OURS), None)
    floor = group[0].floor_microseconds
    time, fraction, memory = "-", "-", "-"
    if ours is not None and ours.microseconds is not None:
        time, fraction = format_time(ours.microseconds), f"{100 * floor / ours.microseconds:.0f} %"
        memory = f"{ours.peak_mib:.0f}" if ours.peak_mib is not None else "-"
    elif ours is not None:
        time = "failed"
    others = [
        f"{row.implementation} {'failed' if row.microseconds is None else format_time(row.microseconds)}"
        for row in group
        if row.implementation != OURS
    ]
    return operation, shape, format_time(floor), time, fraction, memory, ", ".join(others)


def format_time(microseconds: float) -> str:
    """Return a time with three digits, in microseconds below a millisecond."""
    return f"{microseconds:.3g} us" if microseconds < 999.5 else f"{microseconds / 1e3:.3g} ms"
