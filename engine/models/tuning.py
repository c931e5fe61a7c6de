"""Tuning of the kernels on the user's GPU: which configurations are timed, and which of them win.

Every candidate is compared with float32 before it is timed. The fastest of each class of numbers of rows wins. For
deterministic results, candidates are combined only if they agree in everything that decides bits (see
`tuned.BIT_FIELDS`), and if the bits of the first rows were in fact equal in all samples, and for rows alone.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from genssd.engine.checkpoints.config import ModelConfig
from genssd.engine.common.amounts import format_count
from genssd.engine.host.machine import available_cores
from genssd.engine.models.pages import PAGE_SIZE
from genssd.kernels import tune_file, tuned
from genssd.kernels.gpu_timing import captured_seconds, compile_in_parallel
from genssd.kernels.tune_file import Configuration, Entry, Problem
from genssd.kernels.tuned import find_disagreement

Outputs = tuple[Tensor, ...]
Timer = Callable[[Callable[[], Outputs], bool], float]
"""A function that returns the time in seconds of a call, which is long (milliseconds) or not."""
Shape = tuple[torch.dtype, ModelConfig]
"""Dtype and sizes of a model."""
MAX_PROCESSES = 14
"""Maximum number of processes that compile; each of them holds torch and its CUDA context in memory."""
COMPARED_ROWS = 16
"""Number of first rows whose bits are compared between candidates and samples."""
ROWS_ALONE = (0, 5)
"""Rows whose bits are compared with those that they have alone."""
VARIES = "varies"
"""Digest of a candidate with which the bits of a row depend on the number of rows."""


class Workload(Protocol):
    """An operator at one shape, with inputs; see kernels/candidates_triton.py."""

    @property
    def operator(self) -> tune_file.Operator: ...

    @property
    def problem(self) -> Problem: ...

    @property
    def samples(self) -> tuple[tuple[int, ...], ...]: ...

    def make_small(self) -> Workload: ...

    def shipped(self, row_class: int) -> Configuration: ...

    def candidates(self, row_class: int) -> list[Configuration]: ...

    def make_run(self, values: Configuration, sample: int, first: int = 0) -> Callable[[], Outputs]: ...

    def check(self, outputs: Sequence[Tensor], sample: int) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Time of a candidate on the samples of one class of rows.

    digest: of the bits of the first rows, equal for all classes where a row's bits depend on that row alone; VARIES
    where they differed between two samples, or from those of a row alone.
    """

    values: Configuration
    row_class: int
    seconds: tuple[float, ...]
    digest: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuned:
    """The outcome for one problem. shipped: seconds of the shipped configuration per class, None where it failed."""

    problem: Problem
    entry: Entry
    shipped: tuple[float | None, ...]

    def describe(self) -> str:
        """Return one line: times of the fastest configurations and of the shipped ones."""
        names = tune_file.ROW_CLASSES if len(self.shipped) > 1 else ("all rows",)
        parts = []
        for name, shipped, microseconds in zip(names, self.shipped, self.entry.microseconds, strict=False):
            shipped_time = "failed" if shipped is None else f"{1e6 * shipped:.0f}"
            parts.append(f"{name}: {microseconds:.0f} us (shipped {shipped_time})")
        shape = " x ".join(map(str, self.problem.shape))
        tail = "" if self.entry.deterministic else "; nothing is deterministic, the shipped configuration stays"
        return f"{self.problem.operator} {shape} {self.problem.dtype}: {', '.join(parts)}{tail}"


def select_winners(operator: tune_file.Operator, num_classes: int, timings: Sequence[Timing]) -> Entry | None:
    """Return the winners per class of rows; None where a class has no timing.

    The cost of a candidate in a class is its time relative to the fastest, as the geometric mean over the samples.
    Where a problem has one class only, its winner serves all numbers of rows.
    """
    costs: list[list[tuple[float, Timing]]] = []
    for row_class in range(num_classes):
        of_class = [timing for timing in timings if timing.row_class == row_class]
        if not of_class:
            return None
        best = [min(times) for times in zip(*(timing.seconds for timing in of_class), strict=True)]
        costs.append([
            (sum(math.log(t / b) for t, b in zip(timing.seconds, best, strict=True)) / len(best), timing)
            for timing in of_class
        ])  # fmt: skip
    fastest = [min(of_class, key=lambda pair: pair[0])[1] for of_class in costs]
    deterministic = _cheapest_group(operator, costs)
    copies = len(tune_file.ROW_CLASSES) // num_classes
    return Entry(
        fastest=tuple(timing.values for timing in fastest) * copies,
        deterministic=None if deterministic is None else tuple(timing.values for timing in deterministic) * copies,
        microseconds=tuple(round(1e6 * _mean(timing.seconds), 2) for timing in fastest) * copies,
    )


