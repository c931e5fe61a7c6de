"""`genssd score`: criteria over finished traces; the best response of every prompt; a ranking of their teachers.

OUTPUT_DIR/features.jsonl   journal: one line per trace with what the criteria are computed from
OUTPUT_DIR/scores.jsonl     the same with one column per criterion
OUTPUT_DIR/selected.jsonl   the best responses of every prompt under --pick.by: what training reads
OUTPUT_DIR/teachers.json    per criterion, the teachers ranked for this student, with bootstrap intervals
OUTPUT_DIR/controls.json    per criterion, what its ranking has to do with length, steps, teachers and correctness
OUTPUT_DIR/report.html      what the criteria pick, how they relate: tables and plots
OUTPUT_DIR/bad_rows.txt     what could not be scored, by file and line
OUTPUT_DIR/summary.json     counts of traces, prompts and picked responses
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from genssd.distill.data.traces import (
    Trace,
    describe_reading,
    find_traces,
    make_training_row,
    read_usable_traces,
    sort_by_trace,
)
from genssd.distill.pool.pool import Lost, Pool, Stopped
from genssd.distill.runs.clusters import on_cluster
from genssd.distill.runs.journal import write_json, write_jsonl
from genssd.distill.runs.output_files import JOURNALS
from genssd.distill.runs.pools import open_pool
from genssd.distill.runs.progress import SILENT, Progress
from genssd.distill.runs.run import Run
from genssd.distill.runs.writing import write_text
from genssd.distill.score.comparison import compare
from genssd.distill.score.config import ScoreConfig
from genssd.distill.score.controls import ControlTable, compute_controls
from genssd.distill.score.features import Scorer, ScoreWork, make_jsonable
from genssd.distill.score.page import render_page
from genssd.distill.score.pick_options import PickOptions
from genssd.distill.score.picking import compute_lark_weights, pick_responses
from genssd.distill.score.ranking import TeacherRank, compute_values, group_by_prompt, rank_teachers
from genssd.distill.score.teacher import TeacherReader, has_recorded
from genssd.engine.common.amounts import format_count
from genssd.engine.common.errors import InputError, WorkerError
from genssd.engine.criteria.criterion import AnyCriterion, PoolCriterion
from genssd.engine.criteria.criterion_calls import is_higher_better
from genssd.engine.criteria.criterion_names import resolve
from genssd.engine.criteria.learning_gain import Lark
from genssd.engine.engine import Engine
from genssd.engine.setup.model_facts import ModelFacts

CONTROLS = ("length", "random")
"""Criteria that are always computed, because any other has to say more than they do."""
TEACHER_CONTROL = "teacher_logprob"
"""The control that is computed where the teacher's log-probabilities are known."""
SHARED_PICK_OPTIONS = ("keep", "correct", "finished", "loops", "min_steps", "max_steps")
"""The options of picking that the report applies to every criterion."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreSummary:
    """What a finished run has written."""

    output_dir: Path
    traces: int
    prompts: int
    selected: int
    bad_rows: tuple[str, ...]
    teachers: Mapping[str, tuple[TeacherRank, ...]]
    """The teachers by criterion, best first. Empty with fewer than two teachers."""
    undecided: int
    """Number of responses that could not be judged; they do not count as correct."""
    incomplete: int
    """Number of prompts left out of the ranking because a teacher has no response to them."""
    controls: ControlTable
    """What the rankings have to do with length, steps, teachers and correctness."""


@on_cluster
def run_score(config: ScoreConfig, engine: Engine | None = None, report: Progress = SILENT) -> ScoreSummary:
    """Score, pick and rank. engine: a loaded engine to use instead of loading the student.

    Raises GenssdError on bad input; traces that were scored before are in the journal.
    """
    _check_judge(config)
    fingerprints = None if engine is None else engine.fingerprints
    with Run.open(config, "score", journal=JOURNALS["score"], fingerprints=fingerprints) as run:
        with open_pool(
            config, engine, run.chat_options, teacher=config.teacher, student=config.student, report=report
        ) as pool:
            models = run.use(pool.models)
            scorer = Scorer(
                criteria={name: resolve(name) for name in config.criteria},
                models=models,
                teacher=None if config.teacher is None else TeacherReader(models),
                verify=config.verify,
            )
            report.begin("reading the traces")
            traces, bad_rows = read_usable_traces(
                config.data,
                models.tokenizer("student"),
                max_length=models.max_sequence_length("student"),
                limit=config.limit,
                find_fault=scorer.find_fault,
            )
            report.note(describe_reading(traces, bad_rows))
            controls, notes = _choose_controls(scorer, traces)
            scorer = dataclasses.replace(scorer, criteria={**scorer.criteria, **controls})
            lost = _score(run, pool, scorer, traces, report)
        bad_rows += [f"{traces[place].where}: {reason}" for place, reason in sorted(lost.items())]
        traces = [trace for place, trace in enumerate(traces) if place not in lost]
        run.write_bad_rows(bad_rows)
        if not traces:
            raise WorkerError(f"no trace could be scored; {run.path('bad_rows.txt')} says why")
        return _evaluate(run, config, scorer, traces, bad_rows, notes)


def _check_judge(config: ScoreConfig) -> None:
    """Raise InputError where the criterion that picks has no values of the kind that the options of picking need."""
    pick, judge = config.pick, resolve(config.pick.by or config.criteria[0])
    if pick.weigh and not isinstance(judge, Lark):
        raise InputError("pick.weigh gives the weights of lark: list it first among the criteria, or pick by it")
    is_relative = isinstance(judge, PoolCriterion) and judge.pool == "prompt"
    if is_relative and (pick.threshold is not None or pick.best_share < 1.0):
        raise InputError(
            "pick.threshold and pick.best_share compare values of different prompts, and this criterion judges the "
            "responses to one prompt against each other"
        )


def _choose_controls(scorer: Scorer, traces: Sequence[Trace]) -> tuple[dict[str, AnyCriterion], list[str]]:
    """Return the controls that are not among the criteria, and sentences about those that cannot be computed."""
    names, notes = list(CONTROLS), []
    writers = {trace.teacher for trace in traces}
    known = sum(has_recorded(trace) for trace in traces)
    if scorer.teacher is not None or known == len(traces):
        names.append(TEACHER_CONTROL)
    elif TEACHER_CONTROL not in scorer.criteria:
        notes.append(
            f"no {TEACHER_CONTROL}: {format_count(len(traces) - known, 'response')} of {len(traces):,} came without "
            "the teacher's log-probabilities; give --teacher MODEL"
        )
    if scorer.teacher is None and len(writers) > 1 and (TEACHER_CONTROL in names or TEACHER_CONTROL in scorer.criteria):
        notes.append(
            f"{TEACHER_CONTROL} is each writer's own, of {format_count(len(writers), 'teacher')}, and does not compare "
            "them; give --teacher MODEL for that of one model"
        )
    return {name: resolve(name) for name in names if name not in scorer.criteria}, notes


def _score(run: Run, pool: Pool, scorer: Scorer, traces: Sequence[Trace], report: Progress) -> dict[int, str]:
    """Journal the features of every trace that is not in the journal yet; return why others could not be scored."""
    done = set(find_traces(run.done(), traces, run.journal_path))
    missing = {place: trace for place, trace in enumerate(traces) if place not in done}
    num_readers = 1 if scorer.teacher is None else 2
    report.begin(
        "", unit="traces", total=len(traces), done=len(done), engine=scorer.models, work="reading",
        to_read=num_readers * sum(trace.num_tokens for trace in missing.values()),
    )  # fmt: skip
    if pool.size > 1:
        missing = dict(sorted(missing.items(), key=lambda item: -item[1].num_tokens))
    work = ScoreWork(
        traces=missing,
        criteria=tuple(scorer.criteria),
        has_teacher=scorer.teacher is not None,
        verify=scorer.verify,
    )
    lost: dict[int, str] = {}
    for count, (place, outcome) in enumerate(pool.run(work), start=len(done) + 1):
        assert not isinstance(outcome, Stopped), "nothing limits the run"
        if isinstance(outcome, Lost):
            lost[place] = outcome.reason
        else:
            run.journal.append(outcome)
        report(count, len(traces))
    return lost


def _evaluate(
    run: Run,
    config: ScoreConfig,
    scorer: Scorer,
    traces: Sequence[Trace],
    bad_rows: Sequence[str],
    notes: Sequence[str],
) -> ScoreSummary:
    """Write what follows from the finished journal: columns, picked responses, the ranking of teachers, the page.

    notes: about controls that are missing. Raises InputError on a journal without the values of a control.
    """
    criteria, models = scorer.criteria, scorer.models
    rows = sort_by_trace(run.done(), traces, run.journal_path)
    missing = next((name for name in criteria if any(name not in row["features"] for row in rows)), None)
    if missing is not None:
        raise InputError(
            f"{run.journal_path} has no values of {missing}: an earlier version wrote it; choose another output_dir"
        )
    columns = {name: compute_values(criterion, name, rows) for name, criterion in criteria.items()}
    write_jsonl(run.path("scores.jsonl"), _score_rows(rows, columns))
    higher_is_better = {name: is_higher_better(criterion) for name, criterion in criteria.items()}
    selected = _write_selected(run, config, models, traces, rows, columns, higher_is_better)
    ranks, incomplete = rank_teachers(rows, criteria, columns)
    ranking = {name: [dataclasses.asdict(rank) for rank in ranked] for name, ranked in ranks.items()}
    write_json(run.path("teachers.json"), {"incomplete_prompts": incomplete, **ranking})
    # the page compares what every criterion would pick under the options that make sense for all
    shared = PickOptions(**{name: getattr(config.pick, name) for name in SHARED_PICK_OPTIONS})
    picks = {name: pick_responses(rows, column, higher_is_better[name], shared) for name, column in columns.items()}
    contested = [
        prompt
        for prompt, members in group_by_prompt(rows).items()
        if sum(map(config.pick.is_eligible, (rows[i] for i in members))) > 1
    ]
    comparison = compare(rows, columns, higher_is_better, picks, contested, selected)
    controls = compute_controls(rows, columns, higher_is_better, equal_length=config.equal_length, notes=notes)
    write_json(run.path("controls.json"), dataclasses.asdict(controls))
    write_text(run.path("report.html"), render_page(comparison, controls, rows, picks, ranks, config.student))
    summary = ScoreSummary(
        output_dir=run.output_dir,
        traces=len(rows),
        prompts=len({row["prompt"] for row in rows}),
        selected=len(selected),
        bad_rows=tuple(bad_rows),
        teachers=ranks,
        undecided=sum(row.get("undecided") is not None for row in rows),
        incomplete=incomplete,
        controls=controls,
    )
    counts = {name: getattr(summary, name) for name in ("traces", "prompts", "selected", "undecided")}
    run.write_summary({**counts, "bad_rows": len(bad_rows)})
    return summary


def _write_selected(
    run: Run,
    config: ScoreConfig,
    models: ModelFacts,
    traces: Sequence[Trace],
    rows: Sequence[Mapping[str, Any]],
    columns: Mapping[str, Sequence[float]],
    higher_is_better: Mapping[str, bool],
) -> list[int]:
    """Pick responses by `pick.by`, write them to selected.jsonl, and return their indices."""
    name = config.pick.by or config.criteria[0]
    tokenizer = models.tokenizer("student")
    selected = pick_responses(
        rows, columns[name], higher_is_better[name], config.pick, lambda i: tokenizer.decode(traces[i].response_ids)
    )
    weights = (
        compute_lark_weights(rows, columns[name], config.pick) if config.pick.weigh else dict.fromkeys(selected, 1.0)
    )
    write_jsonl(
        run.path("selected.jsonl"),
        (_training_row(models, traces[i], rows[i], name, columns[name][i], weights[i]) for i in selected),
    )
    return selected


def _score_rows(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, Sequence[float]]) -> Iterator[dict[str, Any]]:
    for i, row in enumerate(rows):
        described = {key: value for key, value in row.items() if key not in ("features", "ratios")}
        yield {**described, **{name: make_jsonable(column[i]) for name, column in columns.items()}}


def _training_row(
    models: ModelFacts, trace: Trace, scored: Mapping[str, Any], criterion: str, score: float, weight: float
) -> dict[str, Any]:
    """Return a row of selected.jsonl. scored: the trace's row of the journal, which has the verdict."""
    fields = make_training_row(trace, trace.response_ids, models.tokenizer("student"))
    verdict = {name: scored[name] for name in ("correct", "undecided")}
    return {**fields, **verdict, "criterion": criterion, "score": make_jsonable(score), "weight": weight}
