"""`genssd select`: problems in, a crash-safe journal of selected trajectories out.

OUTPUT_DIR/run.json           the settings, model fingerprints and versions
OUTPUT_DIR/calibration.json   the threshold that was taken from data, if it was
OUTPUT_DIR/selections.jsonl   one line per finished prompt: what training reads
OUTPUT_DIR/decisions.jsonl    the same prompts in the same order: every candidate, its scores and its verdict
OUTPUT_DIR/teacher_topk.bin   the teacher's most likely tokens along each best trajectory, with --teacher-topk
OUTPUT_DIR/teacher_states.bin  its last hidden states along them, with --teacher-states
OUTPUT_DIR/metrics.jsonl      what the models have done after every few prompts
OUTPUT_DIR/bad_rows.txt       what could not be used or did not fit, by file and line
OUTPUT_DIR/summary.json       counts of prompts, statuses and tokens; accuracy where reference answers are known

A prompt's decisions, top k and states are on disk before its selection: where there is a selection line, nothing is
missing.
"""

from __future__ import annotations

import dataclasses
from collections import Counter

from genssd.distill.data.problems import ProblemSet, describe_problems, read_usable_problems
from genssd.distill.data.response_limits import ResponseLimits
from genssd.distill.pool.pool import Lost, Pool, Stopped
from genssd.distill.runs.clusters import on_cluster
from genssd.distill.runs.engine_metrics import EngineMetrics
from genssd.distill.runs.journal import write_json
from genssd.distill.runs.metrics import check_monitor
from genssd.distill.runs.model_sampling import choose_sampling
from genssd.distill.runs.output_files import JOURNALS
from genssd.distill.runs.pools import open_pool
from genssd.distill.runs.progress import SILENT, Progress
from genssd.distill.runs.run import Run
from genssd.distill.runs.served_teacher import count_server_use, describe_server_use, find_fingerprints
from genssd.distill.runs.teacher_options import list_teachers
from genssd.distill.select.beginning import check_search, report_thinking
from genssd.distill.select.calibration import Calibration, calibrate
from genssd.distill.select.chunk_choice import SETTING, choose_chunk
from genssd.distill.select.config import SelectConfig
from genssd.distill.select.resuming import keep_complete
from genssd.distill.select.search_files import SearchFiles
from genssd.distill.select.summary import SearchEnd, SelectSummary, summarise
from genssd.distill.select.unfit import ReadableProblems, leave_out_unfit
from genssd.distill.select.work import ROLES, SearchWork
from genssd.engine.common.errors import InputError
from genssd.engine.criteria.criterion_names import resolve
from genssd.engine.engine import Engine
from genssd.engine.search.budget import Budget


@on_cluster
def run_select(config: SelectConfig, engine: Engine | None = None, report: Progress = SILENT) -> SelectSummary:
    """Select over a file of problems. engine: a loaded engine to use instead of loading the config's models.

    Raises GenssdError on bad input; prompts that were finished before are in the journal.
    """
    check_search(config, list_teachers(config.teacher), config.student)  # before anything is read or loaded
    check_monitor(config.report_to)
    config = choose_sampling(config, list_teachers(config.teacher)[0], "teacher", engine)
    data = read_usable_problems(
        config.data, config.limit, system_prompt=config.system_prompt, shard=config.shard, offset=config.offset
    )
    if config.calibrate.data is not None and not config.resume:
        _read_calibration_data(config)  # before any model is loaded
    fingerprints = find_fingerprints(config, config.teacher, engine)
    with Run.open(config, "select", journal=JOURNALS["select"], fingerprints=fingerprints, chosen=(SETTING,)) as run:
        done = keep_complete(run, data.problems, config.data)
        report.note(describe_problems(data.problems, config.data, len(done), bad_rows=len(data.faults)))
        left = len(data.problems) - len(done)
        with open_pool(
            config, engine, run.chat_options, teacher=config.teacher, student=config.student, items=left, report=report
        ) as pool:
            run.use(pool.models)
            readable = leave_out_unfit(data, pool.models, ROLES, resolve(config.criterion), config.criterion)
            report_thinking(pool.models, readable)
            config = choose_chunk(config, run, pool, readable.data.problems, report)
            calibration = None if config.calibrate.data is None else _calibrate(pool, config, run, report)
            end = _Search(run, config, pool, readable, done, calibration).run(report)
            server_use, line = count_server_use(pool.models), describe_server_use(pool.models)
        summary = summarise(run, end, readable.data, calibration)
        run.write_bad_rows(summary.bad_rows)
        run.write_summary({**summary.as_json(), **server_use})
        if line is not None:
            report.note(line)
    return summary


