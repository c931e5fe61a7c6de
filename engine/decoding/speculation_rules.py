"""The rules of reverse speculation, which options of commands set; reverse_speculation.py follows them."""

from __future__ import annotations

from dataclasses import dataclass

from genssd.engine.common.errors import InputError
from genssd.engine.common.options_check import check_types
from genssd.engine.models.sampling import Sampling


@dataclass(frozen=True, slots=True, kw_only=True)
class ReverseSpeculation:
    """Rules by which the student accepts the teacher's tokens, and writes its own. The defaults are the paper's."""

    probability: float = 0.01
    """Minimum probability of an accepted token: the student's, at temperature 1 over the whole vocabulary."""
    top: int = 20
    """Maximum rank of an accepted token among the student's likeliest; 1 is the most likely."""
    tries: int = 5
    """Number of tokens that the teacher draws before the student writes one."""
    student: Sampling = Sampling(temperature=0.7, top_k=20, top_p=0.95)
    """Temperature and filters with which the student writes."""

    def __post_init__(self) -> None:
        check_types(self)
        if not 0.0 <= self.probability <= 1.0:
            raise InputError(f"rsd: probability must lie in [0, 1], not {self.probability}")
        if self.top < 1 or self.tries < 1:
            raise InputError(f"rsd: top and tries must be at least 1, not {self.top} and {self.tries}")
