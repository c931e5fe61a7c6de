"""`genssd distill`: rounds of select, train, and a refreshed student that chooses in the next round.

OUTPUT_DIR/run.json                settings, fingerprints of the models, versions
OUTPUT_DIR/rounds.jsonl            one line per finished round: what was kept, the loss, the accuracy
OUTPUT_DIR/round-N/problems.jsonl  the problems of the round
OUTPUT_DIR/round-N/select/         as `genssd select` leaves it
OUTPUT_DIR/round-N/kept.jsonl      finished trajectories that are not known to be wrong: what is trained on
OUTPUT_DIR/round-N/train/          as `genssd train` leaves it: the student of the next round
OUTPUT_DIR/round-N/evaluate/       with eval_data; round-0 is the student at the start
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from genssd.distill.data.problems import read_lines, read_problems
from genssd.distill.evaluating import EvaluateConfig, is_correct, run_evaluate
from genssd.distill.runs.directory import claim, record_run
from genssd.distill.runs.engine_options import EngineOptions
from genssd.distill.runs.journal import Journal, complete_rows, read_json, truncate, write_json, write_jsonl
from genssd.distill.select.run import SETTINGS_OF_THE_RESULT as OF_SELECTION
from genssd.distill.select.run import SelectConfig, SelectProgress, SelectSettings, run_select
from genssd.distill.train.checkpoints import list_checkpoints
from genssd.distill.train.config import SETTINGS_OF_THE_RESULT as OF_TRAINING
from genssd.distill.train.config import TrainConfig, TrainSettings
from genssd.distill.train.trainer import TrainProgress, run_train
from genssd.engine.checkpoint import fingerprint, locate
from genssd.engine.errors import CapacityError, InputError
from genssd.engine.runner import Role


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillConfig:
    """Rounds of: the student chooses what the teacher writes, is trained on it, and chooses again."""

    teacher: str
    """Hub id or local directory of the model that writes."""
    student: str
    """Hub id or local directory of the model to train; it scores in the first round."""
    data: str
    """JSONL file of problems, as for select."""
    output_dir: str = "runs/distill"
    resume: bool = False
    """Go on with an interrupted run."""
    rounds: int = 2
    prompts_per_round: int | None = None
    """Each round takes the next so many problems, from the beginning again at the end; None: all in every round."""
    restart: bool = False
    """Train every round from the first student, on the trajectories of all rounds so far; else from the last student,
    on those of the round."""
    require_correct: bool = True
    """Leave out trajectories that miss the reference answer, where a problem has one."""
    eval_data: str | None = None
    """Problems with answers on which every round's student is measured."""
    eval_limit: int | None = None
    select: SelectSettings = field(default_factory=SelectSettings)
    """The seed of a round is this one's plus its number, minus 1."""
    train: TrainSettings = field(default_factory=TrainSettings)

    def __post_init__(self) -> None:
        for name in ("rounds", "prompts_per_round", "eval_limit"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.train.fsdp:
            raise InputError("distill runs in one process: train.fsdp is for `genssd train` under torchrun")
        if self.train.uses_rows and not self.select.teacher_topk:
            raise InputError(
                "train.kd_ratio needs the teacher's top k: give --select.teacher-topk, or a "
                "train.teacher_model_name_or_path"
            )


SETTINGS_OF_THE_RESULT = (
    "student",
    "teacher",
    "prompts_per_round",
    "restart",
    "require_correct",
    "eval_limit",
    "data_fingerprint",
    "eval_fingerprint",
    "select",
)
"""What must not change between the parts of one run; more rounds may be added. `train` may change until it is used."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundSummary:
    """What a round did."""

    round: int
    prompts: int
    statuses: Mapping[str, int]
    kept: int
    """Trajectories trained on that are of this round."""
    mean_tokens: float
    """Of the kept."""
    mean_score: float | None
    """The criterion's, of the kept, by the student that chose them."""
    loss: float
    """Of the last training step."""
    accuracy: float | None
    """Greedy, on eval_data, after the round."""
    student: str


Report = Callable[[str, SelectProgress | TrainProgress | tuple[int, int]], None]
"""Takes what is going on ("round 2 select") and how far it is."""


def run_distill(config: DistillConfig, report: Report = lambda what, progress: None) -> Iterator[RoundSummary]:
    """Run the rounds and yield each as it ends, those of an earlier part of the run first.

    Raises GenssdError on bad input; what was finished is on disk.
    """
    read_problems(config.data)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("distill runs in one process, not under torchrun")
    if config.train.teacher_model_name_or_path is not None:
        locate(config.train.teacher_model_name_or_path)
    for path in (*config.train.eval_data, *((config.eval_data,) if config.eval_data else ())):
        next(read_lines(path), None)  # before hours of selecting
    with claim(Path(config.output_dir), "distill"):
        yield from _run(config, report)


def _run(config: DistillConfig, report: Report) -> Iterator[RoundSummary]:
    output_dir = Path(config.output_dir)
    journal = output_dir / "rounds.jsonl"
    finished = _finished(config, journal)
    models: dict[Role, str] = {
        "teacher": fingerprint(locate(config.teacher)),
        "student": fingerprint(locate(config.student)),
    }
    settings = {
        **dataclasses.asdict(config),
        "data_fingerprint": _digest(config.data),
        "eval_fingerprint": None if config.eval_data is None else _digest(config.eval_data),
        "select": {name: value for name, value in dataclasses.asdict(config.select).items() if name in OF_SELECTION},
        "train": {name: value for name, value in dataclasses.asdict(config.train).items() if name in OF_TRAINING},
    }
    resumed = (output_dir / "run.json").exists()
    if resumed and not config.resume:
        raise InputError(f"{output_dir} holds a run already; pass --resume, or choose another output_dir")
    begun = any(output_dir.glob("round-*/train/metrics.jsonl"))
    names = (*SETTINGS_OF_THE_RESULT, *(("train",) if begun else ()))
    record_run(output_dir, "distill", settings, names, models, resumed=resumed)
    if resumed:  # with what may have changed
        record_run(output_dir, "distill", settings, names, models, resumed=False)
    yield from finished
    student = finished[-1].student if finished else config.student
    if config.eval_data is not None and not finished:
        _evaluate(config, 0, student, report)
    with Journal(journal) as log:
        for number in range(len(finished) + 1, config.rounds + 1):
            summary = _round(config, number, student, report)
            log.append(dataclasses.asdict(summary))
            student = summary.student
            yield summary


def _digest(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


def _finished(config: DistillConfig, journal: Path) -> list[RoundSummary]:
    """The rounds in the journal, which is cut to whole lines."""
    found, end = [], 0
    for row, line_end in complete_rows(journal):
        try:
            found.append(RoundSummary(**row))
        except TypeError:
            raise InputError(f"{journal}, line {len(found) + 1} is damaged; restore it or remove it") from None
        end = line_end
    truncate(journal, end)
    return found


def _round(config: DistillConfig, number: int, student: str, report: Report) -> RoundSummary:
    directory = Path(config.output_dir) / f"round-{number}"
    problems = directory / "problems.jsonl"
    problems.parent.mkdir(exist_ok=True)
    problems.write_bytes(b"".join(_problems(config, number)))
    settings = {f.name: getattr(config.select, f.name) for f in dataclasses.fields(config.select)}
    selecting = SelectConfig(
        **{**settings, "seed": config.select.seed + number - 1},
        teacher=config.teacher,
        student=student,
        data=str(problems),
        output_dir=str(directory / "select"),
        resume=True,
    )
    selected = run_select(selecting, report=lambda p: report(f"round {number} select", p))
    if selected.failures:
        listed = "".join(f"\n  {failure}" for failure in selected.failures[:10])
        raise CapacityError(f"round {number}: {len(selected.failures)} prompts do not fit into the cache:{listed}")
    kept = _keep(config, selected.path, directory / "kept.jsonl")
    if not kept:
        raise InputError(
            f"round {number}: no trajectory is left to train on ({dict(selected.statuses)}); look at {selected.path}, "
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
        mean_tokens=sum(len(row["completion_ids"]) for row in kept) / len(kept),
        mean_score=sum(scores) / len(scores) if scores else None,
        loss=loss,
        accuracy=None if config.eval_data is None else _evaluate(config, number, trained, report),
        student=trained,
    )


def _problems(config: DistillConfig, number: int) -> list[bytes]:
    """The lines of a round."""
    lines = [raw.rstrip(b"\n") + b"\n" for _, raw in read_lines(config.data)]
    count = config.prompts_per_round
    if count is None:
        return lines
    return [lines[i % len(lines)] for i in range((number - 1) * count, number * count)]


def _keep(config: DistillConfig, selections: Path, path: Path) -> Sequence[Mapping[str, Any]]:
    """Write what is trained on."""
    rows = []
    for row, _ in complete_rows(selections):
        text = row["messages"][-1]["content"]
        wrong = config.require_correct and row["answer"] is not None and not is_correct(text, row["answer"])
        if row["status"] in config.train.statuses and not wrong:
            if row["teacher_topk"] is not None:
                row["teacher_topk"]["file"] = f"select/{row['teacher_topk']['file']}"
            rows.append(row)
    write_jsonl(path, rows)
    return rows


def _train(config: DistillConfig, number: int, student: str, report: Report) -> float:
    directory = Path(config.output_dir) / f"round-{number}" / "train"
    finished = directory / "finished.json"
    if finished.exists():
        return float(read_json(finished)["loss"])
    begun = bool(list_checkpoints(directory))
    if directory.exists() and not begun:
        shutil.rmtree(directory)  # it ended before its first checkpoint
    rounds = range(1, number + 1) if config.restart else (number,)
    settings = {f.name: getattr(config.train, f.name) for f in dataclasses.fields(config.train)}
    training = TrainConfig(
        **settings,
        model_name_or_path=config.student if config.restart else student,
        data=tuple(str(Path(config.output_dir) / f"round-{r}" / "kept.jsonl") for r in rounds),
        output_dir=str(directory),
        resume_from_checkpoint="last" if begun else None,
    )
    loss = run_train(training, report=lambda p: report(f"round {number} train", p)).loss
    write_json(finished, {"loss": loss})
    return loss


def _evaluate(config: DistillConfig, number: int, model: str, report: Report) -> float:
    """Greedy accuracy; measured once."""
    assert config.eval_data is not None
    directory = Path(config.output_dir) / f"round-{number}" / "evaluate"
    if (directory / "summary.json").exists():
        return float(read_json(directory / "summary.json")["accuracy"]["value"])
    shutil.rmtree(directory, ignore_errors=True)
    engine = {f.name: getattr(config.select, f.name) for f in dataclasses.fields(EngineOptions)}
    evaluating = EvaluateConfig(
        **engine,
        model=model,
        data=config.eval_data,
        limit=config.eval_limit,
        output_dir=str(directory),
        max_tokens=config.select.max_tokens,
        samples=0,
    )
    found = run_evaluate(evaluating, report=lambda *p: report(f"round {number} evaluate", p))
    return found.accuracy.value
