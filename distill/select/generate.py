"""`genssd generate`: responses that nobody chose, for baselines and for pools that `genssd score` picks from.

OUTPUT_DIR/run.json           the settings, model fingerprints and versions
OUTPUT_DIR/responses.jsonl    one line per finished prompt; training, score and TRL read it like selections.jsonl
OUTPUT_DIR/bad_rows.txt       what could not be used or did not fit, by file and line
OUTPUT_DIR/summary.json       counts of prompts, statuses and tokens; accuracy where reference answers are known

sample   the teacher writes alone: standard distillation with one response, a pool for best-of-N with several
rsd      the student accepts or refuses every token of the teacher (Reverse Speculative Decoding)
alternate, relay   teacher and student write in turns (alternation.py, relay.py); rows say who wrote each chunk
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from genssd.distill.answers.thoughts import ThoughtReader
from genssd.distill.data.problems import (
    ProblemRow,
    check_same_problem,
    describe_problems,
    read_usable_problems,
)
from genssd.distill.data.response_limits import ResponseLimits
from genssd.distill.runs.engines import open_engine
from genssd.distill.runs.journal import damaged_line
from genssd.distill.runs.model_sampling import choose_sampling
from genssd.distill.runs.progress import SILENT, Progress
from genssd.distill.runs.run import Run
from genssd.distill.runs.served_teacher import count_server_use, describe_server_use, find_fingerprints
from genssd.distill.select.alternation import make_judge
from genssd.distill.select.generate_config import GenerateConfig
from genssd.distill.select.generate_summary import GenerateSummary, summarise_responses
from genssd.distill.select.notes import NoteMaker
from genssd.distill.select.rows import make_response_row
from genssd.distill.select.two_writers import iter_two_writers
from genssd.distill.select.unfit import ReadableProblems, leave_out_unfit
from genssd.engine.engine import Engine
from genssd.engine.generation import Generation
from genssd.engine.model_choices import Role
from genssd.engine.pair_prompts import PairPrompt
from genssd.engine.text import Prompt


def run_generate(config: GenerateConfig, engine: Engine | None = None, report: Progress = SILENT) -> GenerateSummary:
    """Generate over a file of problems. engine: a loaded engine to use instead of loading the config's models.

    Raises GenssdError on bad input; prompts that were finished before are in the journal.
    """
    criterion = make_judge(config.alternate).criterion if config.method == "alternate" else None
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
        by_answer = config.method == "relay" and config.relay.error == "answer"
        readable = leave_out_unfit(
            data,
            engine,
            readers,
            criterion,
            config.alternate.criterion,
            answer_reader="relay.error answer" if by_answer else None,
        )
        failures = _generate(run, config, engine, readable, done, report)
        summary = summarise_responses(run, readable.data, failures, has_two_writers=config.has_two_writers)
        run.write_bad_rows(summary.bad_rows)
        run.write_summary({**summary.as_json(), **count_server_use(engine)})
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
    if config.has_two_writers:
        assert config.student is not None
        origin["student"] = {"name": config.student, "fingerprint": engine.fingerprints["student"]}
    limits = ResponseLimits.of(
        engine, ("teacher",) if config.method == "sample" else ("teacher", "student"), config.max_tokens
    )
    limits.warn_of_shortage(readable.list_lengths(done))
    notes, thoughts = NoteMaker(engine.tokenizer("teacher"), limits), ThoughtReader(engine.tokenizer("teacher"))
    report.begin("", unit="prompts", total=len(problems), done=len(done), engine=engine, work="writing")
    outcomes = _iter_outcomes(config, engine, readable, done)
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


def _iter_outcomes(
    config: GenerateConfig, engine: Engine, readable: ReadableProblems, done: frozenset[int]
) -> Iterator[Generation]:
    """Yield the outcomes of the prompts that are not done, by the config's method. done: indices of rows."""
    problems = readable.data.problems
    prompts, labels = [problem.prompt for problem in problems], [problem.where for problem in problems]
    skip = readable.find_done(done)
    if config.has_two_writers:
        return iter_two_writers(
            engine,
            prompts,
            config.relay if config.method == "relay" else config.alternate,
            n=config.n,
            sampling=config.sampling,
            max_tokens=config.max_tokens,
            seed=config.seed,
            answers=[problem.answer for problem in problems],
            skip=skip,
            labels=labels,
        )
    return engine.iter_generate(
        prompts,
        n=config.n,
        sampling=config.sampling,
        max_tokens=config.max_tokens,
        seed=config.seed,
        rsd=config.rsd if config.method == "rsd" else None,
        skip=skip,
        labels=labels,
    )


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
