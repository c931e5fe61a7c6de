"""One response of a search as each of its teachers holds it: a branch per teacher, in the cache of that teacher.

The branches have the same text, chunks, readings and scores. Each has the token ids by which its own teacher reads what
the others wrote, and all share what the student has computed (`Branch.student` is one object).
"""

from __future__ import annotations

from dataclasses import dataclass

from genssd.engine.decoding.branch import Branch


@dataclass(frozen=True, slots=True, eq=False)
class Views:
    """The branches of one committed response, by teacher."""

    branches: tuple[Branch | None, ...]
    """A branch for each teacher; None for one that cannot read the response."""
    main: Branch
    """The branch of the teacher that wrote the last chunk; before the first chunk, of the first teacher."""

    @property
    def trace(self) -> tuple[int, ...]:
        """Index of the candidate in each round: the place of the response in the tree of the search."""
        return self.main.trace

    @property
    def num_children(self) -> int:
        """Number of candidates that all teachers have written after the response."""
        return max(branch.num_children for branch in self.list_present())

    def list_present(self) -> list[Branch]:
        """Return the branches of the teachers that can read the response."""
        return [branch for branch in self.branches if branch is not None]

    def drop(self) -> None:
        """Free the pages of all branches for good."""
        for branch in self.list_present():
            branch.drop()

    def suspend(self) -> None:
        """Free the pages of all branches; what is needed of them is computed again."""
        first, *others = self.list_present()
        first.suspend()
        for branch in others:
            branch.suspend()
            branch.student = first.student
