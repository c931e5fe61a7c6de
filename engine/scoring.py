"""Scoring of given responses: one pass over prompt and response, statistics of the response's tokens alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from genssd.engine.errors import NumericsError
from genssd.engine.runner import MAX_ROWS, ModelRunner
from genssd.engine.tree import Path
from genssd.kernels.logprob import NonFiniteLogits, TokenStats, linear_logprob

Pair = tuple[list[int], list[int]]
"""Token ids of a prompt and of its response."""

Held = dict[tuple[int, ...], tuple[Path, Tensor]]
"""Prompts in the cache, by their tokens: where they lie, and the last hidden state, [1, D]."""


def score(runner: ModelRunner, pairs: Sequence[Pair]) -> list[TokenStats]:
    """Statistics of every response, in order. Raises NumericsError naming response and position, CapacityError.

    A prompt that several pairs share is computed once, also over several forward passes as long as none of them is
    without it.
    """
    results: list[TokenStats] = []
    left = Counter(tuple(prompt_ids) for prompt_ids, _ in pairs)
    held: Held = {}
    try:
        while len(results) < len(pairs):
            batch = _first_batch(runner, pairs[len(results) :], held)
            if not batch:  # what is held for pairs to come is in the way of this one
                _drop(runner, held, list(held))
                batch = _first_batch(runner, pairs[len(results) :], held) or pairs[len(results) :][:1]
            results += _score_batch(runner, batch, left, held, first=len(results))
            used = {tuple(prompt_ids) for prompt_ids, _ in batch}
            left.subtract(tuple(prompt_ids) for prompt_ids, _ in batch)
            _drop(runner, held, [prompt for prompt in held if prompt not in used or not left[prompt]])
    finally:
        _drop(runner, held, list(held))
    return results


def _drop(runner: ModelRunner, held: Held, prompts: Sequence[tuple[int, ...]]) -> None:
    for prompt in prompts:
        runner.tree.drop(held.pop(prompt)[0])


def _first_batch(runner: ModelRunner, pairs: Sequence[Pair], held: Held) -> Sequence[Pair]:
    """As many of the first pairs as one forward pass and the cache take, equal prompts counted once.

    The first one alone may be more than one pass, but not more than the cache has free.
    """
    pool, rows, pages = runner.tree.pool, 0, 0
    prompts = set(held)
    for count, (prompt_ids, ids) in enumerate(pairs):
        parts = [len(ids)] if tuple(prompt_ids) in prompts else [len(prompt_ids), len(ids)]
        prompts.add(tuple(prompt_ids))
        rows += sum(parts)
        # one more page each: a half-filled page of a shared prompt is copied on the first write
        pages += sum(-(-tokens // pool.page_size) + 1 for tokens in parts)
        if (count and rows > MAX_ROWS) or pages > pool.num_free:
            return pairs[:count]
    return pairs


@torch.inference_mode()
def _score_batch(
    runner: ModelRunner, pairs: Sequence[Pair], left: Counter[tuple[int, ...]], held: Held, first: int
) -> list[TokenStats]:
    """left: how many pairs with a prompt there are from these on; a prompt of several is held. first: the index of the
    first pair, for messages."""
    keys = [tuple(prompt_ids) for prompt_ids, _ in pairs]
    fresh = list(dict.fromkeys(key for key in keys if left[key] > 1 and key not in held))
    held.update((key, (runner.tree.root(), torch.empty(0))) for key in fresh)
    paths: list[Path] = []
    try:
        states = runner.extend([held[key][0] for key in fresh], fresh, last=[1] * len(fresh))
        held.update((key, (held[key][0], part[-1:].clone())) for key, part in zip(fresh, states, strict=True))
        unread = []
        for key, (prompt_ids, ids) in zip(keys, pairs, strict=True):
            paths.append(runner.tree.fork(held[key][0]) if key in held else runner.tree.root())
            unread.append(ids[:-1] if key in held else prompt_ids + ids[:-1])
        reading = [i for i, tokens in enumerate(unread) if tokens]
        last = [min(len(unread[i]), len(pairs[i][1])) for i in reading]
        hidden = runner.extend([paths[i] for i in reading], [unread[i] for i in reading], last=last)
        read = dict(zip(reading, hidden, strict=True))
        predicting = []
        for i, (_, ids) in enumerate(pairs):
            parts = [held[keys[i]][1]] if keys[i] in held else []
            predicting.append(torch.cat([*parts, *([read[i]] if i in read else [])])[-len(ids) :])
        targets = torch.tensor([token for _, ids in pairs for token in ids], device=runner.decoder.device)
        stats = linear_logprob(torch.cat(predicting), runner.decoder.head, targets)
    except NonFiniteLogits as error:
        which, position = [(i, t) for i, (_, ids) in enumerate(pairs) for t in range(len(ids))][error.row]
        raise NumericsError(
            f"the {runner.role} {runner.directory} produced NaN or infinite logits for response {first + which}, "
            f"position {position}; check the weights, or run it in float32"
        ) from None
    finally:
        for path in paths:
            runner.tree.drop(path)
    ends = torch.tensor([len(ids) for _, ids in pairs]).cumsum(0).tolist()
    return [stats[end - len(ids) : end] for end, (_, ids) in zip(ends, pairs, strict=True)]
