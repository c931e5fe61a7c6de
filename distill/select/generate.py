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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

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
from genssd.distill.pool.pool import Lost, Pool, Stopped
from genssd.distill.runs.chat_settings import PairChatSettings
from genssd.distill.runs.effects import Need, Needs
from genssd.distill.runs.journal import damaged_line
from genssd.distill.runs.model_sampling import ModelSampling, choose_sampling
from genssd.distill.runs.progress import SILENT, Progress
from genssd.distill.runs.run import Run
from genssd.distill.runs.served_teacher import (
    SERVED_NEEDS,
    TeacherOptions,
    count_server_use,
    describe_server_use,
)
from genssd.distill.runs.settings import FileName, ModelPath, Operational
from genssd.distill.select.notes import NoteMaker, list_responses
from genssd.distill.select.rows import make_response_row
from genssd.distill.select.unfit import ReadableProblems, leave_out_unfit
from genssd.engine.budget import Budget
from genssd.engine.engine import Engine
from genssd.engine.errors import InputError
from genssd.engine.feed import Feed
from genssd.engine.generation import Completion
from genssd.engine.model_facts import ModelFacts
from genssd.engine.options_check import check_types
from genssd.engine.pair_prompts import PairPrompt
from genssd.engine.reverse_speculation import ReverseSpeculation
from genssd.engine.runner import Role
from genssd.engine.sampling import Sampling
from genssd.engine.served.address import is_url
from genssd.engine.text import Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateConfig(TeacherOptions, PairChatSettings, ModelSampling):
    """Sample responses from the teacher: without selection, or with the student's verdict on every token."""

    NEEDS: ClassVar[Needs] = {
        "rsd": Need(lambda o: o.method == "rsd", "method rsd"),
        "student_template_kwargs": Need(lambda o: o.student is not None, "a student"),
        **SERVED_NEEDS,
    }

    teacher: ModelPath[str]
    """Hub id or local directory of the model that writes, or the URL of a server that runs it, such as
    http://host:8000/v1 of vLLM or SGLang (docs/served.md)."""
    student: ModelPath[str | None] = None
    """Hub id or local directory of the model whose chat template the rows use, and which judges tokens under rsd.
    None: the rows use the teacher's chat template."""
    # the rows are compared with the journal's one by one, so that a file that has grown can be resumed
    data: Operational[FileName[str]]
    """Data file of problems, as for select."""
    output_dir: Operational[FileName[str]] = "runs/generate"
    """Directory that the journal is written to."""
    resume: Operational[bool] = False
    """Continue an interrupted run: prompts that are in the journal are not run again."""
    limit: Operational[int | None] = None
    """Take only the first rows of the data."""
    method: Literal["sample", "rsd"] = "sample"
    """sample: the teacher writes alone. rsd: the student refuses single tokens (Reverse Speculative Decoding)."""
    n: int = 1
    """Number of responses per prompt."""
    max_tokens: int = 4096
    """Maximum number of tokens in a response."""
    sampling: Sampling = field(default_factory=lambda: Sampling(top_p=0.95))
    """How the teacher samples. The authors of rsd use temperature 0.7, top_p 0.95, top_k 20."""
    rsd: ReverseSpeculation = field(default_factory=ReverseSpeculation)
    """Which tokens the student accepts under rsd, and how it writes where it refuses."""
    seed: int = 0
    """Seed of all random draws."""

    def __post_init__(self) -> None:
        check_types(self)
        if self.method == "rsd" and self.student is None:
            raise InputError("rsd needs a student: give --student")
        if self.method == "rsd" and is_url(self.teacher):
            raise InputError(
                "rsd judges every token before the next one is drawn, which a server does not wait for: give a teacher "
                "that is a hub id or a local directory, or method sample"
            )
        if self.n < 1 or self.max_tokens < 1:
            raise InputError(f"n and max_tokens must be at least 1, not {self.n} and {self.max_tokens}")


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
    fingerprints = config.find_fingerprints(config.teacher, engine)
    with Run.open(config, "generate", journal="responses.jsonl", fingerprints=fingerprints) as run:
        done = _finished(run, config, data.problems)
        report.note(describe_problems(data.problems, config.data, len(done), bad_rows=len(data.faults)))
        left = len(data.problems) - len(done)
        with config.open_pool(
            engine, run.chat_options, teacher=config.teacher, student=config.student, items=left, report=report
        ) as pool:
            run.use(pool.models)
            # the rows hold the prompt as the student reads it, also where the student does not read the response
            readers: tuple[Role, ...] = ("teacher",) if config.student is None else ("teacher", "student")
            readable = leave_out_unfit(data, pool.models, readers)
            failures = _generate(run, config, pool, readable, done, report)
            server_use, line = count_server_use(pool.models), describe_server_use(pool.models)
        summary = _summarise(run, config, readable.data, failures)
        run.write_bad_rows(summary.bad_rows)
        run.write_summary({**_describe(summary), **server_use})
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
    for finished, (place, outcome) in enumerate(pool.run(work), start=1):
        assert not isinstance(outcome, Stopped), "nothing limits the run"
        if isinstance(outcome, dict):
            run.journal.append(outcome)
        else:
            reason = outcome.reason if isinstance(outcome, Lost) else outcome
            failures[problems[place].index] = f"{problems[place].where}: {reason}"
        report(len(done) + finished, len(problems))
    return failures


def _find_limits(models: ModelFacts, config: GenerateConfig) -> ResponseLimits:
    roles: tuple[Role, ...] = ("teacher", "student") if config.method == "rsd" else ("teacher",)
    return ResponseLimits.of(models, roles, config.max_tokens)


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

    def run(self, engine: Engine, feed: Feed | None, budget: Budget) -> Iterator[tuple[int, dict[str, Any] | str]]:
        """Yield a line of responses.jsonl for every prompt, or why it failed; see `Work`."""
        config = self.config
        writer = _RowMaker(engine, config)
        outcomes = engine.iter_generate(
            [problem.prompt for problem in self.problems],
            n=config.n,
            sampling=config.sampling,
            max_tokens=config.max_tokens,
            seed=config.seed,
            rsd=config.rsd if config.method == "rsd" else None,
            skip=frozenset(range(len(self.problems))) - frozenset(self.items),
            labels=[problem.where for problem in self.problems],
            feed=feed,
        )
        for outcome in outcomes:
            problem = self.problems[outcome.index]
            yield outcome.index, outcome.error or writer.make(problem, outcome.completions)


class _RowMaker:
    """Makes the rows of one run. engine: the one that writes."""

    def __init__(self, engine: Engine, config: GenerateConfig) -> None:
        self._engine = engine
        self._config = config
        self._has_student_ids = config.student is not None and engine.reader.is_identity
        self._fields = {
            "seed": config.seed,
            "method": config.method,
            # training reads the text of rows whose ids are not the student's
            "tokenizer": engine.tokenizer("student" if self._has_student_ids else "teacher").fingerprint,
            "teacher": {"name": config.teacher, "fingerprint": engine.fingerprints["teacher"]},
        }
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
