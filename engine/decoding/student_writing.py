"""Candidates that the student writes: the teacher reads them, so that either model can write the next chunk.

The student's own statistics come from the hidden states by which it drew the tokens. The teacher reads every new token
once, on its own pages, and its log-probabilities stand where those of a teacher that writes would stand: whoever wrote
a chunk, criteria and rows see the log-probabilities of the same two models.

Shapes:  N tokens   D model width
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from genssd.engine.common.usage import Usage
from genssd.engine.decoding.candidate_scoring import StudentRoom, fork_path
from genssd.engine.decoding.expansion import Expansion
from genssd.engine.models.runner import ModelRunner
from genssd.engine.models.state_rows import rows_of
from genssd.engine.models.token_runs import TokenRun, response_place, run_statistics
from genssd.engine.readers.reading import Reading


class StudentChunkReader:
    """What a session in which the student writes does with complete candidates.

    teacher: the model that reads them. student: the model that wrote them. usage: counts of the engine, which every
    call raises.
    """

    def __init__(self, teacher: ModelRunner, student: ModelRunner, usage: Usage) -> None:
        self.runner = teacher
        self._student = student
        self._usage = usage

    def score(self, complete: Sequence[Expansion], room: Callable[[Expansion], StudentRoom] | None = None) -> None:
        """Set reading, statistics and the teacher's log-probabilities of all candidates, in one pass of the teacher.

        The candidates' parents must be in the teacher's cache. A candidate of which a stop string has left no token
        keeps no statistics. room: not asked, as the candidates have as many tokens as were reserved for them. Raises
        NumericsError where logits are NaN or infinite.
        """
        children = [(expansion, child) for expansion in complete for child in expansion.children]
        for _, child in children:
            child.reading = Reading(ids=tuple(child.chunk))
        scored = [(expansion, child) for expansion, child in children if child.chunk]
        if not scored:
            return
        paths = [fork_path(self.runner, expansion.parent, child) for expansion, child in scored]
        states = self.runner.extend(paths, [child.chunk for _, child in scored])
        read: list[TokenRun] = []
        written: list[TokenRun] = []
        # rows of the whole batch would keep it alive
        last = rows_of(torch.stack([states_ND[-1] for states_ND in states]))
        for (expansion, child), states_ND, last_row in zip(scored, states, last, strict=True):
            before = expansion.parent.state("teacher").hidden
            before_D = None if before is None else before.tensor()
            read.append(TokenRun(tokens=child.chunk, before_D=before_D, states_ND=states_ND[:-1]))
            child.state("teacher").hidden = last_row
            drawn_ND = torch.stack([state.tensor() for state in child.chunk_states])
            written.append(TokenRun(tokens=child.chunk, before_D=None, states_ND=drawn_ND))
            child.chunk_states = []

        def place(index: int, offset: int) -> str:
            expansion, child = scored[index]
            return response_place(expansion.label, len(child.history) + offset)

        of_teacher = run_statistics(self.runner, read, place)
        of_student = run_statistics(self._student, written, place)
        for (_, child), teacher, student in zip(scored, of_teacher, of_student, strict=True):
            child.chunk_writer_logprob = teacher.logprob.tolist()
            child.stats = student
            self._usage.scored_tokens += len(student)
