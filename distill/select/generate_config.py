"""Options of `genssd generate`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from genssd.distill.data.parts import Shard
from genssd.distill.runs.chat_settings import PairChatSettings
from genssd.distill.runs.effects import Need, Needs
from genssd.distill.runs.field_kinds import FileName, ModelPath, Operational
from genssd.distill.runs.monitor_options import MonitorOptions
from genssd.distill.runs.sampling_options import ModelSampling, StopOptions
from genssd.distill.runs.teacher_options import SERVED_NEEDS, TeacherOptions
from genssd.distill.select.two_writer_options import Alternation, Relay
from genssd.engine.checkpoints.address import is_url
from genssd.engine.common.errors import InputError
from genssd.engine.common.options_check import check_types
from genssd.engine.decoding.speculation_rules import ReverseSpeculation
from genssd.engine.models.sampling import Sampling
from genssd.engine.texts.stops import StopStrings


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateConfig(TeacherOptions, PairChatSettings, ModelSampling, StopOptions, MonitorOptions):
    """Sample responses from the teacher alone, with the student's verdict on every token, or from both in turns."""

    NEEDS: ClassVar[Needs] = {
        "rsd": Need(lambda o: o.method == "rsd", "method rsd"),
        "alternate": Need(lambda o: o.method == "alternate", "method alternate"),
        "relay": Need(lambda o: o.method == "relay", "method relay"),
        "relay.takeovers": Need(lambda o: o.relay.teacher == "chunk", "relay.teacher chunk"),
        "relay.chunk": Need(
            lambda o: o.relay.error == "entropy" or o.relay.teacher == "chunk",
            "relay.error entropy or relay.teacher chunk",
        ),
        "student_template_kwargs": Need(lambda o: o.student is not None, "a student"),
        "include_stop": Need(lambda o: bool(o.stop), "stop"),
        **SERVED_NEEDS,
    }

    teacher: ModelPath[str]
    """Hub id or local directory of the model that writes, or the URL of a server that runs it, such as
    http://host:8000/v1 of vLLM or SGLang (docs/served.md)."""
    student: ModelPath[str | None] = None
    """Hub id or local directory of the model whose chat template the rows use, and which judges tokens under rsd and
    writes as well under alternate and relay. None: the rows use the teacher's chat template."""
    # the rows are compared with the journal's one by one, so that a file that has grown can be resumed
    data: Operational[FileName[str]]
    """Data file of problems, as for select."""
    output_dir: Operational[FileName[str]] = "runs/generate"
    """Directory that the journal is written to."""
    resume: Operational[bool] = False
    """Continue an interrupted run: prompts that are in the journal are not run again."""
    overwrite: Operational[bool] = False
    """Remove what an earlier run of this command has written to output_dir, and begin anew."""
    limit: Operational[int | None] = None
    """Take only so many rows of the data, the first ones after offset."""
    offset: Operational[int] = 0
    """Number of rows at the beginning of the data that are left out. Rows are those of a run over all, unless prompts
    are equal."""
    shard: Operational[str | None] = None
    """Part of the rows for one of several machines: 2/8 takes every eighth row, the second of them first. Rows are
    those of a run over all, unless prompts are equal."""
    method: Literal["sample", "rsd", "alternate", "relay"] = "sample"
    """sample: the teacher writes alone. rsd: the student refuses single tokens (Reverse Speculative Decoding).
    alternate: both offer candidates at every node, and a criterion chooses. relay: the student writes until it errs,
    and the teacher takes over."""
    n: int = 1
    """Number of responses per prompt."""
    max_tokens: int = 4096
    """Maximum number of tokens in a response."""
    sampling: Sampling = field(default_factory=lambda: Sampling(top_p=0.95))
    """How the teacher samples. The authors of rsd use temperature 0.7, top_p 0.95, top_k 20."""
    rsd: ReverseSpeculation = field(default_factory=ReverseSpeculation)
    """Which tokens the student accepts under rsd, and how it writes where it refuses."""
    alternate: Alternation = field(default_factory=Alternation)
    """Candidates at a node under alternate, and what chooses among them."""
    relay: Relay = field(default_factory=Relay)
    """What counts as the student's error under relay, and how much the teacher writes then."""
    seed: int = 0
    """Seed of all random draws."""

    def __post_init__(self) -> None:
        check_types(self)
        self.check_monitoring()
        Shard.parse(self.shard)
        StopStrings(texts=self.stop)
        if self.method != "sample" and self.student is None:
            raise InputError(f"{self.method} needs a student: give --student")
        if self.method == "rsd" and is_url(self.teacher):
            raise InputError(
                "rsd judges every token before the next one is drawn, which a server does not wait for: give a teacher "
                "that is a hub id or a local directory, or method sample"
            )
        if self.has_two_writers and is_url(self.teacher):
            raise InputError(
                f"{self.method} has the teacher read what the student writes, for which a server gives no "
                "log-probabilities: give a teacher that is a hub id or a local directory, or method sample"
            )
        self.check_teacher_states(self.teacher)
        if self.teacher_states is not None and self.n > 1:
            raise InputError(
                f"teacher_states are kept along one response per prompt, the one that training reads: n must be 1, not "
                f"{self.n}; the best of several whole responses has them from `genssd select --candidates {self.n} "
                f"--chunk.tokens {self.max_tokens} --teacher-states {self.teacher_states}`"
            )
        if self.n < 1 or self.max_tokens < 1:
            raise InputError(f"n and max_tokens must be at least 1, not {self.n} and {self.max_tokens}")

    @property
    def has_two_writers(self) -> bool:
        """Whether teacher and student write in turns."""
        return self.method in ("alternate", "relay")
