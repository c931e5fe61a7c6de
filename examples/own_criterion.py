"""Choose by a criterion of your own: keep the candidate that the student neither knows by heart nor cannot follow.

    python examples/own_criterion.py [TEACHER STUDENT]

A criterion is any object with `score(candidate) -> float` and `higher_is_better() -> bool`. The same object judges
candidates during the search and finished traces in `genssd score`: there it is named by its place, for instance
`genssd score --criteria examples.own_criterion:Challenge`.
"""

from __future__ import annotations

import sys
from importlib.resources import files

from genssd import Candidate, Chunk, Engine

PAIR = files("genssd.distill.small_pair")


class Challenge:
    """The distance of a chunk's mean surprisal from a target, in nats per token: lower is better."""

    def __init__(self, target: float = 0.5) -> None:
        self.target = target

    def score(self, candidate: Candidate) -> float:
        """Return |mean surprisal - target|. candidate.stats has the student's statistics of every token."""
        return abs(-float(candidate.stats.logprob.mean()) - self.target)

    def higher_is_better(self) -> bool:
        return False


def main(teacher: str = str(PAIR / "teacher"), student: str = str(PAIR / "student")) -> None:
    engine = Engine.from_pretrained(teacher, student, memory_bytes=1 << 28)
    questions = [
        f"Ann has {n} shells. She buys 25, gets 31 and finds 44 more. How many shells does Ann have?"
        for n in (18, 42, 77)
    ]
    prompts = [[{"role": "user", "content": question}] for question in questions]
    line = Chunk(tokens=1, until="\n", limit=64)
    for target in (0.0, 2.0):
        # every Selection arrives as soon as its prompt is finished
        for selection in engine.iter_select_expand(prompts, chunk=line, criterion=Challenge(target), max_tokens=192):
            surprisal = -float(selection.best.stats.logprob.mean())
            print(f"target {target}: prompt {selection.index}, {surprisal:.3f} nats per token, {selection.best.status}")


if __name__ == "__main__":
    main(*sys.argv[1:])
