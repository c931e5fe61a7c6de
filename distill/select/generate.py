"""`genssd generate`: responses that nobody chose, for baselines and for pools that `genssd score` picks from.

OUTPUT_DIR/run.json           the settings, model fingerprints and versions
OUTPUT_DIR/responses.jsonl    one line per finished prompt; training, score and TRL read it like selections.jsonl
OUTPUT_DIR/teacher_states.bin  the teacher's last hidden states along each response, with --teacher-states
OUTPUT_DIR/bad_rows.txt       what could not be used or did not fit, by file and line
OUTPUT_DIR/summary.json       counts of prompts, statuses and tokens; accuracy where reference answers are known

sample   the teacher writes alone: standard distillation with one response, a pool for best-of-N with several
rsd      the student accepts or refuses every token of the teacher (Reverse Speculative Decoding)
alternate, relay   teacher and student write in turns (alternation.py, relay.py); rows say who wrote each chunk
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from genssd.distill.answers.thoughts import ThoughtReader
from genssd.distill.data.problems import (
    ProblemRow,
    check_same_problem,
    describe_problems,
    read_usable_problems,
)
from genssd.distill.data.response_limits import ResponseLimits
from genssd.distill.data.state_store import FIELD
from genssd.distill.pool.pool import Lost, Pool, Stopped
from genssd.distill.runs.clusters import on_cluster
from genssd.distill.runs.engine_metrics import EngineMetrics
from genssd.distill.runs.journal import begin_line, complete_line, damaged_line
from genssd.distill.runs.metrics import check_monitor
from genssd.distill.runs.model_sampling import choose_sampling
from genssd.distill.runs.output_files import JOURNALS
from genssd.distill.runs.pools import open_pool
from genssd.distill.runs.progress import SILENT, Progress
from genssd.distill.runs.run import Run
from genssd.distill.runs.served_teacher import count_server_use, describe_server_use, find_fingerprints
from genssd.distill.select.alternation import make_judge
from genssd.distill.select.generate_config import GenerateConfig
from genssd.distill.select.generate_summary import GenerateSummary, summarise_responses
from genssd.distill.select.kept_states import KeptText, add_states
from genssd.distill.select.notes import NoteMaker, list_responses
from genssd.distill.select.resuming import check_states_file, open_states
from genssd.distill.select.rows import make_response_row
from genssd.distill.select.two_writers import iter_two_writers
from genssd.distill.select.unfit import ReadableProblems, leave_out_unfit
from genssd.engine.calls.generation import Completion, Generation
from genssd.engine.common.errors import InputError
from genssd.engine.common.model_choices import Role
from genssd.engine.decoding.feed import Feed
from genssd.engine.engine import Engine
from genssd.engine.readers.pair_prompts import PairPrompt
from genssd.engine.search.budget import Budget
from genssd.engine.setup.model_facts import ModelFacts
from genssd.engine.texts.text import Prompt


@on_cluster
def run_generate(config: GenerateConfig, engine: Engine | None = None, report: Progress = SILENT) -> GenerateSummary:
    """Generate over a file of problems. engine: a loaded engine to use instead of loading the config's models.

    Raises GenssdError on bad input; prompts that were finished before are in the journal.
    """
    criterion = make_judge(config.alternate).criterion if config.method == "alternate" else None
    check_monitor(config.report_to)
    config = choose_sampling(config, config.teacher, "teacher", engine)
    data = read_usable_problems(
        config.data, config.limit, system_prompt=config.system_prompt, shard=config.shard, offset=config.offset
    )
    fingerprints = find_fingerprints(config, config.teacher, engine)
    with Run.open(config, "generate", journal=JOURNALS["generate"], fingerprints=fingerprints) as run:
        done = _finished(run, config, data.problems)
        report.note(describe_problems(data.problems, config.data, len(done), bad_rows=len(data.faults)))
        check_states_file(run, run.done())
        left = len(data.problems) - len(done)
        with open_pool(
            config, engine, run.chat_options, teacher=config.teacher, student=config.student, items=left, report=report
        ) as pool:
            run.use(pool.models)
            # the rows hold the prompt as the student reads it, also where the student does not read the response
            readers: tuple[Role, ...] = ("teacher",) if config.student is None else ("teacher", "student")
            by_answer = config.method == "relay" and config.relay.error == "answer"
            readable = leave_out_unfit(
                data,
                pool.models,
                readers,
                criterion,
                config.alternate.criterion,
                answer_reader="relay.error answer" if by_answer else None,
            )
            if config.teacher_states and config.student is not None and not pool.models.reader.is_identity:
                raise InputError(
                    f"teacher_states needs models whose tokens are the same: {pool.models.reader.describe()}"
                )
            failures = _generate(run, config, pool, readable, done, report)
            server_use, line = count_server_use(pool.models), describe_server_use(pool.models)
        summary = summarise_responses(run, readable.data, failures, has_two_writers=config.has_two_writers)
        run.write_bad_rows(summary.bad_rows)
        run.write_summary({**summary.as_json(), **server_use})
        if line is not None:
            report.note(line)
    return summary


def _generate(
    run: Run,
    config: GenerateConfig,
    pool: Pool,
    readable: ReadableProblems,
    done: frozenset[int],
    report: Progress,
) -> dict[int, str]:
    """Generate for the prompts that are not done, and journal each as it ends.

    Returns why the others failed, by the index of the row. done: indices of rows.
    """
    problems = readable.data.problems
    _find_limits(pool.models, config).warn_of_shortage(readable.list_lengths(done))
    report.begin("", unit="prompts", total=len(problems), done=len(done), engine=pool.models, work="writing")
    places_done = readable.find_done(done)
    work = GenerationWork(
        problems=problems, items=[p for p in range(len(problems)) if p not in places_done], config=config
    )
    failures: dict[int, str] = {}
    journal = run.journal  # opened first: the run is recorded before the first file that belongs to it
    with (
        open_states(run, config.teacher_states, pool.models.fingerprints["teacher"]) as store,
        EngineMetrics.open(config, run, "generate", pool.models, total=len(problems)) as metrics,
    ):
        for finished, (place, outcome) in enumerate(pool.run(work), start=len(done) + 1):
            assert not isinstance(outcome, Stopped), "nothing limits the run"
            verdicts: Sequence[bool | None] = []
            if isinstance(outcome, WrittenPrompt):
                fields: dict[str, Any] = {}
                if store is not None and outcome.states is not None:
                    fields[FIELD] = store.append(outcome.states)
                journal.append_line(complete_line(outcome.begun, fields))
                verdicts = outcome.verdicts
            else:
                reason = outcome.reason if isinstance(outcome, Lost) else outcome
                failures[problems[place].index] = f"{problems[place].where}: {reason}"
            metrics.finish(finished, verdicts)
            report(finished, len(problems))
    if store is not None:
        report.note(store.describe())
    return failures


def _find_limits(models: ModelFacts, config: GenerateConfig) -> ResponseLimits:
    roles: tuple[Role, ...] = ("teacher",) if config.method == "sample" else ("teacher", "student")
    return ResponseLimits.of(models, roles, config.max_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenPrompt:
    """The responses to one prompt, as they are written."""

    begun: bytes
    """Line of responses.jsonl without `teacher_states`, to be completed (`complete_line`)."""
    verdicts: Sequence[bool | None]
    """Verdicts on the responses, in order."""
    states: Tensor | None = None
    """The teacher's hidden states along the response, on the CPU; None where they are not kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationWork:
    """The responses to problems; a `Work`, whose items are places of problems."""

    problems: Sequence[ProblemRow]
    """All problems: how many equal prompts come before one decides what is drawn for it."""
    items: Sequence[int]
    config: GenerateConfig

    @property
    def most_tokens(self) -> int:
        """Largest number of tokens of the responses to one prompt."""
        return self.config.n * self.config.max_tokens

    def run(self, engine: Engine, feed: Feed | None, budget: Budget) -> Iterator[tuple[int, WrittenPrompt | str]]:
        """Yield the responses to every prompt, or why it failed; see `Work`."""
        writer = _RowMaker(engine, self.config)
        outcomes = (self._make_outcome(writer, outcome) for outcome in self._iter_outcomes(engine, feed))
        for place, row, states in add_states(engine, self.config.teacher_states, outcomes):
            if isinstance(row, str):
                yield place, row
            elif isinstance(states, str):
                yield place, states
            else:
                verdicts = [response["correct"] for response in list_responses(row)]
                yield place, WrittenPrompt(begun=begin_line(row), verdicts=verdicts, states=states)

    def _make_outcome(
        self, writer: _RowMaker, outcome: Generation
    ) -> tuple[int, dict[str, Any] | str, KeptText | None]:
        """Return the index of a prompt, its row or why it failed, and the text whose hidden states may be kept."""
        if outcome.error is not None:
            return outcome.index, outcome.error, None
        row = writer.make(self.problems[outcome.index], outcome.completions)
        text = KeptText.of(row["prompt_ids"], row["student_prompt_ids"], row["lead_tokens"], row["completion_ids"])
        return outcome.index, row, text

    def _iter_outcomes(self, engine: Engine, feed: Feed | None) -> Iterator[Generation]:
        """Return an iterator over the outcomes by the config's method."""
        config = self.config
        prompts, labels = [problem.prompt for problem in self.problems], [problem.where for problem in self.problems]
        skip = frozenset(range(len(self.problems))) - frozenset(self.items)
        if config.has_two_writers:
            return iter_two_writers(
                engine,
                prompts,
                config.relay if config.method == "relay" else config.alternate,
                n=config.n,
                sampling=config.sampling,
                max_tokens=config.max_tokens,
                seed=config.seed,
                answers=[problem.answer for problem in self.problems],
                stop=config.stop,
                include_stop=config.include_stop,
                skip=skip,
                labels=labels,
                feed=feed,
            )
        return engine.iter_generate(
            prompts,
            n=config.n,
            sampling=config.sampling,
            max_tokens=config.max_tokens,
            seed=config.seed,
            rsd=config.rsd if config.method == "rsd" else None,
            stop=config.stop,
            include_stop=config.include_stop,
            skip=skip,
            labels=labels,
            feed=feed,
        )


