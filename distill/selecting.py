"""`genssd select`: problems in, a crash-safe journal of selected trajectories out.

OUTPUT_DIR/run.json           the settings, model fingerprints and versions
OUTPUT_DIR/selections.jsonl   one line per finished prompt: what training reads
OUTPUT_DIR/decisions.jsonl    the same prompts in the same order: every candidate, its scores and its verdict

A prompt's decisions are on disk before its selection: where there is a selection line, nothing is missing.
"""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from genssd.distill.journal import Journal, complete_rows, read_json, truncate, write_json
from genssd.distill.outcome_rows import Origin, decision_row, selection_row
from genssd.distill.rows import ProblemRow, read_problems
from genssd.engine.chunk import Chunk
from genssd.engine.criteria import resolve
from genssd.engine.engine import Engine
from genssd.engine.errors import InputError
from genssd.engine.loops import LoopGuard
from genssd.engine.sampling import Sampling
from genssd.engine.selection import Selection


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectConfig:
    """Let the student choose what the teacher writes, prompt by prompt."""

    teacher: str
    """Hub id or local directory of the model that writes."""
    student: str
    """Hub id or local directory of the model that scores."""
    data: str
    """JSONL file of problems: prompt (text or messages), messages, or question | problem | instruction."""
    output_dir: str = "runs/select"
    """Where the journal goes."""
    resume: bool = False
    """Go on with an interrupted run: prompts in the journal are not run again."""
    limit: int | None = None
    """Take only the first rows of the data."""
    candidates: int = 4
    """Continuations sampled per live branch and round."""
    chunk: Chunk = field(default_factory=Chunk)
    """Where a candidate ends."""
    beam: int = 1
    """Branches kept per prompt after each round."""
    criterion: str = "ppl"
    """Registered name of the selection criterion."""
    threshold: float | None = None
    """Prune a branch whose best candidate is worse than this criterion value."""
    max_tokens: int = 4096
    """Of the response."""
    loop_guard: bool = True
    """Reject candidates that end in a repetition."""
    sampling: Sampling = field(default_factory=lambda: Sampling(top_p=0.95))
    """How the teacher samples."""
    seed: int = 0
    device: str | None = None
    """None: CUDA where there is one, else the CPU."""
    dtype: str = "auto"
    memory_utilization: float = 0.9
    """Share of the free memory that the two caches get."""
    memory_bytes: int | None = None
    """The caches' budget in bytes instead."""
    max_batch: int = 256
    """Candidates decoded at once."""


SETTINGS_OF_THE_RESULT = (
    "candidates",
    "chunk",
    "beam",
    "criterion",
    "threshold",
    "max_tokens",
    "loop_guard",
    "sampling",
    "seed",
    "dtype",
)
"""What must not change between the parts of one run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectProgress:
    """How far a run is. Counted over this process; tokens_kept are those of the best trajectories."""

    done: int
    total: int
    tokens_kept: int
    tokens_sampled: int
    pages_in_use: int
    pages: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectSummary:
    """What a run left behind. `statuses` counts over the whole journal, earlier parts of the run included."""

    path: Path
    prompts: int
    statuses: Mapping[str, int]
    tokens_kept: int
    tokens_sampled: int


def run_select(
    config: SelectConfig, engine: Engine | None = None, report: Callable[[SelectProgress], None] = lambda progress: None
) -> SelectSummary:
    """Select over a file of problems. engine: a loaded one to use instead of loading the config's models.

    Raises GenssdError on bad input; whatever was finished before is in the journal.
    """
    resolve(config.criterion)
    problems = read_problems(config.data, config.limit)
    output_dir = Path(config.output_dir)
    journal, decisions = output_dir / "selections.jsonl", output_dir / "decisions.jsonl"
    done = open_run(config, problems)
    engine = engine or load_engine(config)
    _record_run(output_dir, config, engine, resumed=bool(done))
    origin = Origin(
        data=config.data,
        criterion=config.criterion,
        teacher=config.teacher,
        student=config.student,
        fingerprints={role: engine.fingerprints[role] for role in ("teacher", "student")},
        tokenizer=engine.tokenizer("teacher").fingerprint,
    )
    with Journal(journal) as selections_log, Journal(decisions) as decisions_log:
        kept = 0
        for finished, selection in enumerate(_select(engine, config, problems, done), start=1):
            problem = problems[selection.index]
            decisions_log.append(decision_row(selection))
            selections_log.append(selection_row(selection, problem, origin))
            kept += len(selection.trajectories[0].token_ids) if selection.trajectories else 0
            report(
                SelectProgress(
                    done=len(done) + finished,
                    total=len(problems),
                    tokens_kept=kept,
                    tokens_sampled=engine.usage.teacher_tokens,
                    pages_in_use=engine.pages_in_use[0],
                    pages=engine.pages_in_use[1],
                )
            )
    return _summary(journal)


def load_engine(config: SelectConfig) -> Engine:
    """The config's two models."""
    return Engine.from_pretrained(
        teacher=config.teacher,
        student=config.student,
        device=config.device,
        dtype=config.dtype,
        memory_utilization=config.memory_utilization,
        memory_bytes=config.memory_bytes,
        max_batch=config.max_batch,
    )


