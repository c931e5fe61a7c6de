"""What each teacher of a search has done for one prompt: decisions, wins, tokens, seconds; and who is asked no more."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from genssd.engine.decoding.expansion import Expansion
from genssd.engine.search.selection import TeacherUse, Trajectory


class TeacherTally:
    """The counts of one prompt's search, by teacher.

    drop_after: number of decisions in a row that a teacher loses before it is asked no more for this prompt; None never
    drops one. A decision is a round after which some candidate was kept: so its winner stays, and one teacher is left.
    """

    def __init__(self, size: int, drop_after: int | None) -> None:
        self._drop_after = drop_after
        self._decisions = [0] * size
        self._wins = [0] * size
        self._losses = [0] * size
        """Number of decisions since a teacher's last win."""
        self._sampled = [0] * size
        self._seconds = [0.0] * size
        self.dropped: dict[int, int] = {}
        """Number of decisions after which a teacher was dropped, by its index."""

    def note(self, expansions: Sequence[Expansion], winners: Collection[int]) -> None:
        """Count a judged round. winners: indices of the teachers whose candidates were kept; none where none was."""
        for expansion in expansions:
            writer = expansion.parent.writer
            self._sampled[writer] += sum(len(child.chunk) for child in expansion.children)
            self._seconds[writer] += expansion.seconds
        asked = {expansion.parent.writer for expansion in expansions}
        for writer in asked:
            self._decisions[writer] += 1
            self._wins[writer] += writer in winners
        if not winners:
            return
        for writer in sorted(asked):
            self._losses[writer] = 0 if writer in winners else self._losses[writer] + 1
            if self._drop_after is not None and self._losses[writer] >= self._drop_after:
                self.dropped[writer] = self._decisions[writer]

    def list_uses(self, best: Trajectory | None) -> tuple[TeacherUse, ...]:
        """Return what each teacher has done. best: the trajectory whose tokens count as kept; None for none."""
        kept = [0] * len(self._wins)
        for chunk in best.chunks if best is not None else ():
            kept[chunk.teacher] += chunk.tokens
        return tuple(
            TeacherUse(
                decisions=self._decisions[i],
                wins=self._wins[i],
                tokens_sampled=self._sampled[i],
                tokens_kept=kept[i],
                seconds=self._seconds[i],
                dropped_after=self.dropped.get(i),
            )
            for i in range(len(self._wins))
        )
