"""A criterion that knows the answer to the small pair's task: which style of a step is easy."""

from __future__ import annotations

from genssd.distill.small_pair.problems import DETOUR, SPELLED, detect_style
from genssd.engine.criteria.candidate import Candidate

EASE = {SPELLED: 2.0, DETOUR: 1.0}
"""Values of steps by their style; a jump, which the student cannot learn, has 0."""


class EasyStyle:
    """Mean ease of the steps in a chunk: an upper bound for any criterion that has to find the easy style out."""

    def score(self, candidate: Candidate) -> float:
        """Return the mean ease of the chunk's steps; a chunk without a step, such as the answer, has 1."""
        text = "".join(candidate.pieces()[len(candidate.history_ids) :])
        styles = [detect_style(line) for line in text.split("\n")]
        values = [EASE.get(style, 0.0) for style in styles if style is not None]
        return sum(values) / len(values) if values else 1.0

    def higher_is_better(self) -> bool:
        """Return True: easier steps are kept."""
        return True
