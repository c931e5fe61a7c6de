"""Expansions whose candidates a server writes, and the student here scores.

An expansion is one request for n completions of the branch's tokens; the server shares their prefix in its cache. A
chunk of `tokens` tokens up to a delimiter takes two steps, so that little is written in vain: `tokens` tokens, then
from each candidate its rest with the delimiter as stop text. Where a chunk ends is decided here, by the rule and the
tokens alone (`ChunkEnd`), as for a teacher in this process; what a server wrote beyond is dropped and counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from queue import Empty, SimpleQueue

import torch

from genssd.engine.common.errors import ServerError
from genssd.engine.common.usage import Usage
from genssd.engine.decoding.branch import Branch
from genssd.engine.decoding.candidate_scoring import CandidateScorer
from genssd.engine.decoding.drawing import GREEDY
from genssd.engine.decoding.expansion import Expansion, Writing
from genssd.engine.decoding.page_budget import PageBudget, Reservations
from genssd.engine.decoding.restoring import read_pending
from genssd.engine.host.threads import computes
from genssd.engine.models.runner import ModelRunner
from genssd.engine.models.sampling import Sampling, noise_key
from genssd.engine.served.client import RequestRefused
from genssd.engine.served.connections import Call, Cancelled
from genssd.engine.served.replies import BadReply, Written
from genssd.engine.served.teacher import Completions, ServedTeacher
from genssd.kernels.logprob import TopK

POLL_SECONDS = 0.2
"""Longest time that a step waits for the server, so that budgets of seconds are kept to."""
SEED_BITS = 53
"""Seeds have so many bits: larger integers are not the same in every JSON reader."""


class Asked(Call):
    """A request to the server for one or several candidates of one expansion.

    writings: the candidates, one per completion; all of them for a single completion, where the draw is greedy.
    """

    def __init__(self, expansion: Expansion, writings: Sequence[Writing], request: Completions) -> None:
        super().__init__()
        self.expansion = expansion
        self.writings = writings
        self.request = request
        self.written: list[Written] = []
        self.error: Exception | None = None


class ServedExpander:
    """The `Expander` of one session whose writer is a server.

    scorer: what scores complete candidates; None where nothing does. num_topk: how many of the writer's most likely
    tokens are kept. greedy_first: as for `WriterDrawing`. usage: counts of the engine, which every step raises.
    """

    def __init__(
        self,
        teacher: ServedTeacher,
        scorer: CandidateScorer | None,
        sampling: Sampling,
        *,
        num_topk: int,
        greedy_first: bool,
        usage: Usage,
        reservations: Reservations,
    ) -> None:
        self._teacher = teacher
        self._scorer = scorer
        self._sampling = sampling
        self._num_topk = num_topk
        self._greedy_first = greedy_first
        self._end_token_ids = teacher.tokenizer.end_token_ids
        self.usage = usage
        self.runners: Sequence[ModelRunner] = [] if scorer is None else [scorer.runner]
        self.pages = PageBudget(self.runners, reservations)
        self._submitted: list[Expansion] = []
        self._asked: dict[Expansion, list[Asked]] = {}
        self._answered: SimpleQueue[Asked] = SimpleQueue()

    @property
    def threads(self) -> int | None:
        """Number of threads that compute; None for the default."""
        return self.runners[0].threads if self.runners else None

    @property
    def has_room(self) -> bool:
        """Whether another request may be sent at once."""
        num_asked = sum(len(asked) for asked in self._asked.values())
        return num_asked + len(self._submitted) < self._teacher.client.options.in_flight

    @property
    def is_idle(self) -> bool:
        """Whether nothing is to be asked or to arrive."""
        return not self._submitted and not self._asked

    @computes
    def submit(self, expansions: Sequence[Expansion]) -> None:
        """Add expansions that fit and start together. They are asked for in the next step."""
        self.usage.prefill_tokens += self.pages.open(expansions)
        self.start(expansions)

    def start(self, expansions: Sequence[Expansion]) -> None:
        """Add expansions for which the pages are reserved already."""
        self._submitted += expansions

    def cancel(self, expansion: Expansion) -> None:
        """Stop an expansion and drop its candidates, as if it had not been submitted."""
        if expansion in self._submitted:
            self._submitted.remove(expansion)
        self._forget(expansion)
        self.pages.release(expansion)
        expansion.reset()

    @computes
    def step(self, *, waits: bool = True) -> list[Expansion]:
        """Send what was submitted, take what the server has written; return the expansions that are complete.

        Those that are `unreadable` or `failed` are complete and not scored. Where nothing arrives for a moment, none
        is returned. waits: see `AnyExpander.step`. Raises ServerError where the server will not answer any more.
        """
        self._start()
        complete = [expansion for asked in self._collect(waits) if (expansion := self._take(asked)) is not None]
        if self._scorer is not None:
            written = [expansion for expansion in complete if expansion.failed is None]
            if written:
                self._scorer.score(written, partial(self.pages.room, self._scorer.runner))
        for expansion in complete:
            self.pages.release(expansion)
        return complete

    def _start(self) -> None:
        """Ask for the candidates of the submitted expansions; the student reads their prompts meanwhile."""
        started, self._submitted = self._submitted, []
        for expansion in started:
            writings = [Writing.open(expansion, self._teacher.tokenizer) for _ in range(expansion.n)]
            self._asked[expansion] = []
            num_greedy = len(writings) if self._sampling.temperature == 0.0 else int(self._greedy_first)
            self._ask_first(expansion, writings[:num_greedy], GREEDY)
            self._ask_first(expansion, writings[num_greedy:], self._sampling)
        for runner in self.runners:
            self.usage.prefill_tokens += read_pending(runner, [expansion.parent for expansion in started])

    def _ask_first(self, expansion: Expansion, writings: Sequence[Writing], sampling: Sampling) -> None:
        """Ask for the beginnings of candidates, in one request where the server gives each its own noise."""
        if not writings:
            return
        is_greedy = sampling.temperature == 0.0
        if is_greedy or self._teacher.has_seeds:
            self._ask(expansion, writings, sampling, n=1 if is_greedy else len(writings))
        else:
            for writing in writings:
                self._ask(expansion, [writing], sampling, n=1)

    def _ask(self, expansion: Expansion, writings: Sequence[Writing], sampling: Sampling, *, n: int) -> None:
        """Send a request for what candidates of equal length lack."""
        child, chunk = writings[0].child, expansion.chunk
        num_written = len(child.chunk)
        stop, limit = child.session.stops.texts, min(expansion.longest, chunk.longest)
        if writings[0].is_due:  # the chunk goes on inside the beginning of a stop string
            limit = num_written + 1
        elif chunk.until is not None and max(num_written, 1) >= chunk.least:
            stop = (chunk.until, *stop)
        elif chunk.until is not None:
            limit = min(limit, chunk.least)
        request = Completions(
            prompt_ids=[*child.prompt.teacher, *child.history, *child.chunk],
            n=n,
            max_tokens=limit - num_written,
            sampling=sampling,
            # a server adds the index of the completion to the seed
            seed=noise_key(child.stream, child.length) & ((1 << SEED_BITS) - 1),
            num_topk=self._num_topk,
            stop=stop,
        )
        asked = Asked(expansion, writings, request)
        self._asked[expansion].append(asked)
        # what completes a candidate comes before new ones
        self._teacher.workers.submit(partial(self._wait_for, asked), first=num_written > 0)

    def _wait_for(self, asked: Asked) -> None:
        """Wait for the server, in a thread of its own."""
        try:
            if asked.is_cancelled:
                return
            asked.written = self._teacher.ask(asked.request, asked)
        except Cancelled:
            return
        except Exception as error:  # raised again, or noted, by the thread that takes it
            asked.error = error
        self._answered.put(asked)

    def _collect(self, waits: bool) -> list[Asked]:
        """Return the requests that were answered since the last step. waits: wait a moment for the first."""
        try:
            arrived = [self._answered.get(block=waits, timeout=POLL_SECONDS if waits else None)]
        except Empty:
            return []
        while not self._answered.empty():
            arrived.append(self._answered.get())
        return [asked for asked in arrived if not asked.is_cancelled]

    def _take(self, asked: Asked) -> Expansion | None:
        """Add what the server wrote to the candidates; return the expansion if it is complete now."""
        expansion = asked.expansion
        if expansion not in self._asked:
            return None
        self._asked[expansion].remove(asked)
        error = asked.error
        if error is None:
            copies = asked.written * (len(asked.writings) // len(asked.written))
            faults = [self._append(w, text) for w, text in zip(asked.writings, copies, strict=True)]
            self.usage.served_from_text += sum(text.is_from_text for text in asked.written)
            error = next((BadReply(fault) for fault in faults if fault is not None), None)
        if isinstance(error, RequestRefused | BadReply):
            expansion.failed = f"the server {self._teacher.url} did not write it: {error}"
            self._forget(expansion)
            return expansion
        if error is not None:
            raise error if isinstance(error, ServerError) else RuntimeError(str(error)) from error
        self._go_on(asked)
        if expansion.num_unfinished:
            return None
        del self._asked[expansion]
        return expansion

    def _go_on(self, asked: Asked) -> None:
        """Ask for the rest of the candidates that are not complete."""
        open_writings = [writing for writing in asked.writings if writing.child.ended is None]
        if not open_writings:
            return
        sampling = asked.request.sampling
        if sampling.temperature == 0.0:
            self._ask(asked.expansion, open_writings, sampling, n=1)
        else:
            for writing in open_writings:
                self._ask(asked.expansion, [writing], sampling, n=1)

    def _append(self, writing: Writing, written: Written) -> str | None:
        """Add tokens to a candidate up to the end of its chunk; return what is wrong with them, if anything is."""
        child = writing.child
        num_before, num_taken = len(child.chunk), 0
        for token, logprob in zip(written.tokens, written.logprobs, strict=True):
            child.chunk_topk += written.topk[num_taken : num_taken + 1]
            writing.append(token, logprob, self._end_token_ids)
            num_taken += 1
            if child.ended is not None:
                break
        self.usage.sampled_tokens += num_taken
        self.usage.discarded_tokens += len(written.tokens) - num_taken
        if child.ended is not None:
            return None
        if not num_taken:
            return "a completion is empty"
        if written.reason == "stop" and not self._is_delimited(child.chunk[num_before:], writing.expansion):
            return (
                f"it ended a response by token id {child.chunk[-1]}, which ends none for the tokenizer "
                f"{self._teacher.tokenizer.directory}: name it in eos_token_id of its generation_config.json"
            )
        return None

    def _is_delimited(self, tokens: Sequence[int], expansion: Expansion) -> bool:
        until, stops = expansion.chunk.until, expansion.parent.session.stops.texts
        text = self._teacher.tokenizer.hf.decode(list(tokens))
        return any(one in text for one in (*stops, *([] if until is None else [until])))

    def _forget(self, expansion: Expansion) -> None:
        """Give up all requests of an expansion."""
        for asked in self._asked.pop(expansion, []):
            asked.cancel()


def served_topk(branch: Branch) -> TopK | None:
    """Return the most likely tokens at every position of a branch's chunk; None where a server did not give them."""
    if not branch.chunk_topk:
        return None
    ids, logprobs = zip(*branch.chunk_topk, strict=True)
    return TopK(torch.tensor(ids), torch.tensor(logprobs))
