"""`genssd reproduce`: does selection by the student help, against its rivals and against controls without its signal?

Every arm makes training data in its own way, from the same problems, and trains the same cold start on the same number
of tokens; its student answers the same test problems greedily. That is repeated with several seeds.

OUTPUT_DIR/results.jsonl    journal: a line for every arm of every seed, with the verdict on every test problem
OUTPUT_DIR/results.json     means by arm, and the comparisons with the controls (statistics.py)
OUTPUT_DIR/table.md         the same as tables
OUTPUT_DIR/plot.png         the same as a plot
OUTPUT_DIR/models/          models that the task makes first
OUTPUT_DIR/styles/          what every signal likes, measured before any training (styles.py)
OUTPUT_DIR/seed-N/          problems of a seed; seed-N/WORLD/ARM/ has the rows, the training and the evaluation
OUTPUT_DIR/bad_rows.txt     arms that could not be run, and why
OUTPUT_DIR/summary.json     the number of finished arms

Everything is written after every arm, so that the files hold what is finished wherever the run is stopped. The weights
of a student are removed when it is evaluated.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from genssd.distill.console import report_training
from genssd.distill.evaluate.config import EvaluateConfig
from genssd.distill.evaluate.run import run_evaluate
from genssd.distill.files.rows import read_rows
from genssd.distill.reproduce.apart import ApartTask
from genssd.distill.reproduce.arm_lists import choose_arms, list_arms
from genssd.distill.reproduce.arms import Arm
from genssd.distill.reproduce.config import ReproduceConfig
from genssd.distill.reproduce.making import Place, Rows, make_rows
from genssd.distill.reproduce.plot import draw_plot
from genssd.distill.reproduce.pools import list_pool_criteria
from genssd.distill.reproduce.results import Results, compute_results
from genssd.distill.reproduce.small import SmallTask
from genssd.distill.reproduce.sources import Untrained
from genssd.distill.reproduce.styles import measure_styles, read_styles
from genssd.distill.reproduce.table import render_table, replace_table
from genssd.distill.reproduce.words import WordsTask
from genssd.distill.reproduce.worlds import Task
from genssd.distill.runs.journal import damaged_line, write_json
from genssd.distill.runs.output_files import JOURNALS
from genssd.distill.runs.progress import SILENT, Progress
from genssd.distill.runs.run import Run
from genssd.distill.runs.writing import remove_directory, write_bytes, write_text
from genssd.distill.train.config import TrainConfig
from genssd.distill.train.trainer import run_train
from genssd.engine.common.amounts import format_count
from genssd.engine.common.errors import GenssdError, InputError

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReproduceSummary:
    """Result of a finished run."""

    output_dir: Path
    results: Results
    failures: tuple[str, ...]
    """Arms that could not be run, and why; --resume tries them again."""


def run_reproduce(config: ReproduceConfig, say: Say = lambda text: None, report: Progress = SILENT) -> ReproduceSummary:
    """Run all arms with all seeds. say: takes a line for every arm as it ends, and the time that is left.

    An arm that cannot be run is named in the summary, and the others are run. Raises GenssdError on bad input; what was
    finished is in the journal.
    """
    arms = choose_arms(config.task, config.arms, controls=config.controls)
    with Run.open(config, "reproduce", journal=JOURNALS["reproduce"], parts="seed-*") as run:
        finished = list(run.done())
        run.record()
        _check_journal(finished, run.journal_path, config)
        task = _make_task(config, run.path("models"))
        work = [(seed, arm) for seed, arm in list_work(arms, config.seeds) if not _is_in(finished, seed, arm)]
        failures: list[str] = []
        clock = _Clock(sum(arm.cost for _, arm in work))
        say(f"{format_count(len(work), 'arm')} to run, {format_count(len(finished), 'arm')} finished before")
        for seed, arm in work:
            started = time.monotonic()
            try:
                row = _run_arm(arm, _find_place(config, task, run.output_dir, arm, seed, report))
            except GenssdError as error:
                failures.append(f"{arm.name}, seed {seed}: {error}")
                say(failures[-1])
                continue
            row |= {"seconds": time.monotonic() - started}
            run.journal.append(row)
            finished.append(row)
            write_results(run.output_dir, config, finished)
            left = clock.measure(arm.cost, row["seconds"])
            accuracy = sum(row["correct"]) / len(row["correct"])
            say(f"seed {seed}, {arm.name}: accuracy {accuracy:.1%} in {row['seconds']:.0f} s; {left}")
        results = write_results(run.output_dir, config, finished)
        run.write_bad_rows(failures)
        run.write_summary({"arms": len(arms), "seeds": config.seeds, "finished": len(finished)})
    return ReproduceSummary(output_dir=run.output_dir, results=results, failures=tuple(failures))


def list_work(arms: Sequence[Arm], seeds: int) -> Iterator[tuple[int, Arm]]:
    """Yield seeds and arms in the order in which they run: stage after stage, in each of them seed after seed."""
    for stage in sorted({arm.stage for arm in arms}):
        for seed in range(seeds):
            yield from ((seed, arm) for arm in arms if arm.stage == stage)


def write_results(output_dir: Path, config: ReproduceConfig, rows: Sequence[Mapping[str, Any]]) -> Results:
    """Write the results of the finished arms, and return them."""
    results = compute_results(choose_arms(config.task, ()), rows)
    table = render_table(results, config, read_styles(output_dir / "styles"))
    write_json(output_dir / "results.json", results.as_json())
    write_text(output_dir / "table.md", table)
    write_bytes(output_dir / "plot.png", (draw_plot(results),))
    if config.table is not None:
        path = Path(config.table)
        write_text(path, replace_table(_read_document(path), table, config.task))
    return results


def _read_document(path: Path) -> str:
    """Return the text of the file that a table is written to; nothing where there is none. Raises InputError."""
    try:
        return path.read_text(encoding="utf-8") if path.exists() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"table: {path} cannot be read as text ({error}); name another file") from None


class _Clock:
    """The time that is left, from the time that finished arms took and the costs in the table of arms."""

    def __init__(self, cost: float) -> None:
        self._left = cost
        self._done = 0.0
        self._seconds = 0.0

    def measure(self, cost: float, seconds: float) -> str:
        """Add a finished arm; return in words how long the others take."""
        self._left -= cost
        self._done += cost
        self._seconds += seconds
        minutes = max(0.0, self._left) * self._seconds / self._done / 60
        return f"about {minutes / 60:.1f} h left on this machine" if minutes > 90 else f"about {minutes:.0f} min left"


def _check_journal(rows: Sequence[Mapping[str, Any]], path: Path, config: ReproduceConfig) -> None:
    """Raise InputError on a line of the journal that is no result of an arm of this task."""
    known = {arm.name for arm in choose_arms(config.task, ())}
    for number, row in enumerate(rows, start=1):
        if row.get("arm") not in known or not isinstance(row.get("correct"), list):
            raise damaged_line(path, number, f"it is no result of an arm of {config.task}")


def _is_in(rows: Sequence[Mapping[str, Any]], seed: int, arm: Arm) -> bool:
    return any(row["arm"] == arm.name and row["seed"] == seed for row in rows)


def _make_task(config: ReproduceConfig, models: Path) -> Task:
    sizes = config.sizes
    common: dict[str, Any] = {
        "models": models, "problems": sizes.problems, "multiple": config.candidates,
        "eval_problems": sizes.eval_problems, "steps": config.model_steps, "threads": config.threads,
    }  # fmt: skip
    if config.task == "words":
        assert config.model is not None
        assert config.data is not None
        return WordsTask(base=config.model, data=Path(config.data), **common)
    return SmallTask(**common) if config.task == "small" else ApartTask(mixture=config.task, **common)


def _find_place(config: ReproduceConfig, task: Task, output_dir: Path, arm: Arm, seed: int, report: Progress) -> Place:
    """Return where an arm runs, with its problems and its models, of which the styles are measured first."""
    directory = output_dir / f"seed-{seed}"
    pair = task.make_pair(arm.world, report)
    first = task.write_problems(0, output_dir / "seed-0")
    measure_styles(task, pair, first, output_dir / "styles" / arm.world, config.candidates, report)
    files = task.write_problems(seed, directory)
    files.check_disjoint()
    return Place(
        task=task, sizes=config.sizes, candidates=config.candidates, pair=pair,
        files=files, directory=directory / arm.world, seed=seed, threads=config.threads, report=report,
        criteria=list_pool_criteria(list_arms(config.task)),
    )  # fmt: skip


def _run_arm(arm: Arm, place: Place) -> dict[str, Any]:
    """Make the rows of an arm, train a student on them, evaluate it, and return a line of the journal."""
    directory = place.directory / Path(arm.name).name
    student, tokens = place.pair.student, 0
    rows: Rows | None = None
    trained: list[dict[str, Any]] = []
    if not isinstance(arm.source, Untrained):
        rows = make_rows(arm, place)
        trained = _read_trained_rows(rows.path, arm)
        if trained:  # else the student stays as it was
            student, tokens = _train(arm, place, rows, directory / "student")
    elif arm.source.model == "teacher":
        student = place.pair.teacher
    evaluation = run_evaluate(
        EvaluateConfig(
            model=str(student), data=str(place.files.test), output_dir=str(directory / "evaluation"),
            max_tokens=place.task.max_tokens, resume=True, **place.engine,
        ),
        report=place.report.within(arm.name),
    )  # fmt: skip
    remove_directory(directory / "student")
    return {
        "arm": arm.name,
        "seed": place.seed,
        "teacher_tokens": 0 if rows is None else rows.teacher_tokens,
        "student_tokens": 0 if rows is None else rows.student_tokens,
        "train_tokens": tokens,
        **_describe_rows(place.task, trained),
        "mean_response_tokens": evaluation.mean_tokens,
        "correct": list(evaluation.correct),
    }


def _train(arm: Arm, place: Place, rows: Rows, directory: Path) -> tuple[Path, int]:
    """Train a student on rows, unless they come with one; return its directory and its number of training tokens."""
    if rows.student is not None:
        return rows.student, rows.train_tokens
    remove_directory(directory)  # a training that was stopped begins anew
    settings = place.make_train_settings(arm, arm.tokens)
    config = TrainConfig(
        **settings, model_name_or_path=str(place.pair.student), data=(str(rows.path),), output_dir=str(directory)
    )
    summary = run_train(config, report_training(place.report.within(f"{arm.name}, train")))
    return directory, summary.tokens


def _read_trained_rows(path: Path, arm: Arm) -> list[dict[str, Any]]:
    """Return the rows of a file that a training of the arm takes."""
    rows = [json.loads(row.text) for row in read_rows(str(path))]
    finished = [row for row in rows if row.get("status", "finished") == "finished"]
    only_correct = arm.train.get("require_correct", False)
    return [row for row in finished if row.get("correct") is True or not only_correct]


def _describe_rows(task: Task, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the number of rows, the fraction of right ones, their mean length, and the fractions of their styles."""
    verdicts = [row.get("correct") for row in rows]
    styles = task.count_styles([row["messages"][-1]["content"] for row in rows if row.get("messages")])
    return {
        "rows": len(rows),
        "right": sum(map(bool, verdicts)) / len(rows) if rows and None not in verdicts else None,
        "mean_tokens": sum(len(row["completion_ids"]) for row in rows) / len(rows) if rows else None,
        "styles": {name: count / styles.total() for name, count in styles.items()},
    }
