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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from genssd.distill.answers.forms import Verdict
from genssd.distill.answers.judge import AnswerJudge
from genssd.distill.data.problems import describe_problems
from genssd.distill.data.response_limits import ResponseLimits
from genssd.distill.diagnose.config import DiagnoseConfig
from genssd.distill.diagnose.diagnosis import Diagnosis
from genssd.distill.diagnose.forcing import CompletionOptions, Question, Verify, force_nodes, succeeds
from genssd.distill.diagnose.page import render_page
from genssd.distill.diagnose.placement import place_nodes
from genssd.distill.diagnose.questions import (
    QuestionData,
    encode_prompts,
    find_done,
    make_questions,
    read_question_data,
)
from genssd.distill.diagnose.reading import Load, Models, NodeReading, ReadingOptions, read_nodes
from genssd.distill.diagnose.rows import Findings, QuestionSource, Row, make_node_rows, make_question_row
from genssd.distill.diagnose.tables import build_diagnosis
from genssd.distill.diagnose.tokenizers import ReaderTokenizers
from genssd.distill.diagnose.weighted_rows import WEIGHTED_ROWS_FILE, make_weighted_rows
from genssd.distill.runs.engines import load_engine
from genssd.distill.runs.journal import write_jsonl
from genssd.distill.runs.model_sampling import choose_sampling
from genssd.distill.runs.progress import SILENT, Progress
from genssd.distill.runs.run import Run
from genssd.distill.runs.writing import write_text
from genssd.engine.amounts import format_count
from genssd.engine.chat_options import ChatOptions
from genssd.engine.checkpoint import locate
from genssd.engine.engine import Engine
from genssd.engine.generation import Completion
from genssd.engine.model_choices import Role
from genssd.engine.sampling import prompt_stream
from genssd.engine.text import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class DiagnoseSummary:
    """Result of a finished run."""

    output_dir: Path
    diagnosis: Diagnosis
    bad_rows: tuple[str, ...]
    """Rows of the data that could not be used, and why."""


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
    config = choose_sampling(config, config.student, "student")
    data = read_question_data(config)
    with Run.open(config, "diagnose", journal="questions.jsonl") as run:
        models = Models(_add_chat_options(_make_loader(config, run, load, report), run.chat_options))
        measurement = _Measurement(config, models, report, verify)
        bad_rows = _diagnose_questions(run, config, data, measurement)
        return _summarise(run, config, bad_rows)


def _make_loader(config: DiagnoseConfig, run: Run, load: Load | None, report: Progress) -> Load:
    """Return the function that loads the engine over a model, with `load` or as the config says, and records it."""

    def load_as_configured(model: str, role: Role) -> Engine:
        names = {"student": model} if role == "student" else {"teacher": model}
        return load_engine(config, **names, report=report)

    return lambda model, role: run.use((load or load_as_configured)(model, role))


