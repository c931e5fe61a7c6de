"""A teacher that a server runs, as commands take it: its options, its identity, and its use in the summary."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from genssd.distill.runs.effects import Need
from genssd.distill.runs.pool_options import PoolOptions
from genssd.distill.runs.settings import FileName, Operational
from genssd.engine.amounts import format_count
from genssd.engine.engine import Engine
from genssd.engine.model_facts import ModelFacts
from genssd.engine.served.address import is_url, parse_url
from genssd.engine.served.client import Client
from genssd.engine.served.options import ServerOptions

IS_SERVED = Need(lambda o: is_url(o.teacher), "a teacher that is the URL of a server")
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

    def find_fingerprints(self, teacher: str, engine: Engine | None) -> Mapping[Any, str] | None:
        """Return the fingerprints of models that need not be computed from files, by role; None where all must be.

        Raises ServerError where the teacher is the URL of a server that is not there.
        """
        if engine is not None:
            return engine.fingerprints
        if not is_url(teacher):
            return None
        return {"teacher": Client(parse_url(teacher), self.server).connect().fingerprint}


def count_server_use(models: ModelFacts) -> dict[str, Any]:
    """Return the entry "server" of a summary, on this part of the run; nothing where no server was asked."""
    if models.server is None:
        return {}
    return {
        "server": {
            "requests": models.server.requests,
            "repeats": models.server.repeats,
            "discarded_tokens": models.usage.discarded_tokens,
            "completions_from_text": models.usage.served_from_text,
        }
    }


def describe_server_use(models: ModelFacts) -> str | None:
    """Return a line on the requests to the server of the teacher; None without one."""
    server, use = models.server, models.usage
    if server is None:
        return None
    tokens = format_count(use.sampled_tokens + use.discarded_tokens, "token")
    line = (
        f"{server.url} answered {format_count(server.requests, 'request')} ({server.repeats} sent again after "
        f"faults); of {tokens} {use.discarded_tokens} came after the end of a chunk and were dropped"
    )
    if use.served_from_text:
        line += f"; the token ids of {format_count(use.served_from_text, 'completion')} were found from the text"
    return line
