"""`genssd diagnose`: which distillation would help at which tokens, before anything is trained (2605.10889).

OUTPUT_DIR/run.json          the settings, model fingerprints and versions
OUTPUT_DIR/questions.jsonl   journal, one line per question: rollouts, nodes, log-probabilities, successes, cost
OUTPUT_DIR/nodes.jsonl       one line per node: success rates, ideal gradient, its variance, all alignments
OUTPUT_DIR/summary.json      the tables and the verdict
OUTPUT_DIR/diagnosis.html    a page to look at

    rollouts    the student answers every question a few times
    reading     the student and each teacher compute the rollouts' log-probabilities; nodes and candidates are chosen
    forcing     every candidate is forced at its node and the student completes it, question by question

Rollouts and reading cost little compared with forcing. A resumed run repeats them for the questions that are not done.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from genssd.distill.answers.forms import Verdict
from genssd.distill.answers.judge import AnswerJudge
from genssd.distill.data.problems import ProblemRow, check_same_problem, read_problems
from genssd.distill.diagnose.config import DiagnoseConfig
from genssd.distill.diagnose.contexts import build_prompt, read_contexts
from genssd.distill.diagnose.diagnosis import Diagnosis
from genssd.distill.diagnose.forcing import CompletionOptions, Question, Verify, force_nodes, succeeds
from genssd.distill.diagnose.page import render_page
from genssd.distill.diagnose.placement import place_nodes
from genssd.distill.diagnose.reading import Load, Models, NodeReading, ReadingOptions, read_nodes
from genssd.distill.diagnose.rows import Findings, QuestionSource, make_node_rows, make_question_row
from genssd.distill.diagnose.tables import build_diagnosis
from genssd.distill.diagnose.tokenizers import ReaderTokenizers
from genssd.distill.runs.journal import damaged_line, write_jsonl
from genssd.distill.runs.run import Run
from genssd.distill.runs.writing import write_text
from genssd.engine.chat_options import ChatOptions
from genssd.engine.checkpoint import locate
from genssd.engine.config import ModelConfig
from genssd.engine.engine import Engine
from genssd.engine.errors import CapacityError, InputError
from genssd.engine.generation import Completion
from genssd.engine.runner import Role
from genssd.engine.sampling import prompt_stream
from genssd.engine.text import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class DiagnoseProgress:
    """Progress of a run."""

    phase: Literal["rollouts", "reading", "forcing"]
    done: int
    """Number of questions that are done; in the phase "reading", of pairs of a reader and a question."""
    total: int
    completions: int = 0
    """Number of completions written for the current question, in the phase "forcing"."""
    budget: int = 0
    """Maximum number of completions per question."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DiagnoseSummary:
    """Result of a finished run."""

    output_dir: Path
    diagnosis: Diagnosis


Report = Callable[[DiagnoseProgress], None]
"""Function that takes the progress."""


def run_diagnose(
    config: DiagnoseConfig,
    load: Load | None = None,
    report: Report = lambda progress: None,
    verify: Verify | None = None,
) -> DiagnoseSummary:
    """Diagnose over a file of problems.

    load: returns the engine over a model, instead of loading one as the config says. verify: judges whether a response
    gives the reference answer, instead of `AnswerJudge`. Raises GenssdError on bad input; finished questions are in
    the journal.
    """
    problems = read_problems(config.data, config.limit, system_prompt=config.system_prompt)
    for problem in problems:
        if problem.answer is None:
            raise InputError(f"{problem.where}: no answer; a row needs answer, target or solution")
    with Run.open(config, "diagnose", journal="questions.jsonl") as run:
        contexts = read_contexts(config.data, config.contexts, config.limit)
        models = Models(_add_chat_options(_make_loader(config, run, load), run.chat_options))
        measurement = _Measurement(config, models, report, verify)
        _diagnose_questions(run, config, problems, contexts, measurement)
        return _summarise(run, config)


def _make_loader(config: DiagnoseConfig, run: Run, load: Load | None) -> Load:
    """Return the function that loads the engine over a model, with `load` or as the config says, and records it."""

    def load_as_configured(model: str, role: Role) -> Engine:
        return config.load(student=model) if role == "student" else config.load(teacher=model)

    return lambda model, role: run.use((load or load_as_configured)(model, role))