class _RowMaker:
    """Makes the rows of one run. engine: the one that writes."""

    def __init__(self, engine: Engine, config: GenerateConfig) -> None:
        self._engine = engine
        self._config = config
        self._has_student_ids = config.student is not None and engine.reader.is_identity
        self._fields: dict[str, Any] = {
            "seed": config.seed,
            "method": config.method,
            # training reads the text of rows whose ids are not the student's
            "tokenizer": engine.tokenizer("student" if self._has_student_ids else "teacher").fingerprint,
            "teacher": {"name": config.teacher, "fingerprint": engine.fingerprints["teacher"]},
        }
        if config.has_two_writers:
            self._fields["student"] = {"name": config.student, "fingerprint": engine.fingerprints["student"]}
        self._notes = NoteMaker(engine.tokenizer("teacher"), _find_limits(engine, config))
        self._thoughts = ThoughtReader(engine.tokenizer("teacher"))

    def make(self, problem: ProblemRow, completions: Sequence[Completion]) -> dict[str, Any]:
        """Return the row of one prompt."""
        prompt = self._encode(problem.prompt)
        lengths: dict[Role, int] = {"teacher": len(prompt.teacher), "student": len(prompt.student)}
        if not self._has_student_ids:  # the ids of the row are the teacher's
            prompt = PairPrompt(teacher=prompt.teacher, student=prompt.teacher)
        notes = self._notes.of_completions(prompt.teacher, lengths, completions, problem.answer)
        fields = {"source": {"file": self._config.data, "line": problem.line}, **self._fields}
        opening = self._thoughts.read_opening(prompt.teacher)
        return make_response_row(problem, prompt, completions, notes, opening, fields)

    def _encode(self, prompt: Prompt) -> PairPrompt:
        """Return a prompt as the models of the run read it; without a student the teacher reads both."""
        if self._config.student is not None:
            return self._engine.encode_pair(prompt)
        ids = tuple(self._engine.tokenizer("teacher").encode_prompt(prompt))
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
