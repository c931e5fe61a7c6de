"""`genssd distill`: rounds of select and train; the student of one round chooses in the next.

OUTPUT_DIR/run.json                settings, fingerprints of the models, versions
OUTPUT_DIR/rounds.jsonl            one line per finished round: what was kept, the loss, the accuracy
OUTPUT_DIR/bad_rows.txt            what could not be used, did not fit or was not evaluated, by file and line
OUTPUT_DIR/summary.json            the number of rounds, the last student, and how many rows could not be used
OUTPUT_DIR/round-N/problems.jsonl  the problems of the round
OUTPUT_DIR/round-N/select/         as `genssd select` leaves it
OUTPUT_DIR/round-N/kept.jsonl      finished trajectories with the right answer: what is trained on
OUTPUT_DIR/round-N/train/          as `genssd train` leaves it: the student of the next round
OUTPUT_DIR/round-N/evaluate/       with eval_data; round-0 is the student at the start
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from genssd.distill.data.overlap import EvalOverlap, find_eval_overlap, iter_file_questions, list_problems
from genssd.distill.data.problems import ProblemRow, describe_problems
from genssd.distill.evaluate.config import EvaluateConfig
from genssd.distill.evaluate.run import read_answered_problems, run_evaluate
from genssd.distill.files.rows import read_rows
from genssd.distill.rounds.config import DistillConfig
from genssd.distill.rounds.data import RoundProblems, keep_trajectories
from genssd.distill.rounds.training import check_places, train_round
from genssd.distill.runs.chat_settings import PairChatSettings
from genssd.distill.runs.effects import check_effects
from genssd.distill.runs.hub_upload import prepare_repository, upload_model
from genssd.distill.runs.journal import damaged_line, read_number, read_texts
from genssd.distill.runs.output_files import JOURNALS
from genssd.distill.runs.pool_options import PoolOptions
from genssd.distill.runs.progress import SILENT, Progress
from genssd.distill.runs.run import Run
from genssd.distill.runs.served_teacher import find_fingerprints
from genssd.distill.select.beginning import check_search
from genssd.distill.select.config import SelectConfig
from genssd.distill.select.run import run_select
from genssd.engine.checkpoints.checkpoint import locate
from genssd.engine.checkpoints.parameters import count_stored_parameters
from genssd.engine.common.errors import CapacityError, InputError
from genssd.engine.host.threads import choose_training_threads

MAX_LISTED = 10
"""Maximum number of rows that an error message lists."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundSummary:
    """The results of one round."""

    round: int
    prompts: int
    statuses: Mapping[str, int]
    """Number of selections by status."""
    kept: int
    """Number of the round's trajectories that were trained on."""
    left_out: Mapping[str, int]
    """Number of the round's trajectories that were not trained on, by reason."""
    mean_tokens: float
    """Mean number of tokens in the kept trajectories."""
    mean_score: float | None
    """Mean value of the criterion over the kept trajectories, by the student that chose them."""
    loss: float
    """Loss of the last training step."""
    accuracy: float | None
    """Greedy accuracy on eval_data after the round. None without eval_data."""
    student: str
    """Directory of the trained student."""
    bad_rows: Sequence[str]
    """Rows that could not be used, and why: of the data (of all rounds), of the calibration's data and of eval_data,
    and the round's problems that are too long or did not fit into the cache."""


class BudgetReached(Exception):
    """The end of a run because `select.total_budget` ended the selection of a round. Its text says what is done."""


