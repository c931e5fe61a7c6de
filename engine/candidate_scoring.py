"""Scoring of complete candidates: the student reads each new token once, on its own pages, after what it has read.

The first token of a chunk is scored from the last hidden state of the branch, so no prefix is ever computed again.
"""

from __future__ import annotations

from collections.abc import Sequence

from genssd.engine.branch import Branch
from genssd.engine.expansion import Expansion
from genssd.engine.runner import ModelRunner
from genssd.engine.token_map import TokenMap
from genssd.engine.token_runs import TokenRun, response_place, run_statistics
from genssd.engine.tree import Path
from genssd.engine.usage import Usage


class CandidateScorer:
    """The student's side of a session: it sets the statistics of complete candidates.

    runner: the model that scores. token_map: how it reads the writer's tokens. usage: counts of the engine, which every
    call raises.
    """

    def __init__(self, runner: ModelRunner, token_map: TokenMap, usage: Usage) -> None:
        self.runner = runner
        self._token_map = token_map
        self._usage = usage

    def score(self, complete: Sequence[Expansion]) -> None:
        """Set the statistics of all candidates of these expansions, in one forward pass.

        An expansion with a token that the student does not have is marked `unreadable` instead. The candidates'
        parents must be in the student's cache.
        """
        for expansion in complete:
            tokens = [token for child in expansion.children for token in child.chunk]
            missing = expansion.missing_token = self._token_map.find_missing(tokens)
            if missing is not None:
                expansion.unreadable = f"the {self._token_map.writer} wrote {self._token_map.describe_missing(missing)}"
        readable = [expansion for expansion in complete if expansion.unreadable is None]
        if readable:
            self._score(readable)

    def _score(self, complete: Sequence[Expansion]) -> None:
        """Extend the student over the new tokens of every candidate and set their statistics."""
        runner = self.runner
        scored = [(expansion, child) for expansion in complete for child in expansion.children]
        chunks = [self._token_map.translate(child.chunk, expansion.label) for expansion, child in scored]
        paths = [fork_path(runner, expansion.parent, child) for expansion, child in scored]
        states = runner.extend(paths, chunks)
        runs = []
        for (expansion, child), chunk, states_ND in zip(scored, chunks, states, strict=True):
            before_D = expansion.parent.state(runner.role).hidden
            runs.append(TokenRun(tokens=chunk, before_D=before_D, states_ND=states_ND[:-1]))
            child.state(runner.role).hidden = states_ND[-1].clone()  # a view would keep the whole batch alive

        def place(index: int, offset: int) -> str:
            expansion, child = scored[index]
            return response_place(expansion.label, len(child.history) + offset)

        for (_, child), stats in zip(scored, run_statistics(runner, runs, place), strict=True):
            child.stats = stats
            self._usage.scored_tokens += len(child.chunk)


def fork_path(runner: ModelRunner, parent: Branch, child: Branch) -> Path:
    """Give a candidate the path of its parent under one model, and return it."""
    path = parent.state(runner.role).path
    assert path is not None
    forked = child.state(runner.role).path = runner.tree.fork(path)
    return forked
