"""Plain sampling: every prompt is one expansion whose chunk is the whole response."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from genssd.engine.common.amounts import format_count
from genssd.engine.common.errors import CapacityError, ServerError
from genssd.engine.common.quoting import quote
from genssd.engine.decoding.any_expander import AnyExpander
from genssd.engine.decoding.branch import Branch
from genssd.engine.decoding.expansion import Expansion
from genssd.engine.decoding.feed import Feed, Intake

NO_ROOM = "beside the branches that others hold; drop them, or raise memory_bytes or memory_utilization"


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Completion:
    """One sampled response."""

    token_ids: tuple[int, ...]
    """Token ids of the response, its end-of-sequence token included."""
    text: str
    """Text of the response, without special tokens."""
    status: Literal["finished", "length"]
    """Whether the response ended by itself or at a stop string, or was cut at the maximum number of tokens."""
    stop_reason: str | None = None
    """Stop string that ended the response; None where none did."""
    logprob: tuple[float, ...]
    """Log-probability of each token at temperature 1, under the writing model."""
    substituted: int = 0
    """Number of tokens that the student wrote in the teacher's place (see `ReverseSpeculation`)."""

    def __repr__(self) -> str:
        return f"<Completion of {format_count(len(self.token_ids), 'token')}, {self.status}: {quote(self.text)}>"


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """The outcome of one prompt: the responses that were sampled, or why there are none."""

    index: int
    """Index of the prompt in the call."""
    label: str
    """Name of the prompt in messages."""
    sampled: tuple[Completion, ...] = ()
    """Responses to the prompt; none when it failed."""
    error: str | None = None
    """Why the prompt failed: it is longer than a model's positions, does not fit into the cache, or the server of the
    teacher refused it."""
    is_refused: bool = False
    """Whether the server of the teacher is why it failed."""

    @property
    def completions(self) -> list[Completion]:
        """Responses to the prompt. Raises CapacityError naming the prompt when it failed, ServerError where a server
        refused it."""
        if self.error is not None:
            raise (ServerError if self.is_refused else CapacityError)(f"{self.label}: {self.error}")
        return list(self.sampled)


def generate(
    queue: Mapping[int, Expansion],
    expander: AnyExpander,
    feed: Feed | None = None,
    misfits: Mapping[int, Generation] = MappingProxyType({}),
) -> Iterator[Generation]:
    """Run the expansions, first come first served; yield the outcome of each as soon as it ends, under its key.

    feed: hands out the keys of those to run; None runs all of them. misfits: outcomes of prompts that cannot be run, by
    key, for those that the feed names. An expansion fails where branches of other calls fill the cache. Closing the
    iterator early frees all pages.
    """
    usage = expander.usage
    key_of = {expansion: key for key, expansion in queue.items()}
    waiting, num_in_flight = Intake(queue, usage, feed, misfits), 0
    try:
        while num_in_flight or waiting.fill(wait=True) or waiting.found_misfits:
            while expander.has_room and waiting.fill(wait=False) and expander.pages.fits([waiting.first]):
                expander.submit([waiting.pop()])
                num_in_flight += 1
            while waiting.found_misfits:
                yield misfits[waiting.found_misfits.pop()]
            if not num_in_flight:
                if not waiting or expander.pages.fits([waiting.first], collecting=True):
                    continue
                failed = waiting.pop()
                expander.pages.forget(failed.parent.prompt)
                usage.finish(failed.most_tokens, 0)
                error = f"the responses need {expander.pages.describe_need([failed])} {NO_ROOM}"
                yield Generation(index=key_of[failed], label=failed.label, error=error)
                continue
            for expansion in expander.step():
                num_in_flight -= 1
                yield _finish(expansion, key_of[expansion], expander)
    finally:
        for expansion in queue.values():
            expander.cancel(expansion)
            expansion.parent.drop()
        expander.pages.drop_prefixes()


def _finish(expansion: Expansion, key: int, expander: AnyExpander) -> Generation:
    """Return the outcome of an expansion that has ended, and free its pages."""
    is_written = expansion.failed is None
    sampled = tuple(_completion(child) for child in expansion.children) if is_written else ()
    expander.usage.finish(expansion.most_tokens, sum(len(completion.token_ids) for completion in sampled))
    for branch in (expansion.parent, *expansion.children):
        branch.drop()
    expander.pages.forget(expansion.parent.prompt)
    return Generation(
        index=key, label=expansion.label, sampled=sampled, error=expansion.failed, is_refused=not is_written
    )


def _completion(branch: Branch) -> Completion:
    return Completion(
        token_ids=tuple(branch.chunk),
        text=branch.text,
        status="finished" if branch.ended in ("finished", "stopped") else "length",
        stop_reason=branch.stop_reason,
        logprob=tuple(branch.chunk_writer_logprob),
        substituted=len(branch.substituted),
    )
