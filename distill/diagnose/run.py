"""`genssd diagnose`: which distillation would help at which tokens, before anything is trained (2605.10889).

OUTPUT_DIR/run.json          the settings, model fingerprints and versions
OUTPUT_DIR/questions.jsonl   journal, one line per question: rollouts, nodes, log-probabilities, successes, cost
OUTPUT_DIR/nodes.jsonl       one line per node: success rates, ideal gradient, its variance, all alignments
OUTPUT_DIR/weighted_rows.jsonl  rollouts as rows for `genssd train`, with the weights of their tokens (weighted_rows.py)
OUTPUT_DIR/bad_rows.txt      what could not be used or did not fit, by file and line
OUTPUT_DIR/summary.json      the tables and the verdict
OUTPUT_DIR/diagnosis.html    a page to look at

    rollouts    the student answers every question a few times
    reading     the student and each teacher compute the rollouts' log-probabilities; nodes and candidates are chosen
    forcing     every candidate is forced at its node and the student completes it, question by question

Rollouts and reading cost little compared with forcing. A resumed run repeats them for the questions that are not done.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from genssd.distill.data.problems import describe_problems
from genssd.distill.data.response_limits import ResponseLimits
from genssd.distill.diagnose.config import DiagnoseConfig
from genssd.distill.diagnose.diagnosis import Diagnosis
from genssd.distill.diagnose.forcing import NodeReading, Question, Verify
from genssd.distill.diagnose.model_pools import Load, ModelPools, check_in_processes, make_opener
from genssd.distill.diagnose.page import render_page
from genssd.distill.diagnose.placement import place_nodes
from genssd.distill.diagnose.questions import (
    QuestionData,
    encode_prompts,
    find_done,
    make_questions,
    read_question_data,
)
from genssd.distill.diagnose.reading import ReadingOptions, RolloutReaders
from genssd.distill.diagnose.rows import Findings, QuestionSource, Row, make_node_rows, make_question_row
from genssd.distill.diagnose.tables import build_diagnosis
from genssd.distill.diagnose.tokenizers import ReaderTokenizers
from genssd.distill.diagnose.weighted_rows import WEIGHTED_ROWS_FILE, make_weighted_rows
from genssd.distill.diagnose.works import ForcingWork, RolloutWork
from genssd.distill.pool.pool import Lost, Pool, Stopped
from genssd.distill.runs.clusters import on_cluster
from genssd.distill.runs.journal import write_jsonl
from genssd.distill.runs.model_sampling import choose_sampling
from genssd.distill.runs.output_files import JOURNALS
from genssd.distill.runs.progress import SILENT, Progress
from genssd.distill.runs.run import Run
from genssd.distill.runs.writing import write_text
from genssd.engine.calls.generation import Completion
from genssd.engine.checkpoints.checkpoint import locate
from genssd.engine.common.amounts import format_count
from genssd.engine.common.errors import WorkerError
from genssd.engine.models.sampling import prompt_stream
from genssd.engine.texts.text import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class DiagnoseSummary:
    """Result of a finished run."""

    output_dir: Path
    diagnosis: Diagnosis
    bad_rows: tuple[str, ...]
    """Rows of the data that could not be used, and why."""


@on_cluster
def run_diagnose(
    config: DiagnoseConfig,
    load: Load | None = None,
    report: Progress = SILENT,
    verify: Verify | None = None,
) -> DiagnoseSummary:
    """Diagnose over a file of problems.

    load: returns the engine over a model, instead of loading one as the config says. verify: judges whether a response
    gives the reference answer, instead of `AnswerJudge`. Raises GenssdError on bad input; finished questions are in
    the journal.
    """
    check_in_processes(config, load, verify)
    config = choose_sampling(config, config.student, "student")
    data = read_question_data(config)
    with (
        Run.open(config, "diagnose", journal=JOURNALS["diagnose"]) as run,
        ModelPools(make_opener(config, run, load, report)) as models,
    ):
        measurement = _Measurement(config, models, report, verify)
        bad_rows = _diagnose_questions(run, config, data, measurement)
        return _summarise(run, config, bad_rows)


def _diagnose_questions(
    run: Run, config: DiagnoseConfig, data: QuestionData, measurement: _Measurement
) -> tuple[str, ...]:
    """Journal a row for every question that is not in the journal yet; return the rows that could not be used."""
    tokenizers = ReaderTokenizers.load(config.student, config.teacher, run.chat_options)
    data, prompts = encode_prompts(config, data, tokenizers.by_model)
    problems = {problem.index: problem for problem in data.usable.problems}
    done = find_done(run, config, data)
    measurement.report.note(
        describe_problems(data.usable.problems, config.data, len(done), bad_rows=len(data.usable.faults))
    )
    failures: dict[int, str] = {}
    if len(done) < len(problems):
        student_tokenizer = tokenizers.by_model[config.student]
        questions = make_questions(data.usable.problems, student_tokenizer)
        for q, findings in measurement.iter_findings(questions, done, prompts, tokenizers, failures):
            source = QuestionSource(file=config.data, problem=problems[q.index], contexts=data.contexts[q.index])
            run.journal.append(make_question_row(q, source, findings, student_tokenizer))
    return data.usable.list_bad_rows(failures)


def _summarise(run: Run, config: DiagnoseConfig, bad_rows: Sequence[str]) -> DiagnoseSummary:
    """Write what follows from the finished journal: nodes.jsonl, summary.json and the page."""
    run.record()
    rows = sorted(run.done(), key=lambda row: int(row["index"]))
    if not rows:
        run.write_bad_rows(bad_rows)
        raise WorkerError(f"no question could be diagnosed; {run.path('bad_rows.txt')} says why")
    nodes = [node for row in rows for node in make_node_rows(row, config.losses, config.beta, config.alpha)]
    write_jsonl(run.path("nodes.jsonl"), nodes)
    if config.teacher:
        write_jsonl(run.path(WEIGHTED_ROWS_FILE), _weigh_rows(config, rows, nodes))
    run.write_bad_rows(bad_rows)
    diagnosis = build_diagnosis(
        rows, nodes, [reader.name for reader in config.readers()[1:]], config.losses, config.seed
    )
    run.write_summary({**diagnosis.as_json(), "bad_rows": len(bad_rows)})
    write_text(run.path("diagnosis.html"), render_page(diagnosis, rows, nodes, config.student, config.page_questions))
    return DiagnoseSummary(output_dir=run.output_dir, diagnosis=diagnosis, bad_rows=tuple(bad_rows))


def _weigh_rows(config: DiagnoseConfig, rows: Sequence[Row], nodes: Sequence[Row]) -> list[dict[str, Any]]:
    """Return the rows for training that follow from the first teacher's alignment."""
    teacher = next(reader.name for reader in config.readers() if reader.role == "teacher")
    tokenizer = Tokenizer(locate(config.student)).fingerprint
    by_question = {index: list(group) for index, group in groupby(nodes, key=lambda node: node["index"])}
    return [
        weighted
        for row in rows
        for weighted in make_weighted_rows(
            row,
            by_question.get(row["index"], []),
            teacher=teacher,
            loss=config.weights_loss or config.losses[0],
            rule=config.node_weights,
            tokenizer=tokenizer,
        )
    ]


