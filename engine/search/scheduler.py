"""The scheduler of the search: which prompt's next round is decoded when, and whose pages are freed for it.

A prompt whose next round does not fit into the cache waits. When no round is being decoded and none fits, the youngest
prompt frees its pages and is computed again later, to the same tokens, because sampling is counter-based. When the
budget of all prompts is reached, every prompt ends with what it has.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from types import MappingProxyType

from genssd.engine.common.errors import CapacityError
from genssd.engine.decoding.any_expander import AnyExpander
from genssd.engine.decoding.expansion import Expansion
from genssd.engine.decoding.feed import Intake
from genssd.engine.search.budget import Budget, BudgetMeter, BudgetName
from genssd.engine.search.prompt_search import PromptSearch
from genssd.engine.search.selection import Selection

NO_ROOM = "the prompt's next round does not fit into the key-value cache"
BESIDE_OTHERS = (
    "beside the branches that others hold; drop them, raise memory_bytes or memory_utilization, or lower candidates, "
    "beam or the chunk limit"
)


class SearchScheduler:
    """The order in which the rounds of many prompts run on one expander.

    waiting: prompts that are not started, or suspended; oldest first. misfits: outcomes of prompts that cannot be run,
    by index, for those that a feed names.
    """

    def __init__(
        self,
        waiting: Intake[PromptSearch],
        expander: AnyExpander,
        budget: Budget = Budget(),
        misfits: Mapping[int, Selection] = MappingProxyType({}),
    ) -> None:
        self._expander = expander
        self._meter = BudgetMeter(budget, ("total_budget.tokens", "total_budget.seconds"))
        self._waiting = waiting
        self._misfits = misfits
        self._active: list[PromptSearch] = []
        """Prompts that hold pages, oldest first."""
        self._decoded: list[PromptSearch] = []
        """Active prompts whose round is decoded and not judged yet."""
        self._prompt_of: dict[Expansion, PromptSearch] = {}
        """Prompts of the expansions that are being decoded."""

    def run(self) -> Iterator[Selection]:
        """Run all prompts and yield each outcome as soon as it is known. Closing the iterator early frees all pages."""
        self._meter.start()
        try:
            while self._active or self._waiting.fill(wait=True) or self._waiting.found_misfits:
                reached = self._meter.find_reached(more_tokens=1)
                if reached is not None:
                    yield from self._stop_all(reached)
                    return
                if not self._decoded:  # a new round would take the pages that the criterion waits for
                    self._start_rounds()
                while self._waiting.found_misfits:
                    yield self._misfits[self._waiting.found_misfits.pop()]
                if self._prompt_of:
                    yield from self._decode_step()
                elif self._active or self._waiting:
                    failed = self._make_room()
                    if failed is not None:
                        yield self._fail(failed, self._describe_shortage(failed))
                yield from self._judge_rounds()
        finally:
            for prompt in self._active:
                self._drop(prompt)
            self._expander.pages.drop_prefixes()

    def _start_rounds(self) -> None:
        """Start the next round of every prompt that can, oldest first; then admit new ones while rows are free."""
        ready = deque(prompt for prompt in self._active if not prompt.is_started)
        while ready or (self._expander.has_room and self._waiting.fill(wait=False)):
            prompt = ready[0] if ready else self._waiting.first
            if not self._expander.pages.fits(prompt.round):
                return  # younger prompts must not overtake, or the oldest could starve
            if ready:
                ready.popleft()
            else:
                self._active.append(self._waiting.pop())
            self._expander.submit(prompt.start_round())
            self._prompt_of.update((expansion, prompt) for expansion in prompt.round)

    def _decode_step(self) -> Iterator[Selection]:
        """Decode one token of every candidate; note the prompts whose round is complete.

        Yields the outcomes of prompts for which a token was drawn that the student does not have, or nothing was
        written by a server.
        """
        before = self._expander.usage.sampled_tokens
        complete = self._expander.step()
        self._meter.tokens += self._expander.usage.sampled_tokens - before
        for expansion in complete:
            prompt = self._prompt_of.pop(expansion, None)
            if prompt is None:  # it has failed in this step
                continue
            error = expansion.failed or expansion.unreadable
            if error is not None:
                for other in prompt.round:
                    self._prompt_of.pop(other, None)
                yield self._fail(prompt, error, expansion)
                continue
            prompt.num_unfinished -= 1
            if prompt.num_unfinished == 0:
                self._decoded.append(prompt)

    def _judge_rounds(self) -> Iterator[Selection]:
        """Judge the decoded rounds and yield the prompts that are done.

        A round that is judged frees pages, so those that had no room before it are tried again.
        """
        num_waiting = -1
        while self._decoded and len(self._decoded) != num_waiting:
            num_waiting = len(self._decoded)
            for prompt in list(self._decoded):
                try:
                    selection = prompt.finish_round()
                except CapacityError as error:  # the criterion runs the student on windows of its own
                    prompt.no_room = str(error)
                    continue
                prompt.no_room = None
                self._decoded.remove(prompt)
                if selection is not None:
                    self._active.remove(prompt)
                    yield self._count(prompt, selection)

    def _make_room(self) -> PromptSearch | None:
        """Suspend the youngest prompt, as no round is being decoded and none fits; return a prompt that fits nowhere.
        Prompts that hold a decoded round are suspended last, because it has to be decoded again. A prompt without a
        live branch, whose responses wait for the criterion, holds no pages: it fails only beside no other.
        """
        if not self._active:
            prompt = self._waiting.first
            return None if self._expander.pages.fits(prompt.round, collecting=True) else prompt
        holders = [prompt for prompt in self._active if prompt.live]
        if not holders or len(self._active) == 1:
            return self._active[-1]
        youngest = ([prompt for prompt in holders if prompt not in self._decoded] or holders)[-1]
        self._leave(youngest)
        self._cancel(youngest)
        youngest.suspend()
        self._waiting.put_back(youngest)
        return None

    def _describe_shortage(self, prompt: PromptSearch) -> str:
        """Return what a prompt needs for which there is no room."""
        need = self._expander.pages.find_misfit(prompt.round)
        if need is None:
            need = f"it needs {self._expander.pages.describe_need(prompt.round)} {BESIDE_OTHERS}"
        return prompt.no_room or f"{NO_ROOM}: {need}"

    def _fail(self, prompt: PromptSearch, error: str, expansion: Expansion | None = None) -> Selection:
        """Give a prompt up and return its outcome. expansion: the one whose candidates are the error, if any are."""
        if prompt in self._active:
            self._leave(prompt)
        else:
            self._waiting.remove(prompt)
        missing = None if expansion is None else expansion.missing_token
        writer = 0 if expansion is None else expansion.parent.writer
        self._drop(prompt)
        return self._count(prompt, prompt.outcome(error=error, missing_token=missing, missing_teacher=writer))

    def _stop_all(self, budget: BudgetName) -> Iterator[Selection]:
        """End every prompt with what it has, because the budget of all is reached; yield the outcomes."""
        prompts = [*self._active, *self._waiting]
        for prompt in prompts:
            self._cancel(prompt)
            prompt.stop(budget)
        self._active, self._decoded = [], []
        self._waiting.clear()
        self._expander.pages.drop_prefixes()
        for prompt in prompts:
            try:
                selection = prompt.outcome()
            except CapacityError as error:  # the criterion has no room beside the branches that others hold
                selection = prompt.outcome(error=str(error))
            yield self._count(prompt, selection)

    def _count(self, prompt: PromptSearch, selection: Selection) -> Selection:
        """Count a prompt as finished, forget what it shares, and return its outcome."""
        for branch in prompt.root.list_present():
            self._expander.pages.forget(branch.prompt)
        self._expander.usage.finish(prompt.most_tokens, selection.tokens_sampled)
        return selection

    def _leave(self, prompt: PromptSearch) -> None:
        """Take a prompt out of the active ones."""
        self._active.remove(prompt)
        if prompt in self._decoded:
            self._decoded.remove(prompt)

    def _drop(self, prompt: PromptSearch) -> None:
        """Free all pages of a prompt."""
        self._cancel(prompt)
        prompt.drop()

    def _cancel(self, prompt: PromptSearch) -> None:
        if prompt.is_started:
            for expansion in prompt.round:
                self._expander.cancel(expansion)
