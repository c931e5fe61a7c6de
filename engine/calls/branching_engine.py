"""An engine whose branches the caller grows: roots of trees, and candidates that either model writes."""

from __future__ import annotations

from collections.abc import Sequence

from genssd.engine.calls.loaded_engine import LoadedEngine
from genssd.engine.calls.session import Session
from genssd.engine.common.errors import CapacityError, InputError
from genssd.engine.common.model_choices import BOTH, Role
from genssd.engine.common.options_check import check_arguments, check_count
from genssd.engine.decoding.branch import Branch, expand_together
from genssd.engine.decoding.chunk import Chunk
from genssd.engine.models.sampling import Sampling, prompt_stream
from genssd.engine.setup.resources import Resources
from genssd.engine.texts.stops import StopStrings
from genssd.engine.texts.text import Prompt


class BranchingEngine(LoadedEngine):
    """The part of an engine with which searches of one's own are written."""

    def __init__(self, resources: Resources) -> None:
        super().__init__(resources)
        self._branch_sessions: dict[tuple[Sampling, StopStrings], Session] = {}
        self._student_sessions: dict[Sampling, Session] = {}

    @check_arguments(but=("prompt",))
    def branch(
        self,
        prompt: Prompt,
        *,
        sampling: Sampling = Sampling(top_p=0.95),
        seed: int = 0,
        answer: str | None = None,
        max_tokens: int | None = None,
        stop: tuple[str, ...] = (),
        include_stop: bool = False,
    ) -> Branch:
        """Return the root of a tree for searches of your own; see `Branch`.

        answer: reference answer of the prompt, for criteria that read it. max_tokens: maximum number of tokens in a
        whole response; None for what the models have positions for. stop, include_stop: texts at which a response ends,
        whichever model writes, and whether it keeps them (see `SearchOptions`). Raises the errors of `select_expand`.
        """
        if max_tokens is not None:
            check_count("max_tokens", max_tokens)
        self._require_one_writer("teacher")
        roles: Sequence[Role] = BOTH if "student" in self._resources.runners else ["teacher"]
        made_with = (sampling, StopStrings(texts=stop, is_included=include_stop))
        session = self._branch_sessions.get(made_with)
        if session is None:
            session = Session(self._resources, sampling, "teacher", scored=len(roles) == 2, stops=made_with[1])
            self._branch_sessions[made_with] = session
        (encoded,) = self._resources.encode_all([prompt], ["the prompt"], roles, [answer])
        if encoded.misfit is not None:
            raise CapacityError(encoded.misfit)
        stream = prompt_stream(seed, encoded.ids.teacher, encoded.occurrence)
        return Branch.root(session, encoded.ids, stream, max_tokens)

    def _require_one_writer(self, model: Role) -> None:
        """Raise InputError where a model would write that is one of several teachers."""
        if model == "teacher" and self._resources.others:
            raise InputError(
                "several teachers write in a search alone: for anything else take one of them, such as "
                "engine.teachers[0]"
            )

    @check_arguments(but=("chunk",))
    def expand(
        self,
        branches: Sequence[Branch],
        n: int,
        chunk: Chunk | int = Chunk(),
        *,
        model: Role = "teacher",
        sampling: Sampling | None = None,
    ) -> list[list[Branch]]:
        """Sample n candidates of each branch as `Branch.expand` does, those of all branches in one batch.

        model: the one that writes the candidates. What the student writes the teacher reads, so that candidates of both
        compete and either goes on after them; `Branch.writer_logprob` is the teacher's in both cases. sampling: how the
        student samples; None for the options that the branches were made with, as the teacher does. Branches that were
        made with other sampling options or stop strings go in a batch of their own. Raises InputError naming a branch
        by its index, and where the student is to write with other tokens than the teacher's or beside a served one;
        CapacityError, changing nothing, when the candidates of all do not fit together.
        """
        if sampling is not None and model == "teacher":
            raise InputError("the teacher samples as its branches were made: sampling is for model='student'")
        for i, branch in enumerate(branches):
            if not any(branch.session is session for session in self._branch_sessions.values()):
                raise InputError(f"branch {i} belongs to another engine")
        sessions = None if model == "teacher" else [self._find_student_session(b, sampling) for b in branches]
        return expand_together(branches, n, chunk, sessions)

    def _find_student_session(self, branch: Branch, sampling: Sampling | None) -> Session:
        """Return the session in which the student writes candidates of a branch."""
        if sampling is None:
            sampling = next(known for (known, _), session in self._branch_sessions.items() if session is branch.session)
        session = self._student_sessions.get(sampling)
        if session is None:
            session = self._student_sessions[sampling] = Session(self._resources, sampling, "student")
        return session
