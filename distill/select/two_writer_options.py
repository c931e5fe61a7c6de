"""Options of the methods of `genssd generate` in which teacher and student write in turns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from genssd.engine.common.errors import InputError
from genssd.engine.common.options_check import check_types
from genssd.engine.criteria.criterion_names import check_criterion
from genssd.engine.decoding.chunk import Chunk
from genssd.engine.models.sampling import Sampling


@dataclass(frozen=True, slots=True, kw_only=True)
class Alternation:
    """Options of the method alternate: the candidates of both models at a node, and what chooses among them."""

    criterion: str = "teacher_logprob"
    """Criterion that chooses the chunk, as for select. By default a chunk of the student is kept where the teacher
    finds it as likely as its own; others weigh what the student can learn against that
    (0.5*ppl + 0.5*teacher_logprob). Of equal values the student's candidate is kept."""
    chunk: Chunk = Chunk(tokens=16)
    """Rule by which a candidate ends. In Python, a number stands for Chunk(tokens=number)."""
    student_candidates: int = 2
    """Number of continuations that the student samples at a node."""
    teacher_candidates: int = 2
    """Number of continuations that the teacher samples at a node."""
    student: Sampling = Sampling(top_p=0.95)
    """Temperature and filters with which the student samples."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "chunk", Chunk.of(self.chunk))
        check_types(self)
        check_criterion(self.criterion)
        for name in ("student_candidates", "teacher_candidates"):
            if getattr(self, name) < 1:
                raise InputError(
                    f"alternate: {name} must be at least 1, not {getattr(self, name)}: both models write candidates; "
                    "for one writer take method sample, with the model that is to write as the teacher"
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class Relay:
    """Options of the method relay: what counts as the student's error, and how much the teacher writes then."""

    error: Literal["entropy", "answer"] = "entropy"
    """Sign of an error. entropy: the student is unsure where it writes. answer: its whole attempt gives another answer
    than the reference; an attempt that is right, or cannot be judged, is kept."""
    threshold: float = 1.0
    """Mean entropy in nats of the student's next token, over the window, from which on the student counts as unsure.
    The teacher takes over at the first token of the first such window; an attempt without one stays as it is. 0 lets
    the teacher write everything, inf the student."""
    window: int = 8
    """Number of tokens over which the entropy is averaged; an attempt that is shorter is one window."""
    teacher: Literal["rest", "chunk"] = "rest"
    """How much the teacher writes when it takes over: the rest of the response, or one chunk, after which the student
    goes on."""
    takeovers: int | None = None
    """Maximum number of times that the teacher takes over in a response; the student then writes on to the end. None:
    no limit."""
    chunk: Chunk = Chunk(tokens=64)
    """Rule by which the teacher's chunk ends, and the number of tokens that the student writes before its entropy is
    looked at. In Python, a number stands for Chunk(tokens=number)."""
    student: Sampling = Sampling(top_p=0.95)
    """Temperature and filters with which the student samples."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "chunk", Chunk.of(self.chunk))
        check_types(self, infinite=("threshold",))
        if not self.threshold >= 0.0:
            raise InputError(f"relay: threshold must be at least 0, not {self.threshold}")
        if self.window < 1:
            raise InputError(f"relay: window must be at least 1, not {self.window}")
        if self.takeovers is not None and self.takeovers < 1:
            raise InputError(
                f"relay: takeovers must be at least 1, not {self.takeovers}; for a student that writes alone take "
                "threshold inf"
            )