class _Measurement:
    """The phases of the questions that are not in the journal: rollouts, reading, forcing."""

    def __init__(self, config: DiagnoseConfig, models: ModelPools, report: Progress, verify: Verify | None) -> None:
        self._config = config
        self._models = models
        self.report = report
        self._verify = verify

    def iter_findings(
        self,
        questions: Sequence[Question],
        done: frozenset[int],
        prompts: Mapping[tuple[str, int], Sequence[int]],
        tokenizers: ReaderTokenizers,
        failures: dict[int, str],
    ) -> Iterator[tuple[Question, Findings]]:
        """Yield the questions that are not done, each as it is finished.

        questions: all of them, because equal prompts are distinguished by how many of them come before. prompts: the
        token ids of every reader's prompt, by the reader's name and the question's index. failures: gets why questions
        did not fit, were given up, or have a rollout with a token that a teacher does not have, by their indices.
        """
        written = self._write_rollouts(questions, done, failures)
        unreadable = {q.index: fault for q in written if (fault := tokenizers.find_fault(q)) is not None}
        failures.update(unreadable)
        open_questions = [q for q in written if q.index not in unreadable]
        if not open_questions:
            return
        positions = {q.index: self._choose_positions(q) for q in open_questions}
        config = self._config
        options = ReadingOptions(
            top_k=config.top_k,
            teacher_top_k=config.teacher_top_k,
            min_probability=config.min_probability,
            completions=config.completions,
            budget=config.budget,
            end_ids=tokenizers.by_model[config.student].end_token_ids,
            excluded_ids=tokenizers.excluded_ids,
        )
        readers = RolloutReaders(
            self._models, config.readers(), open_questions, prompts, positions, failures, self.report
        )
        readings = readers.read(options)
        yield from self._force(open_questions, readings, positions, (len(done), len(questions)), failures)

    def _open_student(self, questions: int) -> Pool:
        return self._models.pool(self._config.student, "student", questions)

    def _write_rollouts(
        self, questions: Sequence[Question], done: frozenset[int], failures: dict[int, str]
    ) -> list[Question]:
        """Return the questions that are not done, with the student's rollouts; note those that do not fit."""
        config = self._config
        places = [place for place, q in enumerate(questions) if q.index not in done]
        pool = self._open_student(len(places))
        limits = ResponseLimits.of(pool.models, ("student",), config.max_tokens)
        limits.warn_of_shortage([{"student": len(questions[place].prompt_ids)} for place in places])
        rollouts: dict[int, tuple[Completion, ...]] = {}
        self.report.begin(
            "rollouts", unit="questions", total=len(questions), done=len(done), engine=pool.models, work="writing"
        )
        work = RolloutWork(questions=questions, items=places, config=config)
        for finished, (place, outcome) in enumerate(pool.run(work), start=len(done) + 1):
            assert not isinstance(outcome, Stopped), "nothing limits the run"
            q = questions[place]
            if isinstance(outcome, tuple):
                rollouts[q.index] = outcome
            else:
                failures[q.index] = f"{q.label}: {outcome.reason if isinstance(outcome, Lost) else outcome}"
            self.report(finished, len(questions))
        return [dataclasses.replace(q, rollouts=rollouts[q.index]) for q in questions if q.index in rollouts]

    def _choose_positions(self, question: Question) -> list[list[int]]:
        """Return the positions of every rollout's nodes, the ones that the budget should cover first."""
        stream = prompt_stream(self._config.seed, question.prompt_ids, question.occurrence)
        return [
            place_nodes(len(rollout.token_ids), self._config.nodes_per_window, np.random.default_rng([stream, i]))
            for i, rollout in enumerate(question.rollouts)
        ]

    def _force(
        self,
        questions: Sequence[Question],
        readings: Mapping[int, Sequence[NodeReading]],
        positions: Mapping[int, Sequence[Sequence[int]]],
        counts: tuple[int, int],
        failures: dict[int, str],
    ) -> Iterator[tuple[Question, Findings]]:
        """Yield the questions that were read with what forcing shows of them; note those that were given up.

        counts: number of questions done before, and of all.
        """
        finished, total = counts
        by_index = {q.index: q for q in questions if q.index in readings}
        pool = self._open_student(len(by_index))
        self.report.begin("forced tokens", unit="questions", total=total, done=finished, engine=pool.models)

        def report_completions(_: int, completions: int) -> None:
            budget = format_count(self._config.budget, "completion")
            self.report(finished, total, f"{completions} of at most {budget} of the next one")

        work = ForcingWork(
            questions=by_index,
            items=list(by_index),
            readings=readings,
            planned_nodes={index: sum(map(len, positions[index])) for index in by_index},
            config=self._config,
            verify=self._verify,
        )
        if pool.is_own_process:
            work = dataclasses.replace(work, report=report_completions)
        for index, outcome in pool.run(work):
            assert not isinstance(outcome, Stopped), "nothing limits the run"
            finished += 1
            if isinstance(outcome, Lost):
                failures[index] = f"{by_index[index].label}: {outcome.reason}"
            else:
                yield by_index[index], outcome
            self.report(finished, total)
