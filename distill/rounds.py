"""`genssd distill`: rounds of select and train; the student of one round chooses in the next.

OUTPUT_DIR/run.json                settings, fingerprints of the models, versions
OUTPUT_DIR/rounds.jsonl            one line per finished round: what was kept, the loss, the accuracy
OUTPUT_DIR/summary.json            the number of rounds and the last student
OUTPUT_DIR/round-N/problems.jsonl  the problems of the round
OUTPUT_DIR/round-N/select/         as `genssd select` leaves it
OUTPUT_DIR/round-N/kept.jsonl      finished trajectories with the right answer: what is trained on
OUTPUT_DIR/round-N/train/          as `genssd train` leaves it: the student of the next round
OUTPUT_DIR/round-N/evaluate/       with eval_data; round-0 is the student at the start
"""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from genssd.distill.answers.judge import AnswerJudge
from genssd.distill.console import report_training
from genssd.distill.data.overlap import EvalOverlap, find_eval_overlap, iter_file_questions, list_problems
from genssd.distill.data.problems import ProblemRow, read_problems
from genssd.distill.evaluating import EvaluateConfig, run_evaluate
from genssd.distill.files.rows import read_rows
from genssd.distill.runs.chat_settings import ChatSettings
from genssd.distill.runs.effects import Need, Needs, check_effects
from genssd.distill.runs.engine_options import EngineOptions
from genssd.distill.runs.journal import complete_rows, damaged_line, read_json, read_number, write_json, write_jsonl
from genssd.distill.runs.progress import SILENT, Progress
from genssd.distill.runs.run import Run
from genssd.distill.runs.settings import DataFile, FileName, ModelPath, Operational
from genssd.distill.runs.writing import remove_directory, write_bytes
from genssd.distill.select.run import SelectConfig, SelectSettings, run_select
from genssd.distill.train.checkpoints import list_checkpoints
from genssd.distill.train.config import TrainConfig, TrainSettings
from genssd.distill.train.trainer import run_train
from genssd.engine.checkpoint import locate
from genssd.engine.config import ModelConfig
from genssd.engine.errors import CapacityError, InputError
from genssd.engine.options_check import check_types
from genssd.engine.parameters import count_parameters
from genssd.engine.text import Tokenizer
from genssd.engine.threads import check_threads, choose_training_threads


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillConfig(ChatSettings):
    """Rounds in which the student chooses what the teacher writes and is then trained on it."""

    NEEDS: ClassVar[Needs] = {
        "eval_limit": Need(lambda o: o.eval_data is not None, "eval_data"),
        "allow_eval_overlap": Need(
            lambda o: o.eval_data is not None or bool(o.train.eval_data), "eval_data or train.eval_data"
        ),
    }

    teacher: ModelPath[str]
    """Hub id or local directory of the model that writes."""
    student: ModelPath[str]
    """Hub id or local directory of the model to train; it scores in the first round."""
    data: DataFile[str]
    """Data file of problems, as for select."""
    output_dir: Operational[FileName[str]] = "runs/distill"
    """Directory that all rounds are written to."""
    resume: Operational[bool] = False
    """Continue an interrupted run. More rounds may be asked for than before."""
    rounds: Operational[int] = 2
    """Number of rounds."""
    prompts_per_round: int | None = None
    """Number of problems in a round: each round takes the next ones, and starts again at the end of the file. None:
    every round takes all problems."""
    threads: Operational[int | None] = None
    """Number of CPU threads of all parts. None: every part chooses, as its command does; --select.threads and
    --train.threads are those of one part. A resumed run trains with the number that it was begun with."""
    restart: bool = False
    """Train every round from the first student, on the trajectories of all rounds so far. Otherwise each round trains
    the student of the round before, on its own trajectories."""
    require_correct: bool = True
    """Train only on trajectories that give the reference answer of their problem. A problem without a reference answer
    is refused; --no-require-correct trains on all trajectories."""
    eval_data: DataFile[str | None] = None
    """Data file of problems with answers, on which every round's student is evaluated."""
    eval_limit: int | None = None
    """Take only the first rows of eval_data."""
    # a guard, which changes no result
    allow_eval_overlap: Operational[bool] = False
    """Run also where questions of the data stand in eval_data or train.eval_data, exactly or with other case, spaces
    or punctuation; summary.json counts them."""
    select: SelectSettings = field(default_factory=SelectSettings)
    """How every round selects. The seed of round N is this seed plus N - 1."""
    train: TrainSettings = field(default_factory=TrainSettings)
    """How every round trains. These settings may change until the first training begins."""

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("rounds", "prompts_per_round", "eval_limit"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, not {getattr(self, name)}")
        check_threads(self.threads)
        if self.train.fsdp:
            raise InputError("distill runs in one process: train.fsdp is for `genssd train` under torchrun")
        if self.train.uses_rows and not self.select.teacher_topk:
            raise InputError(
                "train.kd_ratio needs the teacher's top k: give --select.teacher-topk, or a "
                "train.teacher_model_name_or_path"
            )


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


def run_distill(config: DistillConfig, report: Progress = SILENT) -> Iterator[RoundSummary]:
    """Run the rounds and yield each as it ends, rounds of an earlier part of the run first.

    Raises GenssdError on bad input; what was finished is on disk.
    """
    check_effects(config)
    problems = read_problems(config.data, system_prompt=config.system_prompt)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("distill runs in one process, not under torchrun")
    unanswered = next((problem for problem in problems if problem.answer is None), None)
    if config.require_correct and unanswered is not None:
        raise InputError(
            f"{unanswered.where}: no reference answer, by which require_correct chooses what is trained on; give "
            "--no-require-correct to train on all trajectories"
        )
    if config.train.teacher_model_name_or_path is not None:
        locate(config.train.teacher_model_name_or_path)
    for path in (*config.train.eval_data, *((config.eval_data,) if config.eval_data else ())):
        next(read_rows(path), None)  # before hours of selecting
    overlap = _find_overlap(config, problems)
    if overlap is not None:
        overlap.check(is_allowed=config.allow_eval_overlap)
    training_begun = any(Path(config.output_dir).glob("round-*/train/metrics.jsonl"))
    free = () if training_begun else ("train",)
    with Run.open(config, "distill", journal="rounds.jsonl", parts="round-*", free=free) as run:
        config = dataclasses.replace(config, template_date=run.template_date)
        config = _fix_threads(config, run)
        summaries = _finished_rounds(run)
        run.record()
        student = config.student
        if config.eval_data is not None and not summaries:
            _evaluate(config, 0, student, report)
        done = max(config.rounds, *summaries) if summaries else config.rounds
        for number in range(1, done + 1):
            summary = summaries.get(number)
            if summary is None:  # what is finished of the round is read from its directory
                summary = _round(config, number, student, report)
                run.journal.append(dataclasses.asdict(summary))
            student = summary.student
            yield summary
        counts = None if overlap is None else overlap.counts()
        run.write_summary({"rounds": done, "student": student, "eval_overlap": counts})


def _fix_threads(config: DistillConfig, run: Run) -> DistillConfig:
    """Return the config with the numbers of threads of its parts; that of the trainings is the recorded one."""
    student = ModelConfig.load(locate(config.student))
    wanted = config.train.threads or config.threads
    examples = config.train.per_device_train_batch_size
    training = run.fix_threads(choose_training_threads(wanted, count_parameters(student), examples=examples))
    select = dataclasses.replace(config.select, threads=config.select.threads or config.threads)
    return dataclasses.replace(config, select=select, train=dataclasses.replace(config.train, threads=training.count))


def _find_overlap(config: DistillConfig, problems: Sequence[ProblemRow]) -> EvalOverlap | None:
    """Return the problems whose question stands in the evaluation data; None without such data."""
    held_out = list(iter_file_questions(config.train.eval_data))
    if config.eval_data is not None:
        eval_problems = read_problems(config.eval_data, config.eval_limit, system_prompt=config.system_prompt)
        held_out += list_problems(eval_problems)
    return find_eval_overlap(list_problems(problems), held_out) if held_out else None


def _chat_settings(config: DistillConfig) -> dict[str, Any]:
    """Return the options of rendering chats, for the commands of a round."""
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(ChatSettings)}


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


