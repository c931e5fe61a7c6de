"""Options of a teacher that a server runs."""

from __future__ import annotations

from dataclasses import dataclass

from genssd.engine.common.errors import InputError
from genssd.engine.common.options_check import check_types


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptions:
    """How a served teacher is asked. The key of the server is read from the environment (GENSSD_API_KEY, then
    OPENAI_API_KEY)."""

    model_name: str | None = None
    """Name of the model on the server, as its list of models (/v1/models) has it. None: the only one of the list that
    is no adapter."""
    seeds: bool = True
    """Whether requests have seeds, by the place of the candidates in the search; without them the server draws as it
    likes. vLLM on a CPU ends with an error where it computes a prompt with a seed in parts."""
    in_flight: int = 64
    """Maximum number of requests that wait for the server at once; each asks for all candidates of one branch."""
    timeout: float = 600.0
    """Number of seconds without a byte from the server after which a request is sent again."""
    patience: float = 600.0
    """Number of seconds without any answer after which the server is given up and the run ends. Until then requests are
    sent again, at growing intervals of up to 30 seconds, or when the server says (Retry-After)."""

    def __post_init__(self) -> None:
        check_types(self)
        if self.in_flight < 1:
            raise InputError(f"server in_flight must be at least 1, not {self.in_flight}")
        for name in ("timeout", "patience"):
            if getattr(self, name) <= 0.0:
                raise InputError(f"server {name} must be above 0 seconds, not {getattr(self, name)}")