def run_distill(config: DistillConfig, report: Progress = SILENT) -> Iterator[RoundSummary]:
    """Run the rounds and yield each as it ends, rounds of an earlier part of the run first.

    Raises GenssdError on bad input, BudgetReached when the budget of a round's selection is reached; what was finished
    is on disk. With push_to_hub, InputError where the hub does not take the last student.
    """
    check_effects(config)
    check_search(config.select, [config.teacher], config.student)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError(
            "distill starts the processes of its trainings itself (devices, processes): not under torchrun"
        )
    if config.push_to_hub is not None:
        prepare_repository(config.push_to_hub)
    config = dataclasses.replace(config, select=config.make_select_settings())
    check_places(config)
    problems = RoundProblems.read(
        config.data, system_prompt=config.system_prompt, are_answers_needed=config.require_correct
    )
    if config.train.teacher_model_name_or_path is not None:
        locate(config.train.teacher_model_name_or_path)
    for path in (*config.train.eval_data, *((config.eval_data,) if config.eval_data else ())):
        next(read_rows(path), None)  # before hours of selecting
    overlap = _find_overlap(config, problems.data.problems)
    if overlap is not None:
        overlap.check(is_allowed=config.allow_eval_overlap)
    training_begun = any(Path(config.output_dir).glob("round-*/train/metrics.jsonl"))
    free = () if training_begun else ("train",)
    fingerprints = find_fingerprints(config.select, config.teacher, None)
    with Run.open(
        config, "distill", journal=JOURNALS["distill"], fingerprints=fingerprints, parts="round-*", free=free
    ) as run:
        config = dataclasses.replace(config, template_date=run.template_date)
        config = _fix_threads(config, run)
        summaries = _finished_rounds(run)
        run.record()
        report.note(describe_problems(problems.data.problems, config.data, bad_rows=len(problems.data.faults)))
        student = config.student
        if config.eval_data is not None and not summaries:
            _evaluate(config, 0, student, report)
        done = max(config.rounds, *summaries) if summaries else config.rounds
        bad_rows: dict[str, None] = {}
        for number in range(1, done + 1):
            summary = summaries.get(number)
            if summary is None:  # what is finished of the round is read from its directory
                summary = _round(config, problems, number, student, report)
                run.journal.append(dataclasses.asdict(summary))
            student = summary.student
            bad_rows |= dict.fromkeys(summary.bad_rows)
            yield summary
        run.write_bad_rows(tuple(bad_rows))
        counts = None if overlap is None else overlap.counts()
        run.write_summary({"rounds": done, "student": student, "eval_overlap": counts, "bad_rows": len(bad_rows)})
    if config.push_to_hub is not None:
        upload_model(config.push_to_hub, Path(student))


def _fix_threads(config: DistillConfig, run: Run) -> DistillConfig:
    """Return the config with the numbers of threads of its parts; that of the trainings is the recorded one."""
    parameters = count_stored_parameters(locate(config.student))
    wanted = config.train.threads or config.threads
    examples = config.train.per_device_train_batch_size
    training = run.fix_threads(choose_training_threads(wanted, parameters, examples=examples))
    select = dataclasses.replace(config.select, threads=config.select.threads or config.threads)
    return dataclasses.replace(config, select=select, train=dataclasses.replace(config.train, threads=training.count))


def _find_overlap(config: DistillConfig, problems: Sequence[ProblemRow]) -> EvalOverlap | None:
    """Return the problems whose question stands in the evaluation data; None without such data."""
    held_out = list(iter_file_questions(config.train.eval_data))
    if config.eval_data is not None:
        exam = read_answered_problems(config.eval_data, config.eval_limit, system_prompt=config.system_prompt)
        held_out += list_problems(exam.problems)
    return find_eval_overlap(list_problems(problems), held_out) if held_out else None


def _chat_settings(config: DistillConfig) -> dict[str, Any]:
    """Return the options of rendering chats, for the search of a round."""
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(PairChatSettings)}


def _finished_rounds(run: Run) -> dict[int, RoundSummary]:
    """Return the rounds in the journal by their numbers. Raises InputError on a damaged line."""
    summaries: dict[int, RoundSummary] = {}
    for number, row in enumerate(run.done(), start=1):
        try:
            summary = RoundSummary(**row)
        except TypeError:
            raise damaged_line(run.journal_path, number, "it is no round") from None
        if summary.round in summaries:
            raise damaged_line(run.journal_path, number, f"round {summary.round} is also in an earlier line")
        summaries[summary.round] = summary
    return summaries


