"""Scoring of given responses: one pass over prompt and response, statistics of the response's tokens alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from genssd.engine.runner import MAX_ROWS, ModelRunner
from genssd.engine.threads import computes
from genssd.engine.token_runs import TokenRun, run_statistics
from genssd.engine.tree import Path
from genssd.kernels.logprob import TokenStats

Pair = tuple[list[int], list[int]]
"""Token ids of a prompt and of its response."""

PromptKey = tuple[int, ...]
"""Token ids of a prompt, as a key."""

CachedPrompts = dict[PromptKey, tuple[Path, Tensor]]
"""Prompts in the cache: the path of each, and its last hidden state, [D]."""


def score(runner: ModelRunner, pairs: Sequence[Pair]) -> list[TokenStats]:
    """Return the statistics of every response's tokens, in order.

    A prompt that several pairs share is computed once, also over several forward passes as long as each of them has a
    pair with it. Raises NumericsError naming response and position, CapacityError when a pair does not fit.
    """
    results: list[TokenStats] = []
    num_remaining = Counter(tuple(prompt_ids) for prompt_ids, _ in pairs)
    cached: CachedPrompts = {}
    try:
        while len(results) < len(pairs):
            remaining = pairs[len(results) :]
            batch = _first_batch(runner, remaining, cached)
            if not batch:  # the prompts that are kept for later pairs take the room of this one
                _drop(runner, cached, list(cached))
                batch = _first_batch(runner, remaining, cached) or remaining[:1]
            results += _score_batch(runner, batch, num_remaining, cached, first=len(results))
            prompts = [tuple(prompt_ids) for prompt_ids, _ in batch]
            num_remaining.subtract(prompts)
            unused = cached.keys() - set(prompts)
            _drop(runner, cached, [key for key in cached if key in unused or not num_remaining[key]])
    finally:
        _drop(runner, cached, list(cached))
    return results


def _drop(runner: ModelRunner, cached: CachedPrompts, prompts: Sequence[PromptKey]) -> None:
    for prompt in prompts:
        runner.tree.drop(cached.pop(prompt)[0])


def _first_batch(runner: ModelRunner, pairs: Sequence[Pair], cached: CachedPrompts) -> Sequence[Pair]:
    """Return as many of the first pairs as one forward pass and the cache take, equal prompts counted once.

    The first one alone may be more than one pass, but not more than the cache has free.
    """
    pool, num_rows, num_pages = runner.tree.pool, 0, 0
    prompts = set(cached)
    for count, (prompt_ids, ids) in enumerate(pairs):
        lengths = [len(ids)] if tuple(prompt_ids) in prompts else [len(prompt_ids), len(ids)]
        prompts.add(tuple(prompt_ids))
        num_rows += sum(lengths)
        # one more page each: a half-filled page of a shared prompt is copied on the first write
        num_pages += sum(-(-length // pool.page_size) + 1 for length in lengths)
        if (count and num_rows > MAX_ROWS) or num_pages > runner.tree.num_free:
            return pairs[:count]
    return pairs


@computes
def _score_batch(
    runner: ModelRunner, pairs: Sequence[Pair], num_remaining: Counter[PromptKey], cached: CachedPrompts, first: int
) -> list[TokenStats]:
    """Score some pairs in one go; compute and cache the prompts that several of the remaining pairs share.

    num_remaining: number of pairs with each prompt, from these on. first: index of the first pair, for messages.
    """
    keys = [tuple(prompt_ids) for prompt_ids, _ in pairs]
    _cache_shared(runner, keys, num_remaining, cached)
    paths: list[Path] = []
    try:
        unread = []
        for key, (prompt_ids, ids) in zip(keys, pairs, strict=True):
            paths.append(runner.tree.fork(cached[key][0]) if key in cached else runner.tree.root())
            unread.append(ids[:-1] if key in cached else prompt_ids + ids[:-1])
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


def _cache_shared(
    runner: ModelRunner, keys: Sequence[PromptKey], num_remaining: Counter[PromptKey], cached: CachedPrompts
) -> None:
    """Compute those of some prompts that several of the remaining pairs share and that are not in the cache."""
    fresh = list(dict.fromkeys(key for key in keys if num_remaining[key] > 1 and key not in cached))
    cached.update((key, (runner.tree.root(), torch.empty(0))) for key in fresh)
    states = runner.extend([cached[key][0] for key in fresh], fresh, last=[1] * len(fresh))
    cached.update((key, (cached[key][0], part[-1].clone())) for key, part in zip(fresh, states, strict=True))
