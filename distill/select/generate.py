"""`genssd generate`: responses that nobody chose, for baselines and for pools that `genssd score` picks from.

OUTPUT_DIR/run.json           the settings, model fingerprints and versions
OUTPUT_DIR/responses.jsonl    one line per finished prompt; training, score and TRL read it like selections.jsonl
OUTPUT_DIR/bad_rows.txt       what could not be used or did not fit, by file and line
OUTPUT_DIR/summary.json       counts of prompts, statuses and tokens; accuracy where reference answers are known

sample   the teacher writes alone: standard distillation with one response, a pool for best-of-N with several
rsd      the student accepts or refuses every token of the teacher (Reverse Speculative Decoding)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from genssd.distill.answers.accuracy import Accuracy, measure_accuracy
from genssd.distill.answers.thoughts import ThoughtReader
from genssd.distill.data.problems import (
    ProblemRow,
    ProblemSet,
    check_same_problem,
    describe_problems,
    read_usable_problems,
)
from genssd.distill.data.response_limits import ResponseLimits, count_cuts
from genssd.distill.runs.engines import open_engine
from genssd.distill.runs.journal import damaged_line
from genssd.distill.runs.model_sampling import choose_sampling
from genssd.distill.runs.progress import SILENT, Progress
from genssd.distill.runs.run import Run
from genssd.distill.runs.served_teacher import count_server_use, describe_server_use, find_fingerprints
from genssd.distill.select.generate_config import GenerateConfig
from genssd.distill.select.notes import NoteMaker, list_responses
from genssd.distill.select.rows import make_response_row
from genssd.distill.select.unfit import ReadableProblems, leave_out_unfit
from genssd.engine.engine import Engine
from genssd.engine.model_choices import Role
from genssd.engine.pair_prompts import PairPrompt
from genssd.engine.text import Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateSummary:
    """What a finished run has written; all counts are over the whole journal."""

    path: Path
    prompts: int
    statuses: Mapping[str, int]
    """Number of responses by status."""
    accuracy: Accuracy
    """Verdicts on all responses."""
    cuts: Mapping[str, int]
    """Number of responses that were cut off, by what cut them."""
    tokens: int
    """Tokens in all responses."""
    substituted: int
    """Tokens that the student wrote in the teacher's place."""
    failures: tuple[str, ...]
    """Prompts that are too long, or did not fit into the cache, and why. They are in no journal: resuming tries them
    again."""
    bad_rows: tuple[str, ...]
    """Rows of the data that could not be used; the failures are among them."""


def run_generate(config: GenerateConfig, engine: Engine | None = None, report: Progress = SILENT) -> GenerateSummary:
    """Generate over a file of problems. engine: a loaded engine to use instead of loading the config's models.

    Raises GenssdError on bad input; prompts that were finished before are in the journal.
    """
    config = choose_sampling(config, config.teacher, "teacher", engine)
    data = read_usable_problems(config.data, config.limit, system_prompt=config.system_prompt)
    fingerprints = find_fingerprints(config, config.teacher, engine)
    with Run.open(config, "generate", journal="responses.jsonl", fingerprints=fingerprints) as run:
        done = _finished(run, config, data.problems)
        report.note(describe_problems(data.problems, config.data, len(done), bad_rows=len(data.faults)))
        engine = run.use(
            open_engine(config, engine, run.chat_options, teacher=config.teacher, student=config.student, report=report)
        )
        # the rows hold the prompt as the student reads it, also where the student does not read the response
        readers: tuple[Role, ...] = ("teacher",) if config.student is None else ("teacher", "student")
        readable = leave_out_unfit(data, engine, readers)
        failures = _generate(run, config, engine, readable, done, report)
        summary = _summarise(run, config, readable.data, failures)
        run.write_bad_rows(summary.bad_rows)
        run.write_summary({**_describe(summary), **count_server_use(engine)})
        if (line := describe_server_use(engine)) is not None:
            report.note(line)
    return summary