def _round(config: DistillConfig, problems: RoundProblems, number: int, student: str, report: Progress) -> RoundSummary:
    directory = Path(config.output_dir) / f"round-{number}"
    part = problems.write(directory / "problems.jsonl", number, config.prompts_per_round)
    settings = {f.name: getattr(config.select, f.name) for f in dataclasses.fields(config.select)}
    selecting = SelectConfig(
        **{**settings, **_chat_settings(config), "seed": config.select.seed + number - 1},
        teacher=config.teacher,
        student=student,
        data=str(part.path),
        output_dir=str(directory / "select"),
        resume=True,
    )
    selected = run_select(selecting, report=report.within(f"round {number}, select"))
    stop = selected.describe_stop(config.select.total_budget)
    if stop is not None:
        raise BudgetReached(f"round {number}: select.{stop}")
    bad_rows = part.name_origins(selected.bad_rows)
    kept, left_out = keep_trajectories(
        selected.path, directory / "kept.jsonl", statuses=config.train.statuses, require_correct=config.require_correct
    )
    if not kept:
        raise _make_empty_error(number, left_out, selected.path, bad_rows, fits=bool(selected.prompts))
    loss = train_round(config, number, student, report)
    trained = str(directory / "train")
    accuracy: float | None = None
    not_evaluated: Sequence[str] = ()
    if config.eval_data is not None:
        accuracy, not_evaluated = _evaluate(config, number, trained, report)
    scores = [row["score"] for row in kept if row["score"] is not None]
    return RoundSummary(
        round=number,
        prompts=selected.prompts,
        statuses=selected.statuses,
        kept=len(kept),
        left_out=left_out,
        mean_tokens=sum(len(row["completion_ids"]) for row in kept) / len(kept),
        mean_score=sum(scores) / len(scores) if scores else None,
        loss=loss,
        accuracy=accuracy,
        student=trained,
        bad_rows=[*problems.data.list_bad_rows(), *bad_rows, *not_evaluated],
    )


def _make_empty_error(
    number: int, left_out: Mapping[str, int], selections: Path, bad_rows: Sequence[str], *, fits: bool
) -> InputError | CapacityError:
    """Return the error of a round without a trajectory to train on. fits: whether any prompt could be run."""
    listed = "".join(f"\n  {message}" for message in bad_rows[:MAX_LISTED])
    if not fits:
        return CapacityError(f"round {number}: none of its prompts could be run:{listed}")
    counts = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
    unusable = f"; these rows could not be used:{listed}" if bad_rows else ""
    return InputError(
        f"round {number}: no trajectory is left to train on ({counts}); look at {selections}, raise max_tokens or the "
        f"threshold, or give --no-require-correct{unusable}"
    )


def _evaluate(config: DistillConfig, number: int, model: str, report: Progress) -> tuple[float, tuple[str, ...]]:
    """Return the greedy accuracy of a model on eval_data, and why other rows of it were not evaluated.

    It is measured once and then read from summary.json.
    """
    assert config.eval_data is not None
    directory = Path(config.output_dir) / f"round-{number}" / "evaluate"
    summary = directory / "summary.json"
    if summary.exists():
        return read_number(summary, "accuracy", "value"), read_texts(summary, "not_evaluated")
    engine = {f.name: getattr(config.select, f.name) for f in dataclasses.fields(PoolOptions)}
    evaluating = EvaluateConfig(
        **engine,
        **config.as_student_settings(),
        model=model,
        data=config.eval_data,
        limit=config.eval_limit,
        output_dir=str(directory),
        max_tokens=config.select.max_tokens,
        stop=config.select.stop,
        include_stop=config.select.include_stop,
        resume=True,
    )
    evaluation = run_evaluate(evaluating, report=report.within(f"round {number}, evaluate"))
    return evaluation.accuracy.value, evaluation.not_evaluated
