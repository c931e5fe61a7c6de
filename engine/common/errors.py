"""The exceptions that a user of genssd can cause. Their messages name the value at fault, its place, and the fix."""

from __future__ import annotations

from genssd.engine.common.quoting import make_printable


class GenssdError(ValueError):
    """Base of all errors that a user can cause: by files, options, or too little memory.

    Names of fields and texts of files may be in the message: what cannot be printed is escaped, long lines are cut.
    """

    def __init__(self, message: str) -> None:
        super().__init__(make_printable(message))


class InputError(GenssdError):
    """A prompt, a row or an option that cannot be used."""


class CheckpointError(GenssdError):
    """A model directory that cannot be loaded."""


class CapacityError(GenssdError):
    """A request for more tokens than the key-value cache or the model's positions can hold."""


class NumericsError(GenssdError):
    """A model that produced NaN or infinite logits."""


class ServerError(GenssdError):
    """A server that is not there, does not answer any more, or answers what cannot be used."""


class WorkerError(GenssdError):
    """Worker processes that end again and again, so that the work cannot go on."""
