"""`genssd select`: problems in, a crash-safe journal of selected trajectories out.

OUTPUT_DIR/run.json           the settings, model fingerprints and versions
OUTPUT_DIR/calibration.json   the threshold that was taken from data, if it was
OUTPUT_DIR/selections.jsonl   one line per finished prompt: what training reads
OUTPUT_DIR/decisions.jsonl    the same prompts in the same order: every candidate, its scores and its verdict
OUTPUT_DIR/teacher_topk.bin   the teacher's most likely tokens along each best trajectory, with --teacher-topk
OUTPUT_DIR/summary.json       counts of prompts, statuses and tokens

A prompt's decisions and top k are on disk before its selection: where there is a selection line, nothing is missing.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from genssd.distill.data.problems import ProblemRow, check_same_problem, read_problems
from genssd.distill.data.topk_store import TopkStore, check_topk_file, find_topk_end
from genssd.distill.runs.chat_settings import ChatSettings
from genssd.distill.runs.effects import Need, Needs
from genssd.distill.runs.engine_options import EngineOptions
from genssd.distill.runs.journal import Journal, complete_rows, damaged_line, has_lines, read_number, write_json
from genssd.distill.runs.run import Run
from genssd.distill.runs.settings import FileName, ModelPath, Operational
from genssd.distill.runs.writing import keep_spans
from genssd.distill.select.calibration import calibrate, check_calibration
from genssd.distill.select.rows import Origin, make_decision_row, make_selection_row, translate_selection
from genssd.engine.engine import Engine
from genssd.engine.errors import InputError
from genssd.engine.search_options import SearchOptions
from genssd.engine.selection import Selection

TOPK_FILE = "teacher_topk.bin"


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibrate:
    """A threshold chosen so that a given fraction of the teacher's plain chunks passes it."""

    NEEDS: ClassVar[Needs] = {name: Need(lambda o: o.data is not None, "calibrate.data") for name in ("share", "limit")}

    data: FileName[str | None] = None
    """Data file of problems for the calibration, other ones than those of the run. None: no calibration."""
    share: float = 0.95
    """Fraction of the teacher's chunks that the threshold lets pass, in (0, 1]."""
    limit: int = 64
    """Maximum number of problems that are read from calibrate.data."""

    def __post_init__(self) -> None:
        if self.limit < 1:
            raise InputError(f"calibrate.limit must be at least 1, not {self.limit}")


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectSettings(SearchOptions, EngineOptions):
    """Options of the search, of the engine, and of the threshold's calibration."""

    criterion: str = "ppl"
    """Selection criterion: a registered name (rsr), one with options (ppl(norm='byte')), a weighted sum of ranks
    (0.7*rsr + 0.3*lalp), or an import path (package.module:Name)."""
    loop_guard: bool = True
    """Whether candidates that end in a repetition are rejected."""
    calibrate: Calibrate = field(default_factory=Calibrate)
    """Options for computing the threshold from plain samples of the teacher, in place of `threshold`."""

    def __post_init__(self) -> None:
        # the options of the search are checked in run_select: what is raised here, the command line breaks into a frame
        if self.calibrate.data is not None:
            if self.threshold is not None:
                raise InputError("give a threshold or calibrate.data, not both")
            check_calibration(self.criterion, self.calibrate.share)


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectConfig(SelectSettings, ChatSettings):
    """Let the student choose what the teacher writes, prompt by prompt."""

    teacher: ModelPath[str]
    """Hub id or local directory of the model that writes."""
    student: ModelPath[str]
    """Hub id or local directory of the model that scores."""
    # the rows are compared with the journal's one by one, so that a file that has grown can be resumed
    data: Operational[FileName[str]]
    """Data file of problems (JSON lines, CSV, Parquet or Arrow, also compressed), - for standard input, or
    ORG/NAME:SPLIT of the Hugging Face hub. Its rows have prompt (text or messages), messages, or question | problem |
    instruction."""
    output_dir: Operational[FileName[str]] = "runs/select"
    """Directory that the journal is written to."""
    resume: Operational[bool] = False
    """Continue an interrupted run: prompts that are in the journal are not run again."""
    limit: Operational[int | None] = None
    """Take only the first rows of the data."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectProgress:
    """How far a run is. Token counts are those of this process; tokens_kept counts the best trajectories."""

    done: int
    total: int
    tokens_kept: int
    tokens_sampled: int
    pages_in_use: int
    pages: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectSummary:
    """What a finished run has written. `statuses` counts over the whole journal, earlier parts of the run included."""

    path: Path
    prompts: int
    statuses: Mapping[str, int]
    tokens_kept: int
    tokens_sampled: int
    failures: tuple[str, ...]
    """Prompts that did not fit into the cache, and why. They are in no journal: resuming tries them again."""


def run_select(
    config: SelectConfig, engine: Engine | None = None, report: Callable[[SelectProgress], None] = lambda progress: None
) -> SelectSummary:
    """Select over a file of problems. engine: a loaded engine to use instead of loading the config's models.

    Raises GenssdError on bad input; prompts that were finished before are in the journal.
    """
    config.with_changes()  # checks the options of the search before anything is read or loaded
    problems = read_problems(config.data, config.limit, system_prompt=config.system_prompt)
    if config.calibrate.data is not None and not config.resume:
        _read_calibration(config)  # before any model is loaded
    fingerprints = None if engine is None else engine.fingerprints
    with Run.open(config, "select", journal="selections.jsonl", fingerprints=fingerprints) as run:
        done = keep_complete(run, config, problems)
        engine = run.use(config.open_engine(engine, run.chat_options, teacher=config.teacher, student=config.student))
        failures = _search(run, config, engine, problems, done, report)
        summary = _summary(run, failures)
        run.write_summary({**dataclasses.asdict(summary), "path": run.journal_path.name})
    return summary


def _search(
    run: Run,
    config: SelectConfig,
    engine: Engine,
    problems: Sequence[ProblemRow],
    done: frozenset[int],
    report: Callable[[SelectProgress], None],
) -> list[str]:
    """Run the prompts that are not done and journal each as it ends; return what did not fit into the cache."""
    threshold = config.threshold if config.calibrate.data is None else _calibrated(engine, config, run)
    origin = Origin(
        data=config.data,
        criterion=config.criterion,
        teacher=config.teacher,
        student=config.student,
        fingerprints={role: engine.fingerprints[role] for role in ("teacher", "student")},
        tokenizer=engine.tokenizer("student").fingerprint,
    )
    if config.teacher_topk and not engine.token_map.is_identity:
        raise InputError(f"teacher_topk needs models whose tokens are the same: {engine.token_map.describe()}")
    failures: list[str] = []
    tokens_kept, sampled_before = 0, engine.usage.sampled_tokens
    topk_end = max(map(find_topk_end, run.done()), default=0)
    selections = run.journal
    with (
        Journal(run.path("decisions.jsonl")) as decisions,
        TopkStore(run.path(TOPK_FILE), topk_end) if config.teacher_topk else nullcontext() as topk_store,
    ):
        for finished, selected in enumerate(_select(engine, config, threshold, problems, done), start=1):
            selection = translate_selection(selected, engine.token_map)
            problem = problems[selection.index]
            if selection.error is None:
                decisions.append(make_decision_row(selection))
                topk = selection.best.teacher_topk
                place = topk_store.append(topk) if topk_store is not None and topk is not None else None
                selections.append({**make_selection_row(selection, problem, origin), "teacher_topk": place})
                tokens_kept += len(selection.best.token_ids)
            else:
                failures.append(f"{problem.where}: {selection.error}")
            report(
                SelectProgress(
                    done=len(done) + finished,
                    total=len(problems),
                    tokens_kept=tokens_kept,
                    tokens_sampled=engine.usage.sampled_tokens - sampled_before,
                    pages_in_use=engine.pages_in_use[0],
                    pages=engine.pages_in_use[1],
                )
            )
    return failures


def _read_calibration(config: SelectConfig) -> list[ProblemRow]:
    assert config.calibrate.data is not None
    return read_problems(config.calibrate.data, config.calibrate.limit, system_prompt=config.system_prompt)


def _calibrated(engine: Engine, config: SelectConfig, run: Run) -> float:
    """Return the threshold of this run, which is measured once and read again when the run is resumed."""
    path = run.path("calibration.json")
    if run.resumed:
        return read_number(path, "threshold")
    problems = _read_calibration(config)
    calibration = calibrate(
        engine,
        [problem.prompt for problem in problems],
        config,
        fraction=config.calibrate.share,
        labels=[problem.where for problem in problems],
        answers=[problem.answer for problem in problems],
    )
    run.record()
    write_json(path, calibration.as_json())
    return calibration.threshold


def _select(
    engine: Engine,
    config: SelectConfig,
    threshold: float | None,
    problems: Sequence[ProblemRow],
    done: frozenset[int],
) -> Iterator[Selection]:
    return engine.iter_select_expand(
        [problem.prompt for problem in problems],
        config,
        threshold=threshold,
        answers=[problem.answer for problem in problems],
        skip=done,
        labels=[problem.where for problem in problems],
    )


def keep_complete(run: Run, config: SelectConfig, problems: Sequence[ProblemRow]) -> frozenset[int]:
    """Cut both journals back to the prompts that are in both, in the order of the selections; return their indices.

    A prompt that only one of them holds is done again: a crash, or the user who removed a damaged line, left it so.
    Raises InputError when the run was begun with other data, and when a file of finished prompts is lost.
    """
    decisions = run.path("decisions.jsonl")
    _check_neither_lost(run.journal_path, decisions)
    selected: dict[int, int] = {}
    for number, row in enumerate(run.done()):
        check_same_problem(row, problems, config.data, run.journal_path)
        if row["index"] in selected:
            raise damaged_line(run.journal_path, number + 1, f"prompt {row['index']} is also in an earlier line")
        selected[row["index"]] = number
    decided: dict[object, tuple[int, int]] = {}
    start = 0
    for row, end in complete_rows(decisions):
        decided[row.get("index")] = (start, end)
        start = end
    if config.teacher_topk:
        check_topk_file(run.path(TOPK_FILE), run.done(), run.journal_path, decisions)
    done = [index for index in selected if index in decided]
    run.keep_rows([selected[index] for index in done])
    keep_spans(decisions, [decided[index] for index in done])
    return frozenset(done)


def _check_neither_lost(selections: Path, decisions: Path) -> None:
    """Raise InputError where one of the two journals holds lines and the other is missing."""
    for lost, held in ((selections, decisions), (decisions, selections)):
        if not lost.exists() and has_lines(held):
            raise InputError(
                f"{lost} is lost, and {held.name} beside it is not; restore it, or remove {held} to begin anew"
            )


def _summary(run: Run, failures: Sequence[str]) -> SelectSummary:
    statuses: Counter[str] = Counter()
    kept = sampled = 0
    for row in run.done():
        statuses[row["status"]] += 1
        kept += len(row["completion_ids"])
        sampled += row["tokens_sampled"]
    return SelectSummary(
        path=run.journal_path,
        prompts=statuses.total(),
        statuses=dict(statuses),
        tokens_kept=kept,
        tokens_sampled=sampled,
        failures=tuple(failures),
    )