class _Search:
    """The search over the prompts that are not done."""

    def __init__(
        self,
        run: Run,
        config: SelectConfig,
        pool: Pool,
        readable: ReadableProblems,
        done: frozenset[int],
        calibration: Calibration | None,
    ) -> None:
        for one in pool.models.teachers:
            for name in ("teacher_topk", "teacher_states"):
                if getattr(config, name) and not one.reader.is_identity:
                    raise InputError(f"{name} needs models whose tokens are the same: {one.reader.describe()}")
        self._run = run
        self._config = config
        self._pool = pool
        self._problems = readable.data.problems
        self._done = readable.find_done(done)
        ResponseLimits.of(pool.models, ROLES, config.max_tokens).warn_of_shortage(readable.list_lengths(done))
        self._work = SearchWork(
            problems=self._problems,
            items=[place for place in range(len(self._problems)) if place not in self._done],
            options=config,
            threshold=config.threshold if calibration is None else calibration.threshold,
            data=config.data,
            teachers=list_teachers(config.teacher),
            student=config.student,
            teacher_states=config.teacher_states,
            peek=config.peek,
        )

    def run(self, report: Progress) -> SearchEnd:
        """Journal each prompt as it ends; return why others failed, and what the budget leaves unfinished."""
        end, models = SearchEnd(), self._pool.models
        budget = self._find_budget()
        if budget is None:
            end.stopped_by, end.unfinished = "total_budget.tokens", len(self._problems) - len(self._done)
            return end
        report.begin(
            "", unit="prompts", total=len(self._problems), done=len(self._done), engine=models, work="writing",
            budget=budget,
        )  # fmt: skip
        noted: Counter[str] = Counter()
        sampled_before = models.usage.sampled_tokens
        sampled_of_ended = 0
        ended = len(self._done)
        with (
            SearchFiles.open(self._run, self._config, models) as files,
            EngineMetrics.open(self._config, self._run, "select", models, total=len(self._problems)) as metrics,
        ):
            for place, outcome in self._pool.run(self._work, budget):
                problem = self._problems[place]
                if isinstance(outcome, Stopped):
                    end.stopped_by = outcome.by
                    end.unfinished += 1
                    continue
                verdicts: list[bool | None] = []
                if isinstance(outcome, Lost):
                    end.failures[problem.index] = f"{problem.where}: {outcome.reason}"
                elif outcome.error is not None:
                    end.failures[problem.index] = f"{problem.where}: {outcome.error}"
                    if outcome.missing_token is not None:
                        end.missing_tokens[outcome.missing_token] += 1
                else:
                    files.append(outcome)
                    noted.update(outcome.special)
                    verdicts = [outcome.correct]
                sampled_of_ended += 0 if isinstance(outcome, Lost) else outcome.tokens_sampled
                ended += 1
                metrics.finish(ended, verdicts)
                report(ended, len(self._problems), ", ".join(f"{count} {name}" for name, count in noted.items()))
        if files.states is not None:
            report.note(files.states.describe())
        if end.stopped_by is not None:
            end.tokens_dropped = models.usage.sampled_tokens - sampled_before - sampled_of_ended
        return end

    def _find_budget(self) -> Budget | None:
        """Return what earlier parts of the run leave of the budget; None where prompts are left and no tokens."""
        total = self._config.total_budget
        if total.tokens is None or len(self._done) == len(self._problems):
            return dataclasses.replace(total, tokens=None)
        left = total.tokens - sum(row["tokens_sampled"] for row in self._run.done())
        return dataclasses.replace(total, tokens=left) if left > 0 else None


def _read_calibration_data(config: SelectConfig) -> ProblemSet:
    assert config.calibrate.data is not None
    return read_usable_problems(config.calibrate.data, config.calibrate.limit, system_prompt=config.system_prompt)


def _calibrate(pool: Pool, config: SelectConfig, run: Run, report: Progress) -> Calibration:
    """Return the calibration of this run, which is measured once and read again when the run is resumed."""
    path = run.path("calibration.json")
    if run.resumed:
        return Calibration.read(path)
    report.begin("calibrating the threshold", engine=pool.models, work="writing")
    calibration = calibrate(pool, _read_calibration_data(config), config, fraction=config.calibrate.share)
    run.record()
    write_json(path, calibration.as_json())
    return calibration
