"""What each of several teachers did in a run of `genssd select`: its sums over the rows of the journal, in words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from genssd.engine.common.amounts import format_count


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherTotals:
    """The sums of one teacher over all prompts of a run."""

    name: str
    fingerprint: str
    decisions: int
    """Number of rounds, further attempts included, that it wrote candidates for."""
    wins: int
    """Number of these after which a candidate of it was kept."""
    tokens_sampled: int
    tokens_kept: int
    """Number of its tokens in the best trajectories."""
    seconds: float
    """Time of its decoding steps, the scoring of its candidates included."""
    dropped: int
    """Number of prompts in which it was asked no more after a number of losses (`drop_teacher_after`)."""

    def __str__(self) -> str:
        fraction = f" ({self.wins / self.decisions:.0%})" if self.decisions else ""
        parts = [
            f"won {self.wins:,} of {format_count(self.decisions, 'round')}{fraction}",
            f"{format_count(self.tokens_kept, 'token')} kept of {self.tokens_sampled:,} sampled",
            f"{self.seconds:.1f} s",
        ]
        parts += [f"dropped in {format_count(self.dropped, 'prompt')}"] if self.dropped else []
        return f"teacher {self.name}: {', '.join(parts)}"

    def as_json(self) -> dict[str, Any]:
        """Return the element of `teachers` in summary.json."""
        return {**asdict(self), "seconds": round(self.seconds, 6)}


def sum_teachers(rows: Iterable[Sequence[Mapping[str, Any]]]) -> tuple[TeacherTotals, ...]:
    """Return the sums over the fields `teachers` of rows, in the order of the teachers; none without such a field."""
    each = list(zip(*rows, strict=True))
    return tuple(
        TeacherTotals(
            name=uses[0]["name"],
            fingerprint=uses[0]["fingerprint"],
            dropped=sum(use["dropped_after"] is not None for use in uses),
            **{
                name: sum(use[name] for use in uses)
                for name in ("decisions", "wins", "tokens_sampled", "tokens_kept", "seconds")
            },
        )
        for uses in each
    )
