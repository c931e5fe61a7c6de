"""The order of the prompts of a call: all of them from the beginning, or one after the other from a feed.

A feed hands out the prompts of one call to several engines, each of which takes another one when it has room. Every
engine knows all prompts, so that what a prompt draws depends on its place among them and not on the engine.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Generic, Protocol, TypeVar

from genssd.engine.common.usage import Usage


class Feed(Protocol):
    """What hands out the prompts of a call."""

    def take(self, *, wait: bool) -> int | None:
        """Return the index of the next prompt; None where there is none.

        wait: whether to wait for a prompt that may still come. Without it None says that there is none at the moment,
        with it that there will be none any more.
        """
        ...


class Sized(Protocol):
    """A prompt of a call whose responses are to be written."""

    @property
    def most_tokens(self) -> int:
        """Largest number of tokens that may be sampled for it."""
        ...


T = TypeVar("T", bound=Sized)


class Intake(Generic[T]):
    """The prompts of a call that have not begun, in order. Each is counted as planned (`Usage.plan`) when it arrives.

    prompts: those that can be run, by index. misfits: indices of those that cannot, which the feed may name as well.
    feed: hands out the prompts; None makes all of them wait from the beginning.
    """

    def __init__(
        self, prompts: Mapping[int, T], usage: Usage, feed: Feed | None = None, misfits: Iterable[int] = ()
    ) -> None:
        self._waiting: deque[T] = deque(prompts.values() if feed is None else ())
        self._prompts = {} if feed is None else dict(prompts)
        self._misfits = frozenset(misfits)
        self._feed = feed
        self._usage = usage
        self.found_misfits: list[int] = []
        """Indices of prompts that the feed has named and that cannot be run; whoever reports them clears the list."""
        usage.plan(prompt.most_tokens for prompt in self._waiting)

    def __bool__(self) -> bool:
        """Whether a prompt waits here. What the feed still has does not count."""
        return bool(self._waiting)

    def __iter__(self) -> Iterator[T]:
        return iter(self._waiting)

    @property
    def is_open(self) -> bool:
        """Whether the feed may still have a prompt."""
        return self._feed is not None

    @property
    def first(self) -> T:
        """The prompt that begins next."""
        return self._waiting[0]

    def fill(self, *, wait: bool) -> bool:
        """Return whether a prompt waits, after asking the feed for one where none does.

        wait: whether to wait for the feed, because nothing else can be done. False while `found_misfits` holds one.
        """
        while not self._waiting and self._feed is not None and not self.found_misfits:
            index = self._feed.take(wait=wait)
            if index is None:
                if wait:
                    self._feed = None
                break
            if index in self._misfits:
                self.found_misfits.append(index)
            else:
                prompt = self._prompts.pop(index)
                self._usage.plan([prompt.most_tokens])
                self._waiting.append(prompt)
        return bool(self._waiting)

    def pop(self) -> T:
        """Remove the first prompt and return it."""
        return self._waiting.popleft()

    def put_back(self, prompt: T) -> None:
        """Let a prompt that had begun be the next one again."""
        self._waiting.appendleft(prompt)

    def remove(self, prompt: T) -> None:
        """Remove a prompt that waits."""
        self._waiting.remove(prompt)

    def clear(self) -> None:
        """Remove all prompts, and forget the feed."""
        self._waiting.clear()
        self._prompts.clear()
        self._feed = None
