"""An expansion: the request for some candidates of one branch, and the rows of the decoding batch that serve it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from genssd.engine.common.model_choices import Role
from genssd.engine.decoding.branch import Branch
from genssd.engine.decoding.chunk import Chunk, ChunkEnd
from genssd.engine.texts.stops import StopMatch, StopSearch, encode_head
from genssd.engine.texts.text import Tokenizer
from genssd.engine.texts.text_stream import TextStream, open_stream


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
        return min(self.chunk.longest + self.parent.session.stops.slack, self.max_new)

    @property
    def longest_read(self) -> int:
        """Maximum number of tokens that are left of a candidate, where a stop string may have cut a token."""
        return min(self.longest + self.parent.session.stops.most_head_tokens, self.max_new)

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
        if role == "teacher":
            return self.longest
        return self.parent.session.bound_reading(self.parent, self.longest_read)

    def reset(self) -> None:
        """Drop the candidates, as if the expansion had never been submitted."""
        self.parent.take_back(self.children)
        self.children = []
        self.num_unfinished = 0
        self.unreadable = self.missing_token = self.failed = None


@dataclass(slots=True, eq=False)
class Writing:
    """A candidate that is being written, and what decides where it ends."""

    expansion: Expansion
    child: Branch
    end: ChunkEnd
    text: TextStream
    tokenizer: Tokenizer
    """Tokenizer of the model that writes."""
    stop: StopSearch | None
    """Search for stop strings; None where there are none."""
    is_due: bool = False
    """Whether the rule of the chunk has ended it; it goes on inside the beginning of a stop string."""

    @staticmethod
    def open(expansion: Expansion, tokenizer: Tokenizer) -> Writing:
        """Begin the next candidate of an expansion. tokenizer: of the model that writes."""
        child = expansion.parent.child()
        expansion.children.append(child)
        expansion.num_unfinished += 1
        stops = child.session.stops
        search = StopSearch(stops, open_stream(tokenizer), child.history) if stops.texts else None
        return Writing(expansion, child, ChunkEnd(expansion.chunk), TextStream(tokenizer), tokenizer, search)

    def append(self, token: int, logprob: float, end_token_ids: Collection[int]) -> None:
        """Add a token and its log-probability to the candidate, and end it where the token is its last.

        end_token_ids: tokens that end a response.
        """
        child = self.child
        child.chunk.append(token)
        child.chunk_writer_logprob.append(logprob)
        reads_text = self.expansion.chunk.until is not None
        self.is_due |= self.end.reached(self.text.push(token) if reads_text else "")
        stopped = None if self.stop is None else self.stop.find(token)
        if token in end_token_ids:
            child.ended = "finished"
        elif stopped is not None:
            self._end_at(stopped)
        elif len(child.chunk) >= self.expansion.max_new:
            child.ended = "length"
        elif self.is_due and not self._may_stop():
            child.ended = "chunk"
        if child.ended is not None:
            self.expansion.num_unfinished -= 1

    def _may_stop(self) -> bool:
        """Return whether the chunk has to go on because the next tokens may complete a stop string."""
        return self.stop is not None and self.stop.is_open and len(self.child.chunk) < self.expansion.longest

    def _end_at(self, match: StopMatch) -> None:
        """End the candidate at a stop string, and cut it off unless it is included.

        The first of the tokens that keep the beginning of a token has its log-probability, the others, which are
        certain then, 0; whoever wrote the token wrote these. Where hidden states or the most likely tokens are kept,
        there is one such token at most.
        """
        child = self.child
        child.ended, child.stop_reason = "stopped", match.text
        if child.session.stops.is_included:
            return
        head = encode_head(match.head, [*child.history, *child.chunk[: match.num_kept]], self.tokenizer)
        most = 1 if child.chunk_states or child.chunk_topk else self.expansion.longest_read - match.num_kept
        if len(head) > most:
            head = []
        for values in (child.chunk_writer_logprob, child.chunk_states, child.chunk_topk):
            del values[match.num_kept + bool(head) :]
        child.chunk[match.num_kept :] = head
        by_student = set(child.substituted)
        child.substituted = [place for place in range(len(child.chunk)) if min(place, match.num_kept) in by_student]
        child.chunk_writer_logprob += [0.0] * (len(head) - 1)


@dataclass(slots=True, eq=False)
class Lane:
    """An entry of the decoding batch: an expansion whose parent is being computed (writing None), or one candidate."""

    expansion: Expansion
    writing: Writing | None = None

    @property
    def branch(self) -> Branch:
        """The branch whose next token is drawn: the parent, or the candidate."""
        return self.expansion.parent if self.writing is None else self.writing.child

    @property
    def num_rows(self) -> int:
        """Number of tokens that are drawn for the lane in the next step."""
        return self.expansion.n if self.writing is None else 1

    def candidate_lane(self, tokenizer: Tokenizer) -> Lane:
        """Return the lane of one candidate: this one, or that of a new child of the expansion's parent."""
        return self if self.writing is not None else Lane(self.expansion, Writing.open(self.expansion, tokenizer))
