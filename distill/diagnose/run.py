"""`genssd diagnose`: where which distillation would help, before anything is trained (2605.10889).

OUTPUT_DIR/run.json          the settings, model fingerprints and versions
OUTPUT_DIR/questions.jsonl   journal, one line per question: rollouts, nodes, log-probabilities, successes, cost
OUTPUT_DIR/nodes.jsonl       one line per node: success rates, ideal gradient, its variance, all alignments
OUTPUT_DIR/summary.json      the tables and the verdict
OUTPUT_DIR/diagnosis.html    a page to look at

    rollouts    the student answers every question a few times
    reading     the student and each teacher read them; nodes and candidate tokens are chosen
    forcing     at every node each candidate is put in place, and the student goes on: question by question

Rollouts and reading cost little beside forcing, and are done again for what a resumed run still has to do.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from genssd.distill.data.answers import is_correct
from genssd.distill.data.problems import ProblemRow, check_same_problem, read_problems
from genssd.distill.diagnose.config import DiagnoseConfig
from genssd.distill.diagnose.contexts import build_prompt, read_contexts
from genssd.distill.diagnose.diagnosis import Diagnosis
from genssd.distill.diagnose.forcing import CompletionOptions, Question, Verify, force_nodes, succeeds
from genssd.distill.diagnose.page import render_page
from genssd.distill.diagnose.placement import place_nodes
from genssd.distill.diagnose.reading import Load, Models, ReadingOptions, read_nodes
from genssd.distill.diagnose.rows import Findings, QuestionSource, make_node_rows, make_question_row
from genssd.distill.diagnose.tables import diagnose
from genssd.distill.runs.journal import write_jsonl, write_text
from genssd.distill.runs.run import Run
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
    """How far a run is. completions: written for the question at work, of at most `budget`."""

    phase: Literal["rollouts", "reading", "forcing"]
    done: int
    total: int
    completions: int = 0
    budget: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class DiagnoseSummary:
    """What a run left behind."""

    output_dir: Path
    diagnosis: Diagnosis


Report = Callable[[DiagnoseProgress], None]


def run_diagnose(
    config: DiagnoseConfig,
    load: Load | None = None,
    report: Report = lambda progress: None,
    verify: Verify = is_correct,
) -> DiagnoseSummary:
    """Diagnose over a file of problems. load: the engine over a model, instead of loading one. verify: whether a
    response gives an answer. Raises GenssdError on bad input; finished questions are in the journal."""
    problems = read_problems(config.data, config.limit)
    for problem in problems:
        if problem.answer is None:
            raise InputError(f"{config.data}, line {problem.line}: no answer; a row needs answer, target or solution")
    with Run.open(config, "diagnose", journal="questions.jsonl") as run:
        tokenizers = _tokenizers(config)
        contexts = read_contexts(config.data, config.contexts, config.limit)
        _diagnose_questions(
            run, config, problems, contexts, tokenizers, Models(load or _loader(config)), report, verify
        )
        return _summarise(run, config)


def _loader(config: DiagnoseConfig) -> Load:
    def load(model: str, role: Role) -> Engine:
        return config.load(student=model) if role == "student" else config.load(teacher=model)

    return load


def _diagnose_questions(
    run: Run,
    config: DiagnoseConfig,
    problems: Sequence[ProblemRow],
    contexts: Sequence[Mapping[str, str]],
    tokenizers: Mapping[str, Tokenizer],
    models: Models,
    report: Report,
    verify: Verify,
) -> None:
    """Journal a row for every question that is not in the journal yet."""
    prompts = _prompts(config, problems, contexts, tokenizers)
    done = _finished(run, config, problems, contexts)
    if done == len(problems):
        return
    questions = _questions(config, problems, tokenizers[config.student])
    for q, findings in _work(config, models, questions, done, prompts, report, verify):
        source = QuestionSource(file=config.data, problem=problems[q.index], contexts=contexts[q.index])
        run.journal.append(make_question_row(q, source, findings, tokenizers[config.student]))


def _summarise(run: Run, config: DiagnoseConfig) -> DiagnoseSummary:
    """Write what follows from the finished journal: nodes.jsonl, summary.json and the page."""
    rows = list(run.done())
    nodes = [node for row in rows for node in make_node_rows(row, config.losses, config.beta, config.alpha)]
    write_jsonl(run.path("nodes.jsonl"), nodes)
    diagnosis = diagnose(rows, nodes, [reader.name for reader in config.readers()[1:]], config.losses, config.seed)
    run.write_summary(diagnosis.as_json())
    write_text(run.path("diagnosis.html"), render_page(diagnosis, rows, nodes, config.student, config.page_questions))
    return DiagnoseSummary(output_dir=run.output_dir, diagnosis=diagnosis)


def _tokenizers(config: DiagnoseConfig) -> dict[str, Tokenizer]:
    """Of every model. Raises InputError when a teacher's differs from the student's."""
    tokenizers = {model: Tokenizer(locate(model)) for model in (config.student, *config.teacher)}
    for model, tokenizer in tokenizers.items():
        if tokenizer.fingerprint != tokenizers[config.student].fingerprint:
            raise InputError(
                f"teacher {model} and student {config.student} have different vocabularies; a teacher reads the "
                "student's token ids, so it needs the same tokenizer"
            )
    return tokenizers


def _prompts(
    config: DiagnoseConfig,
    problems: Sequence[ProblemRow],
    contexts: Sequence[Mapping[str, str]],
    tokenizers: Mapping[str, Tokenizer],
) -> dict[tuple[str, int], list[int]]:
    """What every reader is asked, in its own template. Raises InputError, CapacityError naming the line."""
    positions = {model: ModelConfig.load(locate(model)).max_position_embeddings for model in tokenizers}
    prompts: dict[tuple[str, int], list[int]] = {}
    for reader in config.readers():
        for index, problem in enumerate(problems):
            asked = build_prompt(reader, problem, contexts[index], config.templates)
            try:
                ids = prompts[reader.name, index] = tokenizers[reader.model].encode_prompt(asked)
            except InputError as error:
                raise InputError(f"{config.data}, line {problem.line}: {error}") from None
            own = positions[config.student] - len(prompts["itself", index])  # where the student's responses end
            if len(ids) + min(config.max_tokens, max(own, 0)) > positions[reader.model]:
                raise CapacityError(
                    f"{config.data}, line {problem.line}: the prompt of {reader.name!r} has {len(ids)} tokens, and "
                    f"with {config.max_tokens} of the response more than the {positions[reader.model]} positions of "
                    f"{reader.model}; lower max_tokens, or shorten the context"
                )
    return prompts


def _questions(config: DiagnoseConfig, problems: Sequence[ProblemRow], tokenizer: Tokenizer) -> list[Question]:
    seen: Counter[tuple[int, ...]] = Counter()
    questions = []
    for index, problem in enumerate(problems):
        ids = tuple(tokenizer.encode_prompt(problem.prompt))
        label = f"{config.data}, line {problem.line}"
        questions.append(
            Question(
                index=index, label=label, prompt=problem.prompt, prompt_ids=ids, occurrence=seen[ids],
                answer=problem.answer,
            )
        )  # fmt: skip
        seen[ids] += 1
    return questions


def _finished(
    run: Run, config: DiagnoseConfig, problems: Sequence[ProblemRow], contexts: Sequence[Mapping[str, str]]
) -> int:
    """Return the number of questions in the journal. Raises InputError when they are not the first of the data."""
    done = 0
    for row in run.done():
        check_same_problem(row, problems, config.data, run.journal_path)
        if row["index"] != done:
            raise InputError(f"{run.journal_path}, line {done + 1} is damaged; restore it or remove it before resuming")
        if row.get("contexts") != contexts[done]:
            raise InputError(f"{config.data}: row {done} has other contexts than {run.journal_path} was begun with")
        done += 1
    return done


def _work(
    config: DiagnoseConfig,
    models: Models,
    questions: Sequence[Question],
    done: int,
    prompts: Mapping[tuple[str, int], Sequence[int]],
    report: Report,
    verify: Verify,
) -> Iterator[tuple[Question, Findings]]:
    """All questions but the first `done`, in order, as each is finished. Equal prompts are told apart by all that come
    before them."""
    todo = _rolled_out(config, models, questions, done, report)
    places = {q.index: _places(config, q) for q in todo}
    ends = models.engine(config.student, "student").tokenizer("student").end_token_ids
    options = ReadingOptions(
        top_k=config.top_k,
        teacher_top_k=config.teacher_top_k,
        min_probability=config.min_probability,
        completions=config.completions,
        budget=config.budget,
        end_ids=ends,
    )

    def reading(at: int, total: int) -> None:
        report(DiagnoseProgress(phase="reading", done=at, total=total))

    read = read_nodes(models, config.readers(), todo, prompts, places, options, reading)
    engine = models.engine(config.student, "student")
    for q in todo:

        def forcing(completions: int, index: int = q.index) -> None:
            report(
                DiagnoseProgress(
                    phase="forcing", done=index, total=len(questions), completions=completions, budget=config.budget
                )
            )

        forcing(0)
        outcomes, cost = force_nodes(
            engine,
            q,
            [of.node for of in read[q.index]],
            verify,
            CompletionOptions(
                completions=config.completions,
                sampling=config.sampling,
                max_tokens=config.max_tokens,
                seed=config.seed,
            ),
            forcing,
        )
        verdicts: dict[str, bool] = {}
        yield (
            q,
            Findings(
                correct=[succeeds(rollout, q.answer, verify, verdicts) for rollout in q.rollouts],
                planned_nodes=sum(len(of_rollout) for of_rollout in places[q.index]),
                readings=read[q.index],
                outcomes=outcomes,
                completions=config.completions,
                cost=cost,
            ),
        )


def _rolled_out(
    config: DiagnoseConfig, models: Models, questions: Sequence[Question], done: int, report: Report
) -> list[Question]:
    """The questions that are left, with the student's answers."""
    rollouts: dict[int, tuple[Completion, ...]] = {}
    generated = models.engine(config.student, "student").iter_generate(
        [q.prompt for q in questions],
        model="student",
        n=config.rollouts,
        sampling=config.sampling,
        max_tokens=config.max_tokens,
        seed=config.seed,
        skip=frozenset(range(done)),
        labels=[q.label for q in questions],
    )
    for index, completions in generated:
        rollouts[index] = tuple(completions)
        report(DiagnoseProgress(phase="rollouts", done=done + len(rollouts), total=len(questions)))
    return [dataclasses.replace(q, rollouts=rollouts[q.index]) for q in questions[done:]]


def _places(config: DiagnoseConfig, question: Question) -> list[list[int]]:
    """Where every rollout is looked at, in the order in which that is to be afforded."""
    stream = prompt_stream(config.seed, question.prompt_ids, question.occurrence)
    return [
        place_nodes(len(rollout.token_ids), config.nodes_per_window, np.random.default_rng([stream, i]))
        for i, rollout in enumerate(question.rollouts)
    ]