def _generate(
    run: Run,
    config: GenerateConfig,
    engine: Engine,
    readable: ReadableProblems,
    done: frozenset[int],
    report: Progress,
) -> dict[int, str]:
    """Generate for the prompts that are not done, and journal each as it ends.

    Returns why the others failed, by the index of the row. done: indices of rows.
    """
    problems = readable.data.problems
    has_student_ids = config.student is not None and engine.reader.is_identity
    origin = {
        "seed": config.seed,
        "method": config.method,
        # training reads the text of rows whose ids are not the student's
        "tokenizer": engine.tokenizer("student" if has_student_ids else "teacher").fingerprint,
        "teacher": {"name": config.teacher, "fingerprint": engine.fingerprints["teacher"]},
    }
    limits = ResponseLimits.of(
        engine, ("teacher", "student") if config.method == "rsd" else ("teacher",), config.max_tokens
    )
    limits.warn_of_shortage(readable.list_lengths(done))
    notes, thoughts = NoteMaker(engine.tokenizer("teacher"), limits), ThoughtReader(engine.tokenizer("teacher"))
    report.begin("", unit="prompts", total=len(problems), done=len(done), engine=engine, work="writing")
    outcomes = engine.iter_generate(
        [problem.prompt for problem in problems],
        n=config.n,
        sampling=config.sampling,
        max_tokens=config.max_tokens,
        seed=config.seed,
        rsd=config.rsd if config.method == "rsd" else None,
        skip=readable.find_done(done),
        labels=[problem.where for problem in problems],
    )
    failures: dict[int, str] = {}
    for finished, outcome in enumerate(outcomes, start=1):
        problem = problems[outcome.index]
        if outcome.error is None:
            prompt = _encode(engine, config, problem.prompt)
            if not has_student_ids:  # the ids of the row are the teacher's
                prompt = PairPrompt(teacher=prompt.teacher, student=prompt.teacher)
            of_responses = notes.of_completions(
                prompt.teacher, readable.lengths[problem.index], outcome.completions, problem.answer
            )
            fields = {"source": {"file": config.data, "line": problem.line}, **origin}
            run.journal.append(
                make_response_row(
                    problem, prompt, outcome.completions, of_responses, thoughts.read_opening(prompt.teacher), fields
                )
            )
        else:
            failures[problem.index] = f"{problem.where}: {outcome.error}"
        report(len(done) + finished, len(problems))
    return failures


def _encode(engine: Engine, config: GenerateConfig, prompt: Prompt) -> PairPrompt:
    """Return a prompt as the models of the run read it; without a student the teacher reads both."""
    if config.student is not None:
        return engine.encode_pair(prompt)
    ids = tuple(engine.tokenizer("teacher").encode_prompt(prompt))
    return PairPrompt(teacher=ids, student=ids)


def _finished(run: Run, config: GenerateConfig, problems: Sequence[ProblemRow]) -> frozenset[int]:
    """Return the indices of the prompts in the journal. Raises InputError on a journal of other data."""
    done: set[int] = set()
    journal = run.journal_path
    for number, row in enumerate(run.done(), start=1):
        check_same_problem(row, problems, config.data, journal)
        if row["index"] in done:
            raise damaged_line(journal, number, f"prompt {row['index']} is also in an earlier line")
        done.add(row["index"])
    return frozenset(done)


def _summarise(run: Run, config: GenerateConfig, data: ProblemSet, failures: Mapping[int, str]) -> GenerateSummary:
    """Return the counts over the journal. failures: why prompts failed, by the index of the row."""
    statuses: Counter[str] = Counter()
    tokens = substituted = 0
    prompts: list[list[dict[str, Any]]] = []
    for row in run.done():
        responses = list_responses(row)
        for response in responses:
            statuses[response["status"]] += 1
            tokens += len(response["completion_ids"])
            substituted += response["substituted"]
        prompts.append([{name: r[name] for name in ("correct", "undecided", "cut_by")} for r in responses])
    return GenerateSummary(
        path=run.journal_path,
        prompts=len(prompts),
        statuses=dict(statuses),
        accuracy=measure_accuracy(prompts),
        cuts=count_cuts(response for responses in prompts for response in responses),
        tokens=tokens,
        substituted=substituted,
        failures=tuple(message for _, message in sorted(failures.items())),
        bad_rows=data.list_bad_rows(failures),
    )


def _describe(summary: GenerateSummary) -> dict[str, Any]:
    """Return the content of summary.json."""
    return {
        "path": summary.path.name,
        **{name: getattr(summary, name) for name in ("prompts", "statuses", "cuts", "tokens", "substituted")},
        **summary.accuracy.as_json(),
        "failures": len(summary.failures),
        "bad_rows": len(summary.bad_rows),
    }
