"""Options of `genssd distill`."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

from genssd.distill.runs.chat_settings import PairChatSettings
from genssd.distill.runs.effects import Need, Needs
from genssd.distill.runs.field_kinds import DataFile, FileName, ModelPath, Operational
from genssd.distill.runs.hub_name import check_repository
from genssd.distill.runs.teacher_options import SERVED_NEEDS
from genssd.distill.select.config import SelectSettings
from genssd.distill.train.config import TrainSettings
from genssd.engine.common.errors import InputError
from genssd.engine.common.options_check import check_types
from genssd.engine.common.thread_count import check_threads


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillConfig(PairChatSettings):
    """Rounds in which the student chooses what the teacher writes and is then trained on it."""

    NEEDS: ClassVar[Needs] = {
        "eval_limit": Need(lambda o: o.eval_data is not None, "eval_data"),
        "allow_eval_overlap": Need(
            lambda o: o.eval_data is not None or bool(o.train.eval_data), "eval_data or train.eval_data"
        ),
        **{f"select.{name}": need for name, need in SERVED_NEEDS.items()},
        "select.drop_teacher_after": Need(lambda o: False, "several teachers, which compete in genssd select alone"),
    }

    teacher: ModelPath[str]
    """Hub id or local directory of the model that writes, or the URL of a server that runs it, such as
    http://host:8000/v1 of vLLM or SGLang (docs/served.md)."""
    student: ModelPath[str]
    """Hub id or local directory of the model to train; it scores in the first round."""
    data: DataFile[str]
    """Data file of problems, as for select."""
    output_dir: Operational[FileName[str]] = "runs/distill"
    """Directory that all rounds are written to."""
    resume: Operational[bool] = False
    """Continue an interrupted run. More rounds may be asked for than before."""
    overwrite: Operational[bool] = False
    """Remove what an earlier run of this command has written to output_dir, and begin anew."""
    rounds: Operational[int] = 2
    """Number of rounds."""
    prompts_per_round: int | None = None
    """Number of problems in a round: each round takes the next ones, and starts again at the end of the file. Rows that
    cannot be used are left out and do not count. None: every round takes all problems."""
    threads: Operational[int | None] = None
    """Number of CPU threads of all parts. None: every part chooses, as its command does; --select.threads and
    --train.threads are those of one part. A resumed run trains with the number that it was begun with."""
    processes: Operational[int | None] = None
    """Number of processes on a CPU that divide its threads and memory in all parts: they select and evaluate as
    --select.processes says, and train together. A step of the training takes the examples that it takes in one process,
    train.per_device_train_batch_size times train.gradient_accumulation_steps, divided over the processes. A training
    that was interrupted goes on with the number of processes that it was begun with. None: this process trains."""
    devices: Operational[str | None] = None
    """GPUs that divide all parts, a process for each: all, or numbers such as 0,1,2; see processes. Steps are divided
    by the largest number of them that can do so evenly. None: this process trains, on one GPU."""
    restart: bool = False
    """Train every round from the first student, on the trajectories of all rounds so far. Otherwise each round trains
    the student of the round before, on its own trajectories."""
    require_correct: bool = True
    """Train only on trajectories that give the reference answer of their problem. A problem without a reference answer
    is reported and left out; --no-require-correct trains on all trajectories."""
    eval_data: DataFile[str | None] = None
    """Data file of problems with answers, on which every round's student is evaluated."""
    eval_limit: int | None = None
    """Take only the first rows of eval_data."""
    # a guard, which changes no result
    allow_eval_overlap: Operational[bool] = False
    """Run also where questions of the data stand in eval_data or train.eval_data, exactly or with other case, spaces
    or punctuation; summary.json counts them."""
    push_to_hub: Operational[str | None] = None
    """Repository of the Hugging Face hub, OWNER/NAME, to which the last student and its card are sent at the end. It
    is made, as a private one, before the first round begins, where it does not exist."""
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
        if self.push_to_hub is not None:
            check_repository(self.push_to_hub, "push_to_hub")
        if self.train.fsdp and self.processes is None and self.devices is None:
            raise InputError("train.fsdp shards the model over several processes: give processes or devices")
        if self.train.uses_rows and not self.select.teacher_topk:
            raise InputError(
                "train.kd_ratio needs the teacher's top k: give --select.teacher-topk, or a "
                "train.teacher_model_name_or_path"
            )
        self.select.check_teacher_states(self.teacher)
        if self.train.kd_states and self.select.teacher_states is None:
            raise InputError("train.kd_states reads the teacher's hidden states: give --select.teacher-states")
        if self.train.kd_states and self.train.teacher_model_name_or_path != self.teacher:
            raise InputError(
                "train.kd_states reads the head of the teacher that writes: give its name as "
                f"train.teacher_model_name_or_path, {self.teacher}"
            )

    def make_select_settings(self) -> SelectSettings:
        """Return how every round selects: with the processes or devices of all parts where it has none of its own."""
        own = (self.select.processes, self.select.devices, self.select.ray)
        if any(option is not None for option in own):
            return self.select
        return replace(self.select, processes=self.processes, devices=self.devices)
