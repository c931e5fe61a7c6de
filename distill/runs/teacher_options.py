"""The options of commands whose teacher may be the URL of a server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from genssd.distill.runs.effects import Need
from genssd.distill.runs.field_kinds import FileName, Operational
from genssd.distill.runs.pool_options import PoolOptions
from genssd.engine.checkpoints.address import is_url
from genssd.engine.served.options import ServerOptions

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

    def server_arguments(self) -> dict[str, Any]:
        """Return the arguments of `Engine.from_pretrained` for a teacher that a server runs."""
        return {"teacher_tokenizer": self.teacher_tokenizer, "server": self.server}


def list_teachers(teacher: TeacherNames) -> Sequence[str]:
    """Return the names of the teachers of a config."""
    return (teacher,) if isinstance(teacher, str) else teacher