def _add_chat_options(load: Load, options: ChatOptions) -> Load:
    return lambda model, role: load(model, role).with_chat(options)


def _diagnose_questions(
    run: Run,
    config: DiagnoseConfig,
    problems: Sequence[ProblemRow],
    contexts: Sequence[Mapping[str, str]],
    measurement: _Measurement,
) -> None:
    """Journal a row for every question that is not in the journal yet."""
    tokenizers = ReaderTokenizers.load(config.student, config.teacher, run.chat_options)
    prompts = _encode_prompts(config, problems, contexts, tokenizers.by_model)
    done = _find_finished(run, config, problems, contexts)
    if len(done) == len(problems):
        return
    student_tokenizer = tokenizers.by_model[config.student]
    questions = _make_questions(config, problems, student_tokenizer)
    for q, findings in measurement.iter_findings(questions, done, prompts, tokenizers):
        source = QuestionSource(file=config.data, problem=problems[q.index], contexts=contexts[q.index])
        run.journal.append(make_question_row(q, source, findings, student_tokenizer))


def _summarise(run: Run, config: DiagnoseConfig) -> DiagnoseSummary:
    """Write what follows from the finished journal: nodes.jsonl, summary.json and the page."""
    run.record()
    rows = sorted(run.done(), key=lambda row: int(row["index"]))
    nodes = [node for row in rows for node in make_node_rows(row, config.losses, config.beta, config.alpha)]
    write_jsonl(run.path("nodes.jsonl"), nodes)
    diagnosis = build_diagnosis(
        rows, nodes, [reader.name for reader in config.readers()[1:]], config.losses, config.seed
    )
    run.write_summary(diagnosis.as_json())
    write_text(run.path("diagnosis.html"), render_page(diagnosis, rows, nodes, config.student, config.page_questions))
    return DiagnoseSummary(output_dir=run.output_dir, diagnosis=diagnosis)


def _encode_prompts(
    config: DiagnoseConfig,
    problems: Sequence[ProblemRow],
    contexts: Sequence[Mapping[str, str]],
    tokenizers: Mapping[str, Tokenizer],
) -> dict[tuple[str, int], list[int]]:
    """Return every reader's prompt for every question, by the reader's name and the question's index.

    Raises InputError and CapacityError naming the line.
    """
    positions = {model: ModelConfig.load(locate(model)).max_position_embeddings for model in tokenizers}
    prompts: dict[tuple[str, int], list[int]] = {}
    for reader in config.readers():
        for index, problem in enumerate(problems):
            prompt = build_prompt(reader, problem, contexts[index], config.templates)
            try:
                ids = prompts[reader.name, index] = tokenizers[reader.model].encode_prompt(prompt)
            except InputError as error:
                raise InputError(f"{problem.where}: {error}") from None
            student_room = positions[config.student] - len(prompts["itself", index])
            if len(ids) + min(config.max_tokens, max(student_room, 0)) > positions[reader.model]:
                raise CapacityError(
                    f"{problem.where}: the prompt of {reader.name!r} has {len(ids)} tokens, and "
                    f"with {config.max_tokens} of the response more than the {positions[reader.model]} positions of "
                    f"{reader.model}; lower max_tokens, or shorten the context"
                )
    return prompts


def _make_questions(config: DiagnoseConfig, problems: Sequence[ProblemRow], tokenizer: Tokenizer) -> list[Question]:
    seen: Counter[tuple[int, ...]] = Counter()
    questions = []
    for index, problem in enumerate(problems):
        ids = tuple(tokenizer.encode_prompt(problem.prompt))
        label = problem.where
        questions.append(
            Question(
                index=index, label=label, prompt=problem.prompt, prompt_ids=ids, occurrence=seen[ids],
                answer=problem.answer,
            )
        )  # fmt: skip
        seen[ids] += 1
    return questions


