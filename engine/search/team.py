"""The teachers of one search: a session of each over the same student, and how each goes on with what others wrote.

    teacher 1 ---- chunk a ----            after "chunk a" was picked, teacher 2 reads its text in tokens of its own,
    teacher 2 ---- (chunk a) ---- chunk b  into its own cache, and both write candidates for what follows

A search with one teacher is a team of one. How the branches of a response belong together: views.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from genssd.engine.calls.session import Session
from genssd.engine.common.errors import InputError
from genssd.engine.common.model_choices import BOTH
from genssd.engine.criteria.criterion import AnyCriterion
from genssd.engine.decoding.any_expander import AnyExpander
from genssd.engine.decoding.branch import Branch
from genssd.engine.decoding.model_state import ModelState
from genssd.engine.models.sampling import Sampling, prompt_stream
from genssd.engine.readers.reading import Reader
from genssd.engine.search.team_expander import TeamExpander
from genssd.engine.search.views import Views
from genssd.engine.setup.resources import EncodedPrompt, Resources
from genssd.engine.texts.stops import StopStrings
from genssd.engine.texts.text import Prompt


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Team:
    """The teachers of one search, in the order in which they were given."""

    resources: tuple[Resources, ...]
    """Models of each teacher: its own, and the student that all share."""
    sessions: tuple[Session, ...]
    """Session of each teacher."""
    expander: AnyExpander
    """What runs the expansions of all sessions."""

    @staticmethod
    def open(resources: Resources, sampling: Sampling, *, num_topk: int, stops: StopStrings = StopStrings()) -> Team:
        """Open a session for each teacher of an engine. num_topk, stops: see `Session`."""
        each = resources.list_teachers()
        sessions = tuple(Session(one, sampling, "teacher", num_topk=num_topk, stops=stops) for one in each)
        if len(sessions) == 1:
            return Team(resources=each, sessions=sessions, expander=sessions[0].expander)
        members = [session.expander for session in sessions]
        return Team(resources=each, sessions=sessions, expander=TeamExpander(members, resources.reservations))

    @property
    def size(self) -> int:
        """Number of teachers."""
        return len(self.sessions)

    @property
    def has_one_tokenizer(self) -> bool:
        """Whether a token id means the same to all teachers."""
        return all(reader.is_identity for reader in self._readers.values())

    @property
    def _readers(self) -> Mapping[tuple[int, int], Reader]:
        return self.resources[0].team_readers

    def encode_all(
        self, prompts: Sequence[Prompt], labels: Sequence[str], answers: Sequence[str | None] | None
    ) -> Iterator[tuple[EncodedPrompt, ...]]:
        """Yield every prompt as each teacher reads it with the student.

        Raises InputError on a prompt that cannot be encoded, and on one that the student reads differently beside
        different teachers.
        """
        each = [one.encode_all(prompts, labels, BOTH, answers) for one in self.resources]
        for encoded in zip(*each, strict=True):
            fault = find_disagreement([(prompt.ids.student, prompt.ids.num_lead) for prompt in encoded])
            if fault is not None:
                raise InputError(f"{encoded[0].label}: {fault}")
            yield encoded

    def make_root(self, prompts: Sequence[EncodedPrompt], seed: int) -> Views:
        """Return the branches of a prompt without a response. prompts: the prompt as each teacher reads it."""
        stream = prompt_stream(seed, prompts[0].ids.teacher, prompts[0].occurrence)
        branches = [
            Branch.root(session, prompt.ids, stream) for session, prompt in zip(self.sessions, prompts, strict=True)
        ]
        for writer, branch in enumerate(branches):
            branch.writer, branch.student = writer, branches[0].student
        return Views(tuple(branches), branches[0])

    def limit_response(self, prompts: Sequence[EncodedPrompt], max_tokens: int, criterion: AnyCriterion) -> int:
        """Return the maximum number of tokens in a response to a prompt, as `Resources.search_limit` does."""
        limits = [
            one.search_limit(prompt, max_tokens, criterion) for one, prompt in zip(self.resources, prompts, strict=True)
        ]
        return min(limits)

    def find_room(self, branch: Branch) -> int:
        """Return the number of positions that the teacher of a committed branch has left."""
        positions = self.resources[branch.writer].positions("teacher")
        return positions - len(branch.prompt.teacher) - branch.length

    def continue_with(self, views: Views, winner: Branch) -> Views:
        """Return the branches of a response after a chunk. views: before it. winner: the committed candidate."""
        branches = tuple(
            winner if index == winner.writer else None if branch is None else self._follow(branch, winner)
            for index, branch in enumerate(views.branches)
        )
        return Views(branches, winner)

    def _follow(self, branch: Branch, winner: Branch) -> Branch | None:
        """Return a teacher's branch after a chunk that another one wrote; None where it cannot read the chunk."""
        chunk = winner.history[len(winner.history) - winner.history_lengths[-1] :]
        reader = self._readers[winner.writer, branch.writer]
        if reader.find_missing(chunk) is not None:
            return None
        try:
            ids = reader.read(chunk, held=b"", begins=not branch.history, ends=True).ids
        except InputError:
            return None
        state, runner = branch.teacher, self.resources[branch.writer].runners.get("teacher")
        forked = None if runner is None or state.path is None else runner.tree.fork(state.path)
        return Branch(
            session=branch.session,
            prompt=branch.prompt,
            stream=winner.stream,
            teacher=ModelState(pending=[*state.pending, *ids], path=forked, hidden=state.hidden),
            student=winner.student,
            max_tokens=branch.max_tokens,
            trace=winner.trace,
            writer=branch.writer,
            history=[*branch.history, *ids],
            history_lengths=(*branch.history_lengths, len(ids)),
            history_stats=winner.history_stats,
            history_readings=winner.history_readings,
            history_writer_logprob=winner.history_writer_logprob,
            history_topk=winner.history_topk,
        )


def find_disagreement(as_read: Sequence[tuple[Sequence[int], int]]) -> str | None:
    """Return why several teachers cannot compete for a prompt; None if they can.

    as_read: the student's token ids of the prompt and the length of its lead, beside each teacher.
    """
    first = as_read[0]
    other = next((i for i, one in enumerate(as_read) if tuple(one[0]) != tuple(first[0]) or one[1] != first[1]), None)
    if other is None:
        return None
    return (
        f"beside teacher {other + 1} the student reads another prompt than beside teacher 1, because the chat "
        "templates of the two open or close the thought differently: turn thinking on or off for both by "
        "teacher_template_kwargs, or take teachers whose chat templates agree"
    )
