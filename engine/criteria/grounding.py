"""Criteria of agents' responses: whether actions are grounded in what was observed of the environment.

The paper (What Makes Interaction Trajectories Effective for Training Terminal Agents, 2606.03461) defines the targeted
observation ratio and names the observing programs; its code is not public. Which programs act, where a command names a
path and which paths belong together is our reading, in shell_commands.py. Nobody has reproduced the paper's table from
such a reading yet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from genssd.engine.common.options_check import CheckedOptions
from genssd.engine.criteria.candidate import Candidate
from genssd.engine.criteria.shell_commands import Command, is_aligned, read_commands


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetedObservationRatio(CheckedOptions):
    """Fraction of the shell actions whose path, or its directory, an earlier turn has observed; higher is better
    (targeted observation ratio, TOR, 2606.03461; our reading of its paths).

    Commands are those of fenced shell blocks and of Terminus' JSON. 0 for a response without an action.
    """

    def score(self, candidate: Candidate) -> float:
        return _fraction_of_actions(candidate, _was_observed)

    def higher_is_better(self) -> bool:
        return True


@dataclass(frozen=True, slots=True, kw_only=True)
class GroundedActions(CheckedOptions):
    """Fraction of the shell actions that an earlier turn observes the place of and a later one verifies, by observing
    it or by running tests; higher is better. Our reading of environment-grounded supervision (EGS, 2606.03461), which
    the paper describes as inspect, act, verify, without a formula.
    """

    @property
    def not_in_search(self) -> str:
        """Why the search cannot use the criterion."""
        return "what verifies a chunk's actions comes after it"

    def score(self, candidate: Candidate) -> float:
        return _fraction_of_actions(
            candidate, lambda action, commands: _was_observed(action, commands) and _is_verified(action, commands)
        )

    def higher_is_better(self) -> bool:
        return True


def _fraction_of_actions(candidate: Candidate, counts: Callable[[Command, Sequence[Command]], bool]) -> float:
    """Return the fraction of the chunk's actions that count. counts: takes an action and all commands so far."""
    pieces = candidate.pieces()
    begin = sum(map(len, pieces[: len(candidate.history_ids)]))
    commands = read_commands("".join(pieces))
    actions = [command for command in commands if command.kind == "action" and command.start >= begin]
    return sum(counts(action, commands) for action in actions) / max(1, len(actions))


def _was_observed(action: Command, commands: Sequence[Command]) -> bool:
    return any(c.kind == "observation" and c.turn < action.turn and is_aligned(c, action) for c in commands)


def _is_verified(action: Command, commands: Sequence[Command]) -> bool:
    later = [c for c in commands if c.turn > action.turn]
    return any(c.is_test or (c.kind == "observation" and is_aligned(c, action)) for c in later)