def _cheapest_group(
    operator: tune_file.Operator, costs: Sequence[Sequence[tuple[float, Timing]]]
) -> list[Timing] | None:
    """Return the best timing of every class among candidates with equal bits; None where no such group is complete."""
    groups: dict[str, list[dict[str, tuple[float, Timing]]]] = {}
    for row_class, of_class in enumerate(costs):
        for cost, timing in of_class:
            if timing.digest == VARIES or timing.values.get("library"):
                continue
            fields = tuned.BIT_FIELDS[operator] or tuple(timing.values)
            key = json.dumps([timing.digest, *(timing.values[field] for field in fields)])
            classes = groups.setdefault(key, [{} for _ in costs])
            known = classes[row_class].get("best")
            if known is None or cost < known[0]:
                classes[row_class]["best"] = (cost, timing)
    complete = [[c["best"] for c in classes] for classes in groups.values() if all(classes)]
    if not complete:
        return None
    chosen = [timing for _, timing in min(complete, key=lambda group: sum(cost for cost, _ in group))]
    assert find_disagreement(operator, [timing.values for timing in chosen]) is None
    return chosen


def tune(
    workload: Workload, *, timer: Timer, is_over: Callable[[], bool], report: Callable[[str], None]
) -> Tuned | None:
    """Time the candidates of one workload and return the winners; None where a class has none that is correct.

    timer: returns the seconds of one call. is_over: whether no further candidate is begun; the shipped ones are always
    timed. report: receives one line per candidate that fails.
    """
    classes = range(len(workload.samples))
    shipped = [workload.shipped(row_class) for row_class in classes]
    timings: list[Timing] = []
    shipped_seconds: dict[int, float] = {}
    for row_class, values in _order(workload, shipped):
        is_shipped = values == shipped[row_class]
        if is_over() and not is_shipped:
            continue
        try:
            timing = measure(workload, row_class, values, timer)
        except Exception as error:  # a candidate that does not fit the device, or is wrong on it, is left out
            reason = f"{type(error).__name__}: {error!s}".splitlines()[0][:200]
            report(f"{workload.operator} {dict(values)}: {reason}")
            continue
        timings.append(timing)
        if is_shipped:
            shipped_seconds[row_class] = _mean(timing.seconds)
    entry = select_winners(workload.operator, len(classes), timings)
    if entry is None:
        return None
    return Tuned(problem=workload.problem, entry=entry, shipped=tuple(shipped_seconds.get(c) for c in classes))


def _order(workload: Workload, shipped: Sequence[Configuration]) -> Iterable[tuple[int, Configuration]]:
    """Yield every class of rows with each of its candidates once: the shipped ones of all classes first."""
    yield from enumerate(shipped)
    for row_class in range(len(workload.samples)):
        yield from ((row_class, values) for values in workload.candidates(row_class) if values != shipped[row_class])


def measure(workload: Workload, row_class: int, values: Configuration, timer: Timer) -> Timing:
    """Check and time a candidate on the samples of a class. Raises AssertionError where it is not correct."""
    seconds, digests = [], set()
    for sample in workload.samples[row_class]:
        run = workload.make_run(values, sample)
        outputs = run()
        workload.check(outputs, sample)
        is_last = row_class == len(workload.samples) - 1 > 0
        seconds.append(timer(run, is_last or workload.operator in tune_file.LOSS_OPERATORS))
        if len(workload.samples) > 1:
            rows = min(sample, COMPARED_ROWS)
            digests.add(_digest(outputs, 0, rows))
            digests |= set() if row_class else _compare_alone(workload, values, outputs, rows)
    # samples of fewer rows than are compared have a digest of their own
    digest = "" if not digests else digests.pop() if len(digests) == 1 else VARIES
    return Timing(values=values, row_class=row_class, seconds=tuple(seconds), digest=digest)


def _compare_alone(workload: Workload, values: Configuration, outputs: Outputs, rows: int) -> set[str]:
    """Return {VARIES} where a row has other bits alone than in a sample, else nothing."""
    for row in ROWS_ALONE:
        if row < rows and _digest(workload.make_run(values, 1, row)(), 0, 1) != _digest(outputs, row, row + 1):
            return {VARIES}
    return set()


