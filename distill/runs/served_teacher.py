"""A teacher that a server runs, as commands take it: its identity, and its use in the summary (teacher_options.py)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from genssd.distill.runs.teacher_options import TeacherNames, TeacherOptions, list_teachers
from genssd.engine.checkpoints.address import is_url, parse_url
from genssd.engine.checkpoints.checkpoint import fingerprint, locate
from genssd.engine.common.amounts import format_count
from genssd.engine.engine import Engine
from genssd.engine.served.client import Client
from genssd.engine.setup.model_facts import ModelFacts


def find_fingerprints(
    options: TeacherOptions, teacher: TeacherNames, engine: Engine | None
) -> Mapping[Any, Any] | None:
    """Return the fingerprints of models that need not be computed from files, by role; None where all must be.

    Of several teachers it is a list. Raises ServerError where a teacher is the URL of a server that is not there.
    """
    names = list_teachers(teacher)
    if engine is not None:
        each = [one.fingerprints["teacher"] for one in engine.teachers]
        return engine.fingerprints if len(each) == 1 else {**engine.fingerprints, "teacher": each}
    if not any(map(is_url, names)):
        return None
    each = [
        Client(parse_url(name), options.server).connect().fingerprint if is_url(name) else fingerprint(locate(name))
        for name in names
    ]
    return {"teacher": each[0] if len(each) == 1 else each}


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
