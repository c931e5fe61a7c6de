"""Plain sampling: every prompt is one expansion whose chunk is the whole response."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from genssd.engine.branch import Branch
from genssd.engine.errors import CapacityError
from genssd.engine.expander import Expander
from genssd.engine.expansion import Expansion


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One sampled response."""

    token_ids: tuple[int, ...]
    """Token ids of the response, its end-of-sequence token included."""
    text: str
    status: Literal["finished", "length"]
    """Whether the response ended by itself, or was cut at the maximum number of tokens."""
    logprob: tuple[float, ...]
    """Log-probability of each token at temperature 1, under the writing model."""
    substituted: int = 0
    """Number of tokens that the student wrote in the teacher's place (see `ReverseSpeculation`)."""


def generate(queue: Mapping[int, Expansion], expander: Expander) -> Iterator[tuple[int, list[Completion]]]:
    """Run the expansions, first come first served; yield the key and completions of each as soon as it ends.

    Closing the iterator early frees all pages. Raises CapacityError when other branches fill the cache.
    """
    usage = expander.usage
    key_of = {expansion: key for key, expansion in queue.items()}
    usage.plan(expansion.most_tokens for expansion in key_of)
    waiting, num_in_flight = list(queue.values())[::-1], 0
    try:
        while waiting or num_in_flight:
            while waiting and expander.has_room and expander.fits([waiting[-1]]):
                expander.submit(waiting.pop())
                num_in_flight += 1
            if not num_in_flight:
                raise CapacityError(
                    f"{waiting[-1].label} does not fit into the key-value cache beside the branches that others hold; "
                    "drop them, or raise memory_bytes or memory_utilization"
                )
            for expansion in expander.step():
                num_in_flight -= 1
                usage.finish(expansion.most_tokens, sum(len(child.chunk) for child in expansion.children))
                yield key_of[expansion], [_completion(child) for child in expansion.children]
                for branch in (expansion.parent, *expansion.children):
                    branch.drop()
    finally:
        for expansion in queue.values():
            expander.cancel(expansion)
            expansion.parent.drop()


def _completion(branch: Branch) -> Completion:
    return Completion(
        token_ids=tuple(branch.chunk),
        text=branch.text,
        status="finished" if branch.ended == "finished" else "length",
        logprob=tuple(branch.chunk_writer_logprob),
        substituted=branch.substituted,
    )