def _find_finished(
    run: Run, config: DiagnoseConfig, problems: Sequence[ProblemRow], contexts: Sequence[Mapping[str, str]]
) -> frozenset[int]:
    """Return the indices of the questions in the journal. Raises InputError when they are not of the data."""
    done: set[int] = set()
    for number, row in enumerate(run.done(), start=1):
        check_same_problem(row, problems, config.data, run.journal_path)
        index = row["index"]
        if index in done:
            raise damaged_line(run.journal_path, number, f"question {index} is also in an earlier line")
        if row.get("contexts") != contexts[index]:
            raise InputError(f"{config.data}: row {index} has other contexts than {run.journal_path} was begun with")
        done.add(index)
    return frozenset(done)


class _Measurement:
    """The phases of the questions that are not in the journal: rollouts, reading, forcing."""

    def __init__(self, config: DiagnoseConfig, models: Models, report: Report, verify: Verify | None) -> None:
        self._config = config
        self._models = models
        self._report = report
        self._verify = verify

    def iter_findings(
        self,
        questions: Sequence[Question],
        done: frozenset[int],
        prompts: Mapping[tuple[str, int], Sequence[int]],
        tokenizers: ReaderTokenizers,
    ) -> Iterator[tuple[Question, Findings]]:
        """Yield all questions but those whose indices are in `done`, in order, each as it is finished.

        questions: all of them, because equal prompts are distinguished by how many of them come before. prompts: the
        token ids of every reader's prompt, by the reader's name and the question's index. Raises InputError on a
        rollout with a token that a teacher does not have.
        """
        open_questions = self._write_rollouts(questions, done)
        for q in open_questions:
            tokenizers.check_rollouts(q)
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

        def report_reading(read: int, total: int) -> None:
            self._report(DiagnoseProgress(phase="reading", done=read, total=total))

        readings = read_nodes(
            self._models, config.readers(), open_questions, prompts, positions, options, report_reading
        )
        for q in open_questions:
            planned_nodes = sum(map(len, positions[q.index]))
            yield q, self._force(q, readings[q.index], planned_nodes, len(questions))

    def _student(self) -> Engine:
        return self._models.engine(self._config.student, "student")

    def _write_rollouts(self, questions: Sequence[Question], done: frozenset[int]) -> list[Question]:
        """Return the questions that are not done, with the student's rollouts."""
        config = self._config
        rollouts: dict[int, tuple[Completion, ...]] = {}
        generated = self._student().iter_generate(
            [q.prompt for q in questions],
            model="student",
            n=config.rollouts,
            sampling=config.sampling,
            max_tokens=config.max_tokens,
            seed=config.seed,
            skip=done,
            labels=[q.label for q in questions],
        )
        for outcome in generated:
            rollouts[outcome.index] = tuple(outcome.completions)
            self._report(DiagnoseProgress(phase="rollouts", done=len(done) + len(rollouts), total=len(questions)))
        return [dataclasses.replace(q, rollouts=rollouts[q.index]) for q in questions if q.index not in done]

    def _choose_positions(self, question: Question) -> list[list[int]]:
        """Return the positions of every rollout's nodes, the ones that the budget should cover first."""
        stream = prompt_stream(self._config.seed, question.prompt_ids, question.occurrence)
        return [
            place_nodes(len(rollout.token_ids), self._config.nodes_per_window, np.random.default_rng([stream, i]))
            for i, rollout in enumerate(question.rollouts)
        ]

    def _force(self, question: Question, readings: Sequence[NodeReading], planned_nodes: int, total: int) -> Findings:
        """Force every candidate at every node of a question. total: the number of questions, for the progress."""
        config = self._config
        options = CompletionOptions(
            completions=config.completions, sampling=config.sampling, max_tokens=config.max_tokens, seed=config.seed
        )

        def report_forcing(completions: int) -> None:
            self._report(
                DiagnoseProgress(
                    phase="forcing", done=question.index, total=total, completions=completions, budget=config.budget
                )
            )

        report_forcing(0)
        nodes = [reading.node for reading in readings]
        verify = self._verify or AnswerJudge(self._student().tokenizer("student")).for_prompt(question.prompt_ids)
        outcomes, cost = force_nodes(self._student(), question, nodes, verify, options, report_forcing)
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
