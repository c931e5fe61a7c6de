"""Options of the loss on attention to key words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from genssd.distill.runs.effects import Need, Needs
from genssd.engine.common.errors import InputError
from genssd.engine.common.options_check import check_types
from genssd.kernels.options import COLDEST


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyAttentionOptions:
    """Options of the loss on attention to key words."""

    NEEDS: ClassVar[Needs] = {
        name: Need(lambda o: o.weight > 0.0, "a key_attention.weight above 0")
        for name in ("words", "max_words", "rows", "teacher_temperature", "student_temperature")
    }

    weight: float = 0.0
    """Factor of the attention loss (the mean over examples), which is added to the loss of the tokens; 0 turns it off.
    The paper uses 1."""
    words: tuple[str, ...] = ()
    """The key words; empty: all numbers are key words."""
    max_words: int = 64
    """Maximum number of key words in an example; the first ones are used."""
    rows: Literal["sum", "mean"] = "sum"
    """Attention of a step: the sum over its tokens, as in the paper, or their mean. Sums of long steps saturate the
    softmax."""
    teacher_temperature: float = 0.1
    """Temperature of the softmax over the teacher's layers."""
    student_temperature: float = 0.5
    """Temperature of the softmax over the student's layers."""

    def __post_init__(self) -> None:
        check_types(self)
        if self.weight < 0.0:
            raise InputError(f"key_attention.weight must be at least 0, not {self.weight}")
        if self.max_words < 2:
            raise InputError(f"key_attention.max_words must be at least 2, not {self.max_words}")
        if min(self.teacher_temperature, self.student_temperature) < COLDEST:
            raise InputError(f"key_attention: temperatures must be at least {COLDEST:g}")
