"""`genssd generate`: responses that nobody chose, for baselines and for pools that `genssd score` picks from.

OUTPUT_DIR/run.json           the settings, model fingerprints and versions
OUTPUT_DIR/responses.jsonl    one line per finished prompt; training, score and TRL read it like selections.jsonl

sample   the teacher writes alone: standard distillation with one response, a pool for best-of-N with several
rsd      the student refuses single tokens while the teacher writes (Reverse Speculative Decoding)
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from genssd.distill.data.problems import ProblemRow, check_same_problem, read_problems
from genssd.distill.runs.directory import claim, record_run
from genssd.distill.runs.engine_options import EngineOptions
from genssd.distill.runs.journal import Journal, complete_rows, truncate
from genssd.distill.select.rows import make_response_row
from genssd.engine.engine import Engine
from genssd.engine.errors import InputError
from genssd.engine.reverse_speculation import ReverseSpeculation
from genssd.engine.runner import Role
from genssd.engine.sampling import Sampling


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateConfig(EngineOptions):
    """Sample responses from the teacher, without selection or with the student's say in every token."""

    teacher: str
    """Hub id or local directory of the model that writes."""
    student: str | None = None
    """Hub id or directory: whose chat template the rows are for, and who judges under rsd; None: the teacher's own."""
    data: str
    """JSONL file of problems, as for select."""
    output_dir: str = "runs/generate"
    resume: bool = False
    """Go on with an interrupted run."""
    limit: int | None = None
    """Take only the first rows of the data."""
    method: Literal["sample", "rsd"] = "sample"
    n: int = 1
    """Responses per prompt."""
    max_tokens: int = 4096
    """Of the response."""
    sampling: Sampling = field(default_factory=lambda: Sampling(top_p=0.95))
    """How the teacher samples. The authors of rsd: temperature 0.7, top_p 0.95, top_k 20."""
    rsd: ReverseSpeculation = field(default_factory=ReverseSpeculation)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method == "rsd" and self.student is None:
            raise InputError("rsd needs a student: give --student")
        if self.n < 1 or self.max_tokens < 1:
            raise InputError(f"n and max_tokens must be at least 1, not {self.n} and {self.max_tokens}")


SETTINGS_OF_THE_RESULT = ("student", "method", "n", "max_tokens", "sampling", "rsd", "seed", "dtype")
"""What must not change between the parts of one run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateSummary:
    """What a run left behind; all counts are over the whole journal."""

    path: Path
    prompts: int
    statuses: Mapping[str, int]
    """Of the responses."""
    tokens: int
    substituted: int
    """Tokens that the student wrote in the teacher's place."""


def run_generate(
    config: GenerateConfig, engine: Engine | None = None, report: Callable[[int, int], None] = lambda done, total: None
) -> GenerateSummary:
    """Generate over a file of problems. Raises GenssdError on bad input; finished prompts are in the journal."""
    problems = read_problems(config.data, config.limit)
    with claim(Path(config.output_dir), "generate"):
        return _run(config, problems, engine, report)


def _run(
    config: GenerateConfig,
    problems: Sequence[ProblemRow],
    engine: Engine | None,
    report: Callable[[int, int], None],
) -> GenerateSummary:
    output_dir = Path(config.output_dir)
    journal = output_dir / "responses.jsonl"
    done = _finished(config, problems, journal)
    engine = engine or config.load(teacher=config.teacher, student=config.student)
    settings = dataclasses.asdict(config)
    record_run(output_dir, "generate", settings, SETTINGS_OF_THE_RESULT, engine.fingerprints, resumed=bool(done))
    read = engine.tokenizer("student" if config.student else "teacher")
    prompts = [_both_read(config, engine, problem) for problem in problems]
    origin = {
        "seed": config.seed,
        "method": config.method,
        "tokenizer": read.fingerprint,
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
        labels=[f"{config.data}, line {problem.line}" for problem in problems],
    )
    with Journal(journal) as log:
        for finished, (index, completions) in enumerate(responses, start=1):
            problem = problems[index]
            source = {"file": config.data, "line": problem.line}
            log.append(make_response_row(index, problem, *prompts[index], completions, {"source": source, **origin}))
            report(len(done) + finished, len(problems))
    return _summary(journal)


def _both_read(config: GenerateConfig, engine: Engine, problem: ProblemRow) -> tuple[list[int], list[int]]:
    """A prompt's ids for the teacher and for whom the rows are for. Raises InputError naming the line."""
    roles: tuple[Role, Role] = ("teacher", "student" if config.student else "teacher")
    try:
        asked, read = (engine.tokenizer(role).encode_prompt(problem.prompt) for role in roles)
    except InputError as error:
        raise InputError(f"{config.data}, line {problem.line}: {error}") from None
    return asked, read


def _finished(config: GenerateConfig, problems: Sequence[ProblemRow], journal: Path) -> frozenset[int]:
    """The indices of the prompts in the journal, which is cut to whole lines."""
    done: list[int] = []
    end = 0
    for row, line_end in complete_rows(journal):
        if not config.resume:
            raise InputError(f"{journal} holds finished prompts already; pass --resume, or choose another output_dir")
        check_same_problem(row, problems, config.data, journal)
        if row["index"] in done or not isinstance(row.get("others"), list):
            raise InputError(f"{journal}, line {len(done) + 1} is damaged; restore it or remove it before resuming")
        done.append(row["index"])
        end = line_end
    truncate(journal, end)
    return frozenset(done)


def _summary(journal: Path) -> GenerateSummary:
    statuses: Counter[str] = Counter()
    prompts = tokens = substituted = 0
    for row, _ in complete_rows(journal):
        prompts += 1
        for response in (row, *row["others"]):
            statuses[response["status"]] += 1
            tokens += len(response["completion_ids"])
            substituted += response["substituted"]
    return GenerateSummary(
        path=journal, prompts=prompts, statuses=dict(statuses), tokens=tokens, substituted=substituted
    )
