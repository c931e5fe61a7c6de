"""An expansion: the request for some candidates of one branch, and the rows of the decoding batch that serve it."""

from __future__ import annotations

from dataclasses import dataclass, field

from genssd.engine.branch import Branch
from genssd.engine.chunk import Chunk, ChunkEnd
from genssd.engine.runner import Role
from genssd.engine.text import TextStream, Tokenizer


@dataclass(slots=True, eq=False)
class Expansion:
    """A request: `n` candidates of `parent`, each a `chunk` of at most `max_new` tokens."""

    parent: Branch
    n: int
    chunk: Chunk
    max_new: int
    label: str
    """Name of the prompt in messages."""
    children: list[Branch] = field(default_factory=list)
    """Candidates made so far."""
    num_unfinished: int = 0
    """Number of the children that are still being decoded."""
    unreadable: str | None = None
    """Why the student cannot read or score a complete candidate; None where it reads them all."""
    missing_token: int | None = None
    """The token that it does not have, where that is why."""
    seconds: float = 0.0
    """Time that its teacher has taken for the candidates, where several teachers write (team_expander.py)."""
    failed: str | None = None
    """Why a server did not write the candidates, so that there are none; None where it did."""

    @property
    def longest(self) -> int:
        """Maximum number of tokens in a candidate."""
        return min(self.chunk.longest, self.max_new)

    @property
    def is_unfinished(self) -> bool:
        """Whether candidates are still to be made or decoded."""
        return self.failed is None and (not self.children or self.num_unfinished > 0)

    @property
    def most_tokens(self) -> int:
        """Maximum number of tokens in all candidates together."""
        return self.n * self.longest

    def count_longest(self, role: Role) -> int:
        """Return how many tokens of one model are reserved for a candidate."""
        return self.longest if role == "teacher" else self.parent.session.bound_reading(self.parent, self.longest)

    def reset(self) -> None:
        """Drop the candidates, as if the expansion had never been submitted."""
        self.parent.take_back(self.children)
        self.children = []
        self.num_unfinished = 0
        self.unreadable = self.missing_token = self.failed = None


@dataclass(slots=True, eq=False)
class Lane:
    """An entry of the decoding batch: an expansion whose parent is being computed (child None), or one candidate."""

    expansion: Expansion
    child: Branch | None = None
    end: ChunkEnd | None = None
    text: TextStream | None = None

    @property
    def branch(self) -> Branch:
        """The branch whose next token is drawn: the parent, or the candidate."""
        return self.expansion.parent if self.child is None else self.child

    @property
    def num_rows(self) -> int:
        """Number of tokens that are drawn for the lane in the next step."""
        return self.expansion.n if self.child is None else 1

    def candidate_lane(self, tokenizer: Tokenizer) -> Lane:
        """Return the lane of one candidate: this one, or that of a new child of the expansion's parent."""
        if self.child is not None:
            return self
        child = self.expansion.parent.child()
        self.expansion.children.append(child)
        self.expansion.num_unfinished += 1
        return Lane(self.expansion, child, ChunkEnd(self.expansion.chunk), TextStream(tokenizer))
