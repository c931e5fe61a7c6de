"""Scoring of given responses: one pass over prompt and response, statistics of the response's tokens alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch

from genssd.engine.errors import NumericsError
from genssd.engine.runner import MAX_ROWS, ModelRunner
from genssd.engine.tree import Path
from genssd.kernels.logprob import NonFiniteLogits, TokenStats, linear_logprob

Pair = tuple[list[int], list[int]]
"""Token ids of a prompt and of its response."""


def score(runner: ModelRunner, pairs: Sequence[Pair]) -> list[TokenStats]:
    """Statistics of every response, in order. Raises NumericsError naming response and position, CapacityError."""
    results: list[TokenStats] = []
    while len(results) < len(pairs):
        results += _score_batch(runner, _first_batch(runner, pairs[len(results) :]), first=len(results))
    return results


def _first_batch(runner: ModelRunner, pairs: Sequence[Pair]) -> Sequence[Pair]:
    """As many of the first pairs as one forward pass and the cache take, equal prompts counted once; at least one."""
    pool, rows, pages = runner.tree.pool, 0, 0
    prompts: set[tuple[int, ...]] = set()
    for count, (prompt_ids, ids) in enumerate(pairs):
        parts = [len(ids)] if tuple(prompt_ids) in prompts else [len(prompt_ids), len(ids)]
        prompts.add(tuple(prompt_ids))
        rows += sum(parts)
        # one more page each: a half-filled page of a shared prompt is copied on the first write
        pages += sum(-(-tokens // pool.page_size) + 1 for tokens in parts)
        if count and (rows > MAX_ROWS or pages > pool.num_free):
            return pairs[:count]
    return pairs


@torch.inference_mode()
def _score_batch(runner: ModelRunner, pairs: Sequence[Pair], first: int) -> list[TokenStats]:
    """first: the index of the first pair, for messages. A prompt that several pairs share is computed once."""
    counts = Counter(tuple(prompt_ids) for prompt_ids, _ in pairs)
    shared = {prompt: runner.tree.root() for prompt, count in counts.items() if count > 1}
    paths: list[Path] = []
    try:
        states = runner.extend(list(shared.values()), list(shared))
        before = {prompt: part[-1:] for prompt, part in zip(shared, states, strict=True)}
        unread = []
        for prompt_ids, ids in pairs:
            root = shared.get(tuple(prompt_ids))
            paths.append(runner.tree.root() if root is None else runner.tree.fork(root))
            unread.append(ids[:-1] if root is not None else prompt_ids + ids[:-1])
        reading = [i for i, tokens in enumerate(unread) if tokens]
        hidden = runner.extend([paths[i] for i in reading], [unread[i] for i in reading])
        read = dict(zip(reading, hidden, strict=True))
        predicting = []
        for i, (prompt_ids, ids) in enumerate(pairs):
            parts = [before[tuple(prompt_ids)]] if tuple(prompt_ids) in before else []
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
        for path in (*paths, *shared.values()):
            runner.tree.drop(path)
    ends = torch.tensor([len(ids) for _, ids in pairs]).cumsum(0).tolist()
    return [stats[end - len(ids) : end] for end, (_, ids) in zip(ends, pairs, strict=True)]
