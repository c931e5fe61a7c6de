"""Words for what became of candidates, rounds and trajectories of a search."""

from __future__ import annotations

from typing import Literal

Ending = Literal["chunk", "finished", "stopped", "length"]
"""Why a candidate ends: its chunk is complete | end of sequence | a stop string | no more tokens allowed."""

Verdict = Literal["kept", "forced", "beaten", "threshold", "duplicate", "loop", "empty"]
"""The fate of a candidate: expanded further or final | the same, although it is worse than the threshold | not chosen
among the acceptable ones | worse than the threshold | the same tokens as an earlier sibling | ends in a repetition |
a response of which a stop string has left nothing."""

KEPT: frozenset[str] = frozenset(("kept", "forced"))
"""Verdicts of candidates that became part of a response."""

Decision = Literal["selected", "resampled", "shortened", "forced", "asked", "pruned"]
"""What the search did after a round: kept acceptable candidates | without one, sampled it again | with shorter chunks |
kept the best one that misses the threshold | asked the next teacher | ended its branches."""

SPECIAL: tuple[Decision, ...] = ("resampled", "shortened", "forced", "asked")
"""Decisions of policies that do not prune."""

Status = Literal["finished", "length", "budget", "pruned"]
"""How a trajectory ended: end of sequence or a stop string | cut at max_tokens | the budget was reached | no
continuation was acceptable."""

STATUSES: tuple[Status, ...] = ("finished", "length", "budget", "pruned")
"""All statuses, best first."""