def _round(config: DistillConfig, number: int, student: str, report: Progress) -> RoundSummary:
    directory = Path(config.output_dir) / f"round-{number}"
    problems = directory / "problems.jsonl"
    write_bytes(problems, _problems(config, number))
    settings = {f.name: getattr(config.select, f.name) for f in dataclasses.fields(config.select)}
    selecting = SelectConfig(
        **{**settings, **_chat_settings(config), "seed": config.select.seed + number - 1},
        teacher=config.teacher,
        student=student,
        data=str(problems),
        output_dir=str(directory / "select"),
        resume=True,
    )
    selected = run_select(selecting, report=report.within(f"round {number}, select"))
    if selected.failures:
        listed = "".join(f"\n  {failure}" for failure in selected.failures[:10])
        raise CapacityError(f"round {number}: {len(selected.failures)} prompts do not fit into the cache:{listed}")
    kept, left_out = _keep(config, selected.path, directory / "kept.jsonl")
    if not kept:
        raise InputError(
            f"round {number}: no trajectory is left to train on ({_list_counts(left_out)}); look at {selected.path}, "
            "raise max_tokens or the threshold, or give --no-require-correct"
        )
    loss = _train(config, number, student, report)
    trained = str(directory / "train")
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
        accuracy=None if config.eval_data is None else _evaluate(config, number, trained, report),
        student=trained,
    )


