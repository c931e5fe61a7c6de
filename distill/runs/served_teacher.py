"""A teacher that a server runs, as commands take it: its identity, and its use in the summary (teacher_options.py)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from genssd.distill.runs.teacher_options import TeacherOptions
from genssd.engine.amounts import format_count
from genssd.engine.engine import Engine
from genssd.engine.served.address import is_url, parse_url
from genssd.engine.served.client import Client


def find_fingerprints(options: TeacherOptions, teacher: str, engine: Engine | None) -> Mapping[Any, str] | None:
    """Return the fingerprints of models that need not be computed from files, by role; None where all must be.

    Raises ServerError where the teacher is the URL of a server that is not there.
    """
    if engine is not None:
        return engine.fingerprints
    if not is_url(teacher):
        return None
    return {"teacher": Client(parse_url(teacher), options.server).connect().fingerprint}


def count_server_use(engine: Engine) -> dict[str, Any]:
    """Return the entry "server" of a summary, on this part of the run; nothing where no server was asked."""
    if engine.server is None:
        return {}
    return {
        "server": {
            "requests": engine.server.requests,
            "repeats": engine.server.repeats,
            "discarded_tokens": engine.usage.discarded_tokens,
            "completions_from_text": engine.usage.served_from_text,
        }
    }


def describe_server_use(engine: Engine) -> str | None:
    """Return a line on the requests to the server of the teacher; None without one."""
    server, use = engine.server, engine.usage
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