def _add_chat_options(load: Load, options: ChatOptions) -> Load:
    return lambda model, role: load(model, role).with_chat(options)


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

    def __init__(self, config: DiagnoseConfig, models: Models, report: Progress, verify: Verify | None) -> None:
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
        """Yield the questions that are not done, in order, each as it is finished.

        questions: all of them, because equal prompts are distinguished by how many of them come before. prompts: the
        token ids of every reader's prompt, by the reader's name and the question's index. failures: gets why questions
        did not fit, or have a rollout with a token that a teacher does not have, by their indices.
        """
        written = self._write_rollouts(questions, done, failures)
        unreadable = {q.index: fault for q in written if (fault := tokenizers.find_fault(q)) is not None}
        failures.update(unreadable)
        open_questions = [q for q in written if q.index not in unreadable]
        positions = {q.index: self._choose_positions(q) for q in open_questions}
        config = self._config
        options = ReadingOptions(
            top_k=config.top_k,
            teacher_top_k=config.teacher_top_k,
            min_probability=config.min_probability,
            completions=config.completions,
            budget=config.budget,
            end_ids=self._student().tokenizer("student").end_token_ids,
            excluded_ids=tokenizers.excluded_ids,
        )
        readings = read_nodes(self._models, config.readers(), open_questions, prompts, positions, options, self.report)
        self.report.begin(
            "forced tokens", unit="questions", total=len(questions), done=len(done), engine=self._student()
        )
        for finished, q in enumerate(open_questions, start=len(done)):
            planned_nodes = sum(map(len, positions[q.index]))
            report_forcing = partial(self._report_forcing, finished, len(questions))
            yield q, self._force(q, readings[q.index], planned_nodes, report_forcing)

    def _report_forcing(self, finished: int, total: int, completions: int) -> None:
        """Report the finished questions, and the completions written for the one that is running."""
        self.report(
            finished,
            total,
            f"{completions} of at most {format_count(self._config.budget, 'completion')} of the next one",
        )

    def _student(self) -> Engine:
        return self._models.engine(self._config.student, "student")

    def _write_rollouts(
        self, questions: Sequence[Question], done: frozenset[int], failures: dict[int, str]
    ) -> list[Question]:
        """Return the questions that are not done, with the student's rollouts; note those that do not fit."""
        config = self._config
        student = self._student()
        limits = ResponseLimits.of(student, ("student",), config.max_tokens)
        limits.warn_of_shortage([{"student": len(q.prompt_ids)} for q in questions if q.index not in done])
        rollouts: dict[int, tuple[Completion, ...]] = {}
        self.report.begin(
            "rollouts", unit="questions", total=len(questions), done=len(done), engine=student, work="writing"
        )
        generated = student.iter_generate(
            [q.prompt for q in questions],
            model="student",
            n=config.rollouts,
            sampling=config.sampling,
            max_tokens=config.max_tokens,
            seed=config.seed,
            skip=frozenset(place for place, q in enumerate(questions) if q.index in done),
            labels=[q.label for q in questions],
        )
        for outcome in generated:
            q = questions[outcome.index]
            if outcome.error is None:
                rollouts[q.index] = tuple(outcome.completions)
            else:
                failures[q.index] = f"{q.label}: {outcome.error}"
            self.report(len(done) + len(rollouts) + len(failures), len(questions))
        return [dataclasses.replace(q, rollouts=rollouts[q.index]) for q in questions if q.index in rollouts]

    def _choose_positions(self, question: Question) -> list[list[int]]:
        """Return the positions of every rollout's nodes, the ones that the budget should cover first."""
        stream = prompt_stream(self._config.seed, question.prompt_ids, question.occurrence)
        return [
            place_nodes(len(rollout.token_ids), self._config.nodes_per_window, np.random.default_rng([stream, i]))
            for i, rollout in enumerate(question.rollouts)
        ]

    def _force(
        self, question: Question, readings: Sequence[NodeReading], planned_nodes: int, report: Callable[[int], None]
    ) -> Findings:
        """Force every candidate at every node of a question. report: takes the number of completions written."""
        config = self._config
        options = CompletionOptions(
            completions=config.completions, sampling=config.sampling, max_tokens=config.max_tokens, seed=config.seed
        )

        report(0)
        nodes = [reading.node for reading in readings]
        verify = self._verify or AnswerJudge(self._student().tokenizer("student")).for_prompt(question.prompt_ids)
        outcomes, cost = force_nodes(self._student(), question, nodes, verify, options, report)
        verdicts: dict[str, Verdict] = {}
        correct = [succeeds(rollout, question.answer, verify, verdicts) for rollout in question.rollouts]
        return Findings(
            correct=correct,
            undecided=[verdicts[r.text].undecided if r.text in verdicts else None for r in question.rollouts],
            planned_nodes=planned_nodes,
            readings=readings,
            outcomes=outcomes,
            completions=config.completions,
            cost=cost,
        )
