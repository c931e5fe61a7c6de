"""`genssd generate`: responses that nobody chose, for baselines and for pools that `genssd score` picks from.

OUTPUT_DIR/run.json           the settings, model fingerprints and versions
OUTPUT_DIR/responses.jsonl    one line per finished prompt; training, score and TRL read it like selections.jsonl
OUTPUT_DIR/summary.json       counts of prompts, statuses and tokens

sample   the teacher writes alone: standard distillation with one response, a pool for best-of-N with several
rsd      the student accepts or refuses every token of the teacher (Reverse Speculative Decoding)
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from genssd.distill.data.problems import ProblemRow, check_same_problem, read_problems
from genssd.distill.runs.chat_settings import ChatSettings
from genssd.distill.runs.effects import Need, Needs
from genssd.distill.runs.engine_options import EngineOptions
from genssd.distill.runs.journal import damaged_line
from genssd.distill.runs.run import Run
from genssd.distill.runs.settings import FileName, ModelPath, Operational
from genssd.distill.select.rows import make_response_row
from genssd.engine.engine import Engine
from genssd.engine.errors import InputError
from genssd.engine.reverse_speculation import ReverseSpeculation
from genssd.engine.runner import Role
from genssd.engine.sampling import Sampling


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateConfig(EngineOptions, ChatSettings):
    """Sample responses from the teacher: without selection, or with the student's verdict on every token."""

    NEEDS: ClassVar[Needs] = {"rsd": Need(lambda o: o.method == "rsd", "method rsd")}

    teacher: ModelPath[str]
    """Hub id or local directory of the model that writes."""
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
        if self.method == "rsd" and self.student is None:
            raise InputError("rsd needs a student: give --student")
        if self.n < 1 or self.max_tokens < 1:
            raise InputError(f"n and max_tokens must be at least 1, not {self.n} and {self.max_tokens}")


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateSummary:
    """What a finished run has written; all counts are over the whole journal."""

    path: Path
    prompts: int
    statuses: Mapping[str, int]
    """Number of responses by status."""
    tokens: int
    """Tokens in all responses."""
    substituted: int
    """Tokens that the student wrote in the teacher's place."""


def run_generate(
    config: GenerateConfig, engine: Engine | None = None, report: Callable[[int, int], None] = lambda done, total: None
) -> GenerateSummary:
    """Generate over a file of problems. engine: a loaded engine to use instead of loading the config's models.

    Raises GenssdError on bad input; prompts that were finished before are in the journal.
    """
    problems = read_problems(config.data, config.limit, system_prompt=config.system_prompt)
    fingerprints = None if engine is None else engine.fingerprints
    with Run.open(config, "generate", journal="responses.jsonl", fingerprints=fingerprints) as run:
        done = _finished(run, config, problems)
        engine = run.use(config.open_engine(engine, run.chat_options, teacher=config.teacher, student=config.student))
        _generate(run, config, engine, problems, done, report)
        summary = _summary(run)
        run.write_summary({**dataclasses.asdict(summary), "path": run.journal_path.name})
    return summary


def _generate(
    run: Run,
    config: GenerateConfig,
    engine: Engine,
    problems: Sequence[ProblemRow],
    done: frozenset[int],
    report: Callable[[int, int], None],
) -> None:
    """Generate for the prompts that are not done, and journal each as it ends."""
    prompt_ids = [_encode_prompt(config, engine, problem) for problem in problems]
    has_student_ids = config.student is not None and engine.token_map.is_identity
    origin = {
        "seed": config.seed,
        "method": config.method,
        # training reads the text of rows whose ids are not the student's
        "tokenizer": engine.tokenizer("student" if has_student_ids else "teacher").fingerprint,
        "teacher": {"name": config.teacher, "fingerprint": engine.fingerprints["teacher"]},
    }
    responses = engine.iter_generate(
        [problem.prompt for problem in problems],
        n=config.n,
        sampling=config.sampling,
        max_tokens=config.max_tokens,
        seed=config.seed,
        rsd=config.rsd if config.method == "rsd" else None,
        skip=done,
        labels=[problem.where for problem in problems],
    )
    for finished, outcome in enumerate(responses, start=1):
        index, problem = outcome.index, problems[outcome.index]
        source = {"file": config.data, "line": problem.line}
        run.journal.append(
            make_response_row(index, problem, *prompt_ids[index], outcome.completions, {"source": source, **origin})
        )
        report(len(done) + finished, len(problems))


def _encode_prompt(config: GenerateConfig, engine: Engine, problem: ProblemRow) -> tuple[list[int], list[int]]:
    """Return a prompt's ids for the teacher and for the model that the rows are for.

    Raises InputError naming the line.
    """
    roles: tuple[Role, Role] = ("teacher", "student" if config.student else "teacher")
    try:
        teacher_ids, reader_ids = (engine.tokenizer(role).encode_prompt(problem.prompt) for role in roles)
    except InputError as error:
        raise InputError(f"{problem.where}: {error}") from None
    return teacher_ids, reader_ids


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


def _summary(run: Run) -> GenerateSummary:
    statuses: Counter[str] = Counter()
    prompts = tokens = substituted = 0
    for row in run.done():
        prompts += 1
        for response in (row, *row["others"]):
            statuses[response["status"]] += 1
            tokens += len(response["completion_ids"])
            substituted += response["substituted"]
    return GenerateSummary(
        path=run.journal_path, prompts=prompts, statuses=dict(statuses), tokens=tokens, substituted=substituted
    )