def _select(
    engine: Engine, config: SelectConfig, problems: Sequence[ProblemRow], done: frozenset[int]
) -> Iterator[Selection]:
    return engine.iter_select_expand(
        [problem.prompt for problem in problems],
        candidates=config.candidates,
        chunk=config.chunk,
        beam=config.beam,
        criterion=config.criterion,
        threshold=config.threshold,
        max_tokens=config.max_tokens,
        sampling=config.sampling,
        loop_guard=LoopGuard() if config.loop_guard else None,
        seed=config.seed,
        skip=done,
        labels=[f"{config.data}, line {problem.line}" for problem in problems],
    )


def open_run(config: SelectConfig, problems: Sequence[ProblemRow]) -> frozenset[int]:
    """Make the output directory ready and return the indices of the prompts that are done.

    With resume, both journals are cut back to the prompts that are complete in both. Raises InputError on an output
    directory that cannot be used, holds a run that is not to be resumed, or was begun with other data.
    """
    output_dir = Path(config.output_dir)
    journal, decisions = output_dir / "selections.jsonl", output_dir / "decisions.jsonl"
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"output_dir {output_dir} cannot be made: {error.strerror}") from None
    rows, ends = complete_rows(journal)
    if not config.resume:
        if journal.exists() and journal.stat().st_size:
            raise InputError(
                f"{journal} holds {len(rows)} prompts already; pass --resume, or choose another output_dir"
            )
        truncate(decisions, 0)
        return frozenset()
    decided, decided_ends = complete_rows(decisions)
    both = 0
    while both < min(len(rows), len(decided)) and rows[both].get("index") == decided[both].get("index"):
        both += 1
    for row in rows[:both]:
        _check_same_problem(row, config, problems, journal)
    truncate(journal, ends[both - 1] if both else 0)
    truncate(decisions, decided_ends[both - 1] if both else 0)
    return frozenset(row["index"] for row in rows[:both])


def _check_same_problem(
    row: Mapping[str, Any], config: SelectConfig, problems: Sequence[ProblemRow], journal: Path
) -> None:
    index = row["index"]
    if index >= len(problems) or problems[index].prompt != row["prompt"]:
        raise InputError(
            f"{config.data} is not the file that {journal} was begun with: row {index} differs; "
            "choose another output_dir"
        )


def _record_run(output_dir: Path, config: SelectConfig, engine: Engine, resumed: bool) -> None:
    """Write run.json, or check that a resumed run goes on with the same settings and models."""
    run = {
        "command": "select",
        "config": dataclasses.asdict(config),
        "fingerprints": dict(engine.fingerprints),
        "versions": {name: version(name) for name in ("genssd", "torch", "transformers")},
        "python": platform.python_version(),
    }
    path = output_dir / "run.json"
    if not resumed:
        write_json(path, run)
        return
    before = read_json(path)
    for name in SETTINGS_OF_THE_RESULT:
        old, new = before["config"][name], dataclasses.asdict(config)[name]
        if old != new:
            raise InputError(
                f"{output_dir} was begun with {name}={old!r}, not {new!r}; resume with the same settings, or choose "
                "another output_dir"
            )
    if before["fingerprints"] != run["fingerprints"]:
        raise InputError(f"{output_dir} was begun with other models or other weights; choose another output_dir")


def _summary(journal: Path) -> SelectSummary:
    rows, _ = complete_rows(journal)
    statuses: dict[str, int] = {}
    for row in rows:
        statuses[row["status"]] = statuses.get(row["status"], 0) + 1
    return SelectSummary(
        path=journal,
        prompts=len(rows),
        statuses=statuses,
        tokens_kept=sum(len(row["completion_ids"]) for row in rows),
        tokens_sampled=sum(row["tokens_sampled"] for row in rows),
    )
