"""What can be told about a teacher that a server runs, without a way to ask it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerRecord:
    """The server of a teacher, and what it has done so far for this engine."""

    url: str
    """URL of the server, without a key."""
    model: str
    """Name of the model on the server."""
    root: str | None
    """Hub id or directory that the server loaded the model from; None where it does not say."""
    positions: int
    """Maximum number of tokens in prompt and response."""
    tokenizer: str
    """Directory of the tokenizer that renders the prompts."""
    requests: int
    """Number of requests that were answered."""
    repeats: int
    """Number of times that a request was sent again after a fault."""