def _list_counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in counts.items())


def _problems(config: DistillConfig, number: int) -> list[bytes]:
    """Return the rows of the data file that belong to a round, as lines of JSON."""
    lines = [row.text + b"\n" for row in read_rows(config.data)]
    count = config.prompts_per_round
    if count is None:
        return lines
    return [lines[i % len(lines)] for i in range((number - 1) * count, number * count)]


def _keep(config: DistillConfig, selections: Path, path: Path) -> tuple[Sequence[Mapping[str, Any]], Mapping[str, int]]:
    """Write the trajectories that are trained on; return them, and the number of the others by reason."""
    rows: list[Mapping[str, Any]] = []
    left_out: Counter[str] = Counter()
    judge = AnswerJudge(Tokenizer(locate(config.teacher))) if config.require_correct else None
    for row, _ in complete_rows(selections):
        if row["status"] not in config.train.statuses:
            left_out[f"status {row['status']}"] += 1
            continue
        if judge is not None:
            verdict = judge.judge(row["prompt_ids"], row["completion_ids"], row["answer"])
            if not verdict.is_correct:
                left_out["wrong" if verdict.undecided is None else "undecided"] += 1
                continue
        if row["teacher_topk"] is not None:
            row["teacher_topk"]["file"] = f"select/{row['teacher_topk']['file']}"
        rows.append(row)
    write_jsonl(path, rows)
    return rows, dict(left_out)


def _train(config: DistillConfig, number: int, student: str, report: Progress) -> float:
    directory = Path(config.output_dir) / f"round-{number}" / "train"
    finished = directory / "finished.json"
    if finished.exists():
        return read_number(finished, "loss")
    begun = bool(list_checkpoints(directory))
    if directory.exists() and not begun:
        remove_directory(directory)  # it ended before its first checkpoint
    rounds = range(1, number + 1) if config.restart else (number,)
    settings = {f.name: getattr(config.train, f.name) for f in dataclasses.fields(config.train)}
    training = TrainConfig(
        **settings,
        **_chat_settings(config),
        allow_eval_overlap=config.allow_eval_overlap and bool(config.train.eval_data),
        model_name_or_path=config.student if config.restart else student,
        data=tuple(str(Path(config.output_dir) / f"round-{r}" / "kept.jsonl") for r in rounds),
        output_dir=str(directory),
        resume_from_checkpoint="last" if begun else None,
    )
    loss = run_train(training, report=report_training(report.within(f"round {number}, train"))).loss
    write_json(finished, {"loss": loss})
    return loss


def _evaluate(config: DistillConfig, number: int, model: str, report: Progress) -> float:
    """Return the greedy accuracy of a model; it is measured once and then read from summary.json."""
    assert config.eval_data is not None
    directory = Path(config.output_dir) / f"round-{number}" / "evaluate"
    summary = directory / "summary.json"
    if summary.exists() and not read_json(summary).get("not_evaluated"):
        return read_number(summary, "accuracy", "value")
    engine = {f.name: getattr(config.select, f.name) for f in dataclasses.fields(EngineOptions)}
    evaluating = EvaluateConfig(
        **engine,
        **_chat_settings(config),
        model=model,
        data=config.eval_data,
        limit=config.eval_limit,
        output_dir=str(directory),
        max_tokens=config.select.max_tokens,
        resume=True,
    )
    evaluation = run_evaluate(evaluating, report=report.within(f"round {number}, evaluate"))
    if evaluation.not_evaluated:
        listed = "".join(f"\n  {failure}" for failure in evaluation.not_evaluated[:10])
        raise CapacityError(f"{len(evaluation.not_evaluated)} problems of eval_data are not evaluated:{listed}")
    return evaluation.accuracy.value
