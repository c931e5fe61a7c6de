"""A pool of finished responses of one seed: written once, scored once by all criteria, picked from by many arms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from genssd.distill.data.traces import Trace, find_traces, make_training_row, read_usable_traces, sort_by_trace
from genssd.distill.reproduce.arm_lists import list_arms
from genssd.distill.reproduce.sources import Picked
from genssd.distill.runs.journal import complete_rows, write_jsonl
from genssd.distill.runs.progress import Progress
from genssd.distill.score.config import ScoreConfig
from genssd.distill.score.pick_options import PickOptions
from genssd.distill.score.picking import pick_responses
from genssd.distill.score.ranking import compute_values
from genssd.distill.score.run import run_score
from genssd.distill.select.generate import run_generate
from genssd.distill.select.generate_config import GenerateConfig
from genssd.engine.checkpoints.checkpoint import locate
from genssd.engine.criteria.criterion_calls import is_higher_better
from genssd.engine.criteria.criterion_names import resolve
from genssd.engine.texts.text import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """Finished responses with what every criterion is computed from."""

    traces: Sequence[Trace]
    features: Sequence[Mapping[str, Any]]
    """Rows of features.jsonl, one per trace, in the same order."""
    tokenizer: Tokenizer
    tokens: int
    """Number of tokens in all responses: those that their writer sampled."""


def list_pool_criteria() -> tuple[str, ...]:
    """Return the criteria of all arms that pick from the teacher's pool, each one once."""
    names = (
        arm.source.criterion for task in ("small", "words") for arm in list_arms(task)
        if isinstance(arm.source, Picked) and arm.source.writer == "teacher"
    )  # fmt: skip
    return tuple(dict.fromkeys(names))


def open_pool_of(config: GenerateConfig, student: str, *, has_teacher: bool, report: Progress) -> Pool:
    """Write and score the responses, or read them where that is done, and return them.

    has_teacher: whether a teacher wrote them, so that all criteria are computed; else `random` alone.
    """
    summary = run_generate(config, report=report.within("pool"))
    directory = Path(config.output_dir)
    score = ScoreConfig(
        student=student, data=(str(summary.path),), criteria=list_pool_criteria() if has_teacher else ("random",),
        output_dir=str(directory.with_name("scores")), resume=True,
        dtype=config.dtype, threads=config.threads, memory_bytes=config.memory_bytes,
    )  # fmt: skip
    journal = directory.with_name("scores") / "features.jsonl"
    if not journal.with_name("summary.json").exists():
        run_score(score, report=report.within("pool"))
    tokenizer = Tokenizer(locate(student))
    traces, _ = read_usable_traces((summary.path,), tokenizer, max_length=1 << 30, limit=None)
    rows = [row for row, _ in complete_rows(journal)]
    scored = set(find_traces(rows, traces, journal))
    traces = [trace for place, trace in enumerate(traces) if place in scored]
    return Pool(
        traces=traces,
        features=sort_by_trace(rows, traces, journal),
        tokenizer=tokenizer,
        tokens=sum(len(trace.response_ids) for trace in traces),
    )


def pick_rows(pool: Pool, criterion: str, options: PickOptions, path: Path) -> Path:
    """Write the training rows that a criterion picks from a pool, as `genssd score` does, and return the file."""
    judge = resolve(criterion)
    values = compute_values(judge, criterion, pool.features)
    chosen = pick_responses(
        pool.features, values, is_higher_better(judge), options,
        lambda i: pool.tokenizer.decode(pool.traces[i].response_ids),
    )  # fmt: skip
    rows = []
    for i in chosen:
        fields = make_training_row(pool.traces[i], pool.traces[i].response_ids, pool.tokenizer)
        rows.append({**fields, "correct": pool.features[i]["correct"], "undecided": pool.features[i]["undecided"]})
    write_jsonl(path, rows)
    return path
