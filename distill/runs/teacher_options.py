"""The options of commands whose teacher may be the URL of a server: how it is asked, and what is kept of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from genssd.distill.runs.effects import Need
from genssd.distill.runs.field_kinds import FileName, Operational
from genssd.distill.runs.pool_options import PoolOptions
from genssd.engine.checkpoints.address import is_url
from genssd.engine.common.errors import InputError
from genssd.engine.served.options import ServerOptions

StateType = Literal["bfloat16", "float32"]
"""Data type in which hidden states are kept."""
TeacherNames = str | tuple[str, ...]
"""The name of one teacher, or those of several."""

IS_SERVED = Need(lambda o: any(map(is_url, list_teachers(o.teacher))), "a teacher that is the URL of a server")

SERVED_NEEDS: Mapping[str, Need] = {"teacher_tokenizer": IS_SERVED, "server": IS_SERVED}
"""What the fields of `TeacherOptions` need in a config with a field `teacher`."""


@dataclass(frozen=True, kw_only=True)  # no slots: a class derives from only one base that has them
class TeacherOptions(PoolOptions):
    """The options of a command whose teacher may be the URL of a server."""

    teacher_tokenizer: FileName[str | None] = None
    """Hub id or local directory of the tokenizer, chat template and config of a teacher that is the URL of a server.
    None: those of the served model where they are at hand, else the student's."""
    # the model that the server runs counts by its fingerprint
    server: Operational[ServerOptions] = field(default_factory=ServerOptions)
    """How a teacher that is the URL of a server is asked."""

    teacher_states: StateType | None = None
    """Keep the teacher's last hidden state of every token of the kept responses in teacher_states.bin, in bfloat16 or
    float32, for `genssd train --kd-states`: the whole distribution of the teacher without the teacher. The teacher
    reads every kept response once more. None keeps none."""

    def check_teacher_states(self, teacher: TeacherNames) -> None:
        """Raise InputError where hidden states are to be kept of a teacher that runs elsewhere, or of several."""
        if self.teacher_states is None:
            return
        served = next(filter(is_url, list_teachers(teacher)), None)
        if served is not None:
            raise InputError(
                f"teacher_states: the server {served} gives no hidden states; give a teacher that is a hub id or a "
                "local directory, or keep its most likely tokens (teacher_topk)"
            )
        if len(list_teachers(teacher)) > 1:
            raise InputError(
                "teacher_states are of one teacher, whose head the training reads; give one, or keep the most likely "
                "tokens of several (teacher_topk)"
            )

    def server_arguments(self) -> dict[str, Any]:
        """Return the arguments of `Engine.from_pretrained` for a teacher that a server runs."""
        return {"teacher_tokenizer": self.teacher_tokenizer, "server": self.server}


def list_teachers(teacher: TeacherNames) -> Sequence[str]:
    """Return the names of the teachers of a config."""
    return (teacher,) if isinstance(teacher, str) else teacher