def _digest(outputs: Outputs, first: int, end: int) -> str:
    """Return a digest of the bits of some rows."""
    digest = hashlib.sha256()
    for output in outputs:
        digest.update(output[first:end].contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _mean(seconds: Sequence[float]) -> float:
    """Return the geometric mean."""
    return math.exp(sum(map(math.log, seconds)) / len(seconds))


def time_in_graph(run: Callable[[], Outputs], is_long: bool) -> float:
    """Return the seconds of a call in a captured CUDA graph."""
    return captured_seconds([run], repeats=3 if is_long else 5, per_graph=1 if is_long else 5)


def tune_models(
    models: Sequence[Shape],
    device: torch.device,
    *,
    teacher: Shape | None = None,
    seconds: float,
    report: Callable[[str], None],
) -> dict[Problem, Entry]:
    """Tune every kernel for models on a CUDA device, and return the winners of every problem.

    models: those that may be trained. teacher: that from which they are distilled. seconds: time after which no further
    candidate is begun; half of it at most goes to the compilation. report: receives one line per problem, and one per
    candidate that fails.
    """
    started = time.monotonic()
    torch.cuda.set_device(device)
    workloads = make_workloads(models, device, teacher)
    jobs = list_jobs(workloads)
    processes = min(MAX_PROCESSES, available_cores())
    work = functools.partial(compile_candidate, jobs, device)
    compile_in_parallel(work, len(jobs), processes=processes, timeout=seconds / 2)
    report(f"{format_count(len(jobs), 'candidate')} compiled in {time.monotonic() - started:.0f} s")
    entries: dict[Problem, Entry] = {}
    while workloads:
        workload = workloads.pop(0)  # its inputs are freed afterwards
        result = tune(
            workload, timer=time_in_graph, is_over=lambda: time.monotonic() - started > seconds, report=report
        )
        if result is None:
            report(f"{workload.operator} {workload.problem.shape}: no candidate runs; nothing is kept")
            continue
        entries[workload.problem] = result.entry
        report(result.describe())
    return entries


def compile_candidate(jobs: Sequence[tuple[Workload, Configuration, int]], device: torch.device, index: int) -> None:
    """Compile the kernels of one job, a candidate on a sample, by launching them once on small inputs."""
    torch.cuda.set_device(device)
    workload, values, sample = jobs[index]
    workload.make_small().make_run(values, sample)()
    torch.cuda.synchronize()


def list_jobs(workloads: Sequence[Workload]) -> list[tuple[Workload, Configuration, int]]:
    """Return what must be compiled: candidates with one of their samples, those of equal small workloads once.

    The samples of a divergence are its kinds, each of which has a kernel of its own.
    """
    jobs: dict[tuple[Problem, str], tuple[Workload, Configuration, int]] = {}
    for workload in workloads:
        small = workload.make_small().problem
        for row_class, values in _order(workload, [workload.shipped(c) for c in range(len(workload.samples))]):
            samples = workload.samples[row_class]
            for number, sample in enumerate(samples if workload.operator == "divergence" else samples[:1]):
                jobs.setdefault((small, json.dumps([values, number])), (workload, values, sample))
    return list(jobs.values())


def make_workloads(models: Sequence[Shape], device: torch.device, teacher: Shape | None = None) -> list[Workload]:
    """Return the workloads of models on a CUDA device, each problem once: those of an engine, then those of a training.

    The losses between two heads are those over the vocabulary that a model has in common with the teacher.
    """
    # imported here, because Triton need not be installed where there is no GPU
    from genssd.kernels.attention_candidates_triton import AttentionWorkload
    from genssd.kernels.candidates_triton import Device, DrawWorkload, HeadWorkload
    from genssd.kernels.filter_candidates_triton import FilterWorkload
    from genssd.kernels.loss_candidates_triton import CrossEntropyWorkload, DivergenceWorkload

    properties = Device.of(device)
    workloads: dict[Problem, Workload] = {}
    for dtype, config in (*models, *([] if teacher is None else [teacher])):
        head = (properties, dtype, config.vocab_size, config.hidden_size)
        heads = (config.num_attention_heads, config.num_key_value_heads, config.head_dim)
        listed: tuple[Workload, ...] = (
            *(HeadWorkload(operator, *head) for operator in tune_file.HEAD_OPERATORS),
            DrawWorkload(properties, config.vocab_size),
            FilterWorkload(properties, config.vocab_size),
            AttentionWorkload(properties, dtype, heads, PAGE_SIZE["cuda"]),
        )
        for workload in listed:
            workloads.setdefault(workload.problem, workload)
    for dtype, config in models:
        losses: list[Workload] = [CrossEntropyWorkload(properties, dtype, (config.vocab_size, config.hidden_size))]
        if teacher is not None:
            shared = min(config.vocab_size, teacher[1].vocab_size)
            shape = (shared, config.hidden_size, teacher[1].hidden_size)
            losses.append(DivergenceWorkload(properties, dtype, shape))
        for workload in losses:
            workloads.setdefault(workload.problem, workload)
    return list(workloads.values())
