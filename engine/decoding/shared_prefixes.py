"""Prefixes that prompts of one call share (a system message, few-shot examples): computed once, into shared pages.

    system message ---- examples ---- question 1      a span is what two or more prompts have in common;
                 \\            \\----- question 2      the rest every prompt computes itself
                  \\---- question 3

A span is computed when the first prompt with it starts. It is kept until the last prompt with it is over, and given up
earlier where its pages are needed; the next prompt with it then computes it again. Spans end between pages, so that a
prompt alone takes as many pages as it would take without them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from genssd.engine.cache.tree import Path
from genssd.engine.models.runner import ModelRunner

K = TypeVar("K", bound=Hashable)
"""What identifies a prompt in a call."""


@dataclass(slots=True, eq=False)
class PrefixSpan:
    """Tokens from position `start` to `end` that two or more prompts have in common, with all tokens before them."""

    start: int
    end: int
    parent: PrefixSpan | None
    """Shared tokens before these; None at the beginning of the prompts."""
    num_prompts: int
    """Number of prompts with the span that are not over."""
    path: Path | None = None
    """Path in the cache that ends at `end`; None while the span is not computed."""

    def __len__(self) -> int:
        return self.end - self.start

    def chain(self) -> Iterator[PrefixSpan]:
        """Yield the span and those before it, the last one first."""
        span: PrefixSpan | None = self
        while span is not None:
            yield span
            span = span.parent


def find_prefix_spans(prompts: Sequence[Sequence[int]], unit: int) -> list[PrefixSpan | None]:
    """Return the last span of every prompt that shares its beginning with another one, None for the others.

    Spans begin and end at multiples of `unit` tokens. At least the last token of a prompt is in no span.
    """
    last: list[PrefixSpan | None] = [None] * len(prompts)
    groups: list[tuple[Sequence[int], PrefixSpan | None]] = [(range(len(prompts)), None)]
    while groups:
        group, parent = groups.pop()
        start = end = 0 if parent is None else parent.end
        parts = _split(prompts, group, end, unit)
        while len(parts) == 1 and len(parts[0]) == len(group) > 1:
            end += unit
            parts = _split(prompts, group, end, unit)
        if end > start:
            parent = PrefixSpan(start, end, parent, len(group))
            for index in group:
                last[index] = parent
        groups += [(part, parent) for part in parts if len(part) > 1]
    return last


def _split(prompts: Sequence[Sequence[int]], group: Iterable[int], start: int, unit: int) -> list[list[int]]:
    """Divide prompts by the `unit` tokens from position `start` on; leave those out that end before or with them."""
    parts: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for index in group:
        ids = prompts[index]
        if len(ids) > start + unit:
            parts[tuple(ids[start : start + unit])].append(index)
    return list(parts.values())


class SharedPrefixes(Generic[K]):
    """The spans that the prompts of one call share under one model, those in its cache among them.

    prompts: token ids by the prompt's key.
    """

    def __init__(self, runner: ModelRunner, prompts: Mapping[K, Sequence[int]]) -> None:
        self._runner = runner
        spans = find_prefix_spans(list(prompts.values()), runner.sharing_unit)
        self._last = {key: span for key, span in zip(prompts, spans, strict=True) if span is not None}
        self._computed: dict[PrefixSpan, None] = {}
        """Spans that are in the cache; the one that no prompt started with for the longest time comes first."""
        runner.tree.reserves.add(self)

    @property
    def num_pages(self) -> int:
        """Number of pages of the spans that are in the cache."""
        return sum(map(self.count_pages, self._computed))

    def count_pages(self, span: PrefixSpan) -> int:
        """Return the number of pages of one span."""
        return len(span) // self._runner.tree.pool.page_size

    def length(self, key: K) -> int:
        """Return how many tokens of a prompt are in spans; 0 for a prompt that is over or was never given."""
        span = self._last.get(key)
        return 0 if span is None else span.end

    def missing(self, keys: Iterable[K]) -> set[PrefixSpan]:
        """Return the spans of some prompts that are not in the cache."""
        return {span for span in self._spans(keys) if span.path is None}

    def paths(self, keys: Iterable[K]) -> Collection[Path]:
        """Return the paths of the spans of some prompts that are in the cache."""
        return [span.path for span in self._spans(keys) if span.path is not None]

    def open(self, key: K, ids: Sequence[int]) -> tuple[Path, int]:
        """Return a new path that holds the spans of a prompt, and how many tokens were computed for that.

        ids: token ids of the prompt. Without spans the path is empty. Call it where the missing spans have room.
        """
        tree, path, num_computed = self._runner.tree, None, 0
        chain = list(self._spans([key]))
        for span in reversed(chain):
            if span.path is None:
                fresh = tree.root() if path is None else tree.fork(path)
                try:
                    self._runner.extend([fresh], [ids[span.start : span.end]], last=[1])
                except BaseException:
                    tree.drop(fresh)
                    raise
                span.path = fresh
                num_computed += len(span)
            path = span.path
        for span in chain:  # those that come first are given up last, as others continue them
            self._computed.pop(span, None)
            self._computed[span] = None
        return tree.root() if path is None else tree.fork(path), num_computed

    def forget(self, key: K) -> None:
        """Note that a prompt is over; free the spans that no other prompt needs. An unknown key is allowed."""
        for span in list(self._spans([key])):
            span.num_prompts -= 1
            if span.num_prompts == 0:
                self._drop(span)
        self._last.pop(key, None)

    def give_up(self, kept: Collection[K] = ()) -> bool:
        """Free a span that no running prompt holds, the one that was unused for longest; return whether there is one.

        kept: prompts whose spans stay.
        """
        spared = set(self._spans(kept))
        self._runner.tree.free_abandoned()
        for span in self._computed:
            if span not in spared and span.path is not None and self._runner.tree.is_alone(span.path):
                self._drop(span)
                return True
        return False

    def close(self) -> None:
        """Free all spans; nothing is shared any more."""
        for span in list(self._computed):
            self._drop(span)
        self._last.clear()

    def _spans(self, keys: Iterable[K]) -> Iterator[PrefixSpan]:
        """Yield the spans of some prompts, the last one of each first."""
        for key in keys:
            if (span := self._last.get(key)) is not None:
                yield from span.chain()

    def _drop(self, span: PrefixSpan) -> None:
        self._computed.pop(span, None)
        if span.path is not None:
            self._runner.tree.drop(span.path)
            span.path = None
