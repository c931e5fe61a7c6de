"""The scheduler of the search: which prompt's next round is decoded when, and whose pages are freed for it.

A prompt whose next round does not fit into the cache waits. When no round is being decoded and none fits, the youngest
prompt frees its pages and is computed again later, to the same tokens, because sampling is counter-based.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

from genssd.engine.errors import CapacityError
from genssd.engine.expander import Expander
from genssd.engine.expansion import Expansion
from genssd.engine.search import PromptSearch
from genssd.engine.selection import Selection

NO_ROOM = (
    "the prompt's next round does not fit into the key-value cache beside the branches that others hold; "
    "raise memory_bytes or memory_utilization, or lower candidates, beam or the chunk limit"
)


class SearchScheduler:
    """The order in which the rounds of many prompts run on one expander."""

    def __init__(self, prompts: Sequence[PromptSearch], expander: Expander) -> None:
        self._expander = expander
        self._waiting = deque(prompts)
        """Prompts that are not started, or suspended; oldest first."""
        self._active: list[PromptSearch] = []
        """Prompts that hold pages, oldest first."""
        self._decoded: list[PromptSearch] = []
        """Active prompts whose round is decoded and not judged yet."""
        self._prompt_of: dict[Expansion, PromptSearch] = {}
        """Prompts of the expansions that are being decoded."""
        expander.usage.plan(prompt.most_tokens for prompt in prompts)

    def run(self) -> Iterator[Selection]:
        """Run all prompts and yield each outcome as soon as it is known. Closing the iterator early frees all pages."""
        try:
            while self._waiting or self._active:
                if not self._decoded:  # a new round would take the pages that the criterion waits for
                    self._start_rounds()
                if self._prompt_of:
                    self._decode_step()
                else:
                    failed = self._make_room()
                    if failed is not None:
                        yield self._count(failed, failed.outcome(error=NO_ROOM))
                yield from self._judge_rounds()
        finally:
            for prompt in self._active:
                self._drop(prompt)

    def _start_rounds(self) -> None:
        """Start the next round of every prompt that can, oldest first; then admit new ones while rows are free."""
        ready = deque(prompt for prompt in self._active if not prompt.is_started)
        while ready or (self._waiting and self._expander.has_room):
            prompt = ready[0] if ready else self._waiting[0]
            if not self._expander.fits(prompt.round):
                return  # younger prompts must not overtake, or the oldest could starve
            if ready:
                ready.popleft()
            else:
                self._active.append(self._waiting.popleft())
            for expansion in prompt.start_round():
                self._expander.submit(expansion)
                self._prompt_of[expansion] = prompt

    def _decode_step(self) -> None:
        """Decode one token of every candidate; note the prompts whose round is complete."""
        for expansion in self._expander.step():
            prompt = self._prompt_of.pop(expansion)
            prompt.num_unfinished -= 1
            if prompt.num_unfinished == 0:
                self._decoded.append(prompt)

    def _judge_rounds(self) -> Iterator[Selection]:
        """Judge the decoded rounds and yield the prompts that are done."""
        for prompt in list(self._decoded):
            try:
                selection = prompt.finish_round()
            except CapacityError:  # the criterion runs the student on windows of its own, which do not fit now
                continue
            self._decoded.remove(prompt)
            if selection is not None:
                self._active.remove(prompt)
                yield self._count(prompt, selection)

    def _count(self, prompt: PromptSearch, selection: Selection) -> Selection:
        """Count a prompt as finished, and return its outcome."""
        self._expander.usage.finish(prompt.most_tokens, selection.tokens_sampled)
        return selection

    def _make_room(self) -> PromptSearch | None:
        """Suspend the youngest prompt, as no round is being decoded and none fits; return it if it does not fit alone.

        Prompts that hold a decoded round are suspended last, because it has to be decoded again.
        """
        if not self._active:
            return self._waiting.popleft()
        undecoded = [prompt for prompt in self._active if prompt not in self._decoded]
        youngest = (undecoded or self._active)[-1]
        self._active.remove(youngest)
        if youngest in self._decoded:
            self._decoded.remove(youngest)
        if not self._active or not youngest.live:
            self._drop(youngest)
            return youngest
        self._cancel(youngest)
        youngest.suspend()
        self._waiting.appendleft(youngest)
        return None

    def _drop(self, prompt: PromptSearch) -> None:
        """Free all pages of a prompt."""
        self._cancel(prompt)
        prompt.drop()

    def _cancel(self, prompt: PromptSearch) -> None:
        if prompt.is_started:
            for expansion in prompt.round:
                self._expander.cancel(expansion)
