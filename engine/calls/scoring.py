"""Scoring of given responses: one pass over prompt and response, statistics of the response's tokens alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from genssd.engine.cache.tree import Path
from genssd.engine.decoding.shared_prefixes import PrefixSpan, SharedPrefixes
from genssd.engine.host.threads import computes
from genssd.engine.models.runner import MAX_ROWS, ModelRunner
from genssd.engine.models.token_runs import TokenRun, run_statistics
from genssd.kernels.logprob import TokenStats

Pair = tuple[list[int], list[int]]
"""Token ids of a prompt and of its response."""

PromptKey = tuple[int, ...]
"""Token ids of a prompt, as a key."""


def score(runner: ModelRunner, pairs: Sequence[Pair]) -> list[TokenStats]:
    """Return the statistics of every response's tokens, in order.

    A prompt that several pairs share is computed once, also over several forward passes as long as each of them has a
    pair with it; so is what different prompts have in common (see shared_prefixes.py). Raises NumericsError naming
    response and position, CapacityError when a pair does not fit.
    """
    results: list[TokenStats] = []
    prompts = _Prompts(runner, Counter(tuple(prompt_ids) for prompt_ids, _ in pairs))
    try:
        while len(results) < len(pairs):
            remaining = pairs[len(results) :]
            batch = _first_batch(prompts, remaining)
            if not batch:  # what is kept for later pairs takes the room of this one
                prompts.drop(list(prompts.cached))
                runner.tree.make_room(runner.tree.pool.num_pages)
                batch = _first_batch(prompts, remaining) or remaining[:1]
            results += _score_batch(prompts, batch, first=len(results))
            prompts.finish([tuple(prompt_ids) for prompt_ids, _ in batch])
    finally:
        prompts.drop(list(prompts.cached))
        prompts.prefixes.close()
    return results


class _Prompts:
    """The prompts of the pairs that are still to be scored, and what of them is in the cache.

    num_remaining: number of pairs with each prompt.
    """

    def __init__(self, runner: ModelRunner, num_remaining: Counter[PromptKey]) -> None:
        self.runner = runner
        self.threads = runner.threads
        self.prefixes = SharedPrefixes[PromptKey](runner, {key: key for key in num_remaining})
        """What different prompts share."""
        self.cached: dict[PromptKey, tuple[Path, Tensor]] = {}
        """Whole prompts in the cache: the path of each, and its last hidden state, [D]."""
        self._num_remaining = num_remaining

    def cache_repeated(self, keys: Sequence[PromptKey]) -> None:
        """Compute those of some prompts that several of the remaining pairs have and that are not in the cache."""
        fresh = list(dict.fromkeys(key for key in keys if self._num_remaining[key] > 1 and key not in self.cached))
        for key in fresh:
            self.cached[key] = self.prefixes.open(key, key)[0], torch.empty(0)
        paths = [self.cached[key][0] for key in fresh]
        rest = [key[path.length :] for key, path in zip(fresh, paths, strict=True)]
        states = self.runner.extend(paths, rest, last=[1] * len(fresh))
        for key, path, part in zip(fresh, paths, states, strict=True):
            self.cached[key] = path, part[-1].clone()

    def finish(self, keys: Sequence[PromptKey]) -> None:
        """Note that a pair of each prompt is scored, and keep only what the following pairs are likely to need."""
        self._num_remaining.subtract(keys)
        scored = set(keys)
        over = {key for key in scored if not self._num_remaining[key]}
        self.drop([key for key in self.cached if key in over or key not in scored])
        for key in over:
            self.prefixes.forget(key)
        while 2 * self.prefixes.num_pages > self.runner.tree.pool.num_pages and self.prefixes.give_up():
            pass

    def drop(self, keys: Sequence[PromptKey]) -> None:
        """Free the pages of whole prompts."""
        for key in keys:
            self.runner.tree.drop(self.cached.pop(key)[0])


def _first_batch(prompts: _Prompts, pairs: Sequence[Pair]) -> Sequence[Pair]:
    """Return as many of the first pairs as one forward pass and the cache take, what they share counted once.

    The first one alone may be more than one pass, but not more than the cache has free.
    """
    tree, prefixes, num_rows, num_pages = prompts.runner.tree, prompts.prefixes, 0, 0
    keys, spans = set(prompts.cached), set[PrefixSpan]()
    for count, (prompt_ids, ids) in enumerate(pairs):
        lengths, key = [len(ids)], tuple(prompt_ids)
        if key not in keys:
            keys.add(key)
            lengths.append(len(key) - prefixes.length(key))
            missing = prefixes.missing([key]) - spans  # computed in passes of their own
            spans |= missing
            num_pages += sum(map(prefixes.count_pages, missing))
        num_rows += sum(lengths)
        # one more page each: a half-filled page of a shared prompt is copied on the first write
        num_pages += sum(-(-length // tree.pool.page_size) + 1 for length in lengths)
        if (count and num_rows > MAX_ROWS) or num_pages > tree.num_free:
            return pairs[:count]
    return pairs


@computes
def _score_batch(prompts: _Prompts, pairs: Sequence[Pair], first: int) -> list[TokenStats]:
    """Score some pairs in one go; compute and cache the prompts that several of the remaining pairs have.

    first: index of the first pair, for messages.
    """
    runner, cached = prompts.runner, prompts.cached
    keys = [tuple(prompt_ids) for prompt_ids, _ in pairs]
    prompts.cache_repeated(keys)
    paths: list[Path] = []
    try:
        unread = []
        for key, (prompt_ids, ids) in zip(keys, pairs, strict=True):
            paths.append(runner.tree.fork(cached[key][0]) if key in cached else prompts.prefixes.open(key, key)[0])
            unread.append(prompt_ids[paths[-1].length :] + ids[:-1])
        reading = [i for i, tokens in enumerate(unread) if tokens]
        last = [min(len(unread[i]), len(pairs[i][1])) for i in reading]
        states = runner.extend([paths[i] for i in reading], [unread[i] for i in reading], last=last)
        states_of = dict(zip(reading, states, strict=True))
        runs = [
            TokenRun(
                tokens=ids,
                before_D=cached[keys[i]][1] if keys[i] in cached else None,
                states_ND=states_of.get(i),
            )
            for i, (_, ids) in enumerate(pairs)
        ]
        return run_statistics(runner, runs, lambda index, offset: f"response {first + index}, position {offset}")
    finally:
        for path in paths:
            runner.tree.drop(path)
