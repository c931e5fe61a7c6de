"""Plain sampling: every prompt is one expansion whose chunk is the whole response."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from genssd.engine.branch import Branch
from genssd.engine.errors import CapacityError
from genssd.engine.expander import Expander, Expansion


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One sampled response. logprob: of each token at temperature 1, under the model that was asked."""

    token_ids: tuple[int, ...]
    text: str
    status: Literal["finished", "length"]
    logprob: tuple[float, ...]
    substituted: int = 0
    """Tokens that the student wrote in the teacher's place (see `ReverseSpeculation`)."""


def generate(queue: Mapping[int, Expansion], expander: Expander) -> Iterator[tuple[int, list[Completion]]]:
    """Run the expansions, first come first served; yield the key and responses of each as it ends.

    Closing the iterator early returns all pages. Raises CapacityError when the cache is full of others' branches.
    """
    index = {expansion: i for i, expansion in queue.items()}
    waiting, in_flight = list(queue.values())[::-1], 0
    try:
        while waiting or in_flight:
            while waiting and expander.has_room and expander.fits([waiting[-1]]):
                expander.submit(waiting.pop())
                in_flight += 1
            if not in_flight:
                raise CapacityError(
                    f"{waiting[-1].label} does not fit into the key-value cache beside the branches that others hold; "
                    "drop them, or raise memory_bytes or memory_utilization"
                )
            for expansion in expander.step():
                in_flight -= 1
                yield index[expansion], [_completion(kid) for kid in expansion.kids]
                for branch in (expansion.parent, *expansion.kids):
                    branch.drop()
    finally:
        for expansion in queue.values():
            expander.cancel(expansion)
            expansion.parent.drop()


def _completion(kid: Branch) -> Completion:
    return Completion(
        token_ids=tuple(kid.chunk),
        text=kid.text,
        status="finished" if kid.ended == "finished" else "length",
        logprob=tuple(kid.chunk_teacher_logprob),
        substituted=kid.substituted,
    )
