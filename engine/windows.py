"""Parts of a response scored as if nothing stood between them and the prompt but a window of the response."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from genssd.engine.candidate import Window
from genssd.engine.errors import CapacityError, NumericsError
from genssd.engine.runner import MAX_ROWS, ModelRunner
from genssd.engine.tree import Path
from genssd.kernels.logprob import NonFiniteLogits, linear_logprob


@torch.inference_mode()
def local_logprob(
    runner: ModelRunner, prompt_ids: Sequence[int], ids: Sequence[int], windows: Sequence[Window]
) -> list[Tensor]:
    """log p(ids[start:end] | prompt, ids[context:start]) of every window (context, start, end), float32 [end - start].

    The prompt is computed once; every window is a fork of it, so positions go on from the prompt's. Raises
    CapacityError when the prompt and one window do not fit into what is free of the cache.
    """
    root = runner.tree.root()
    paths: list[Path] = []
    results: list[Tensor] = []
    try:
        _require_room(runner, root, len(prompt_ids))
        before = runner.extend([root], [prompt_ids], last=[1])[0][-1]
        for group in _groups(runner, root, windows):
            paths = [runner.tree.fork(root) for _ in group]
            # the last token of a window is predicted, not read; a window of one token reads nothing
            read = [(path, ids[context : end - 1]) for path, (context, _, end) in zip(paths, group, strict=True)]
            full = [(path, tokens) for path, tokens in read if tokens]
            hidden = iter(runner.extend([path for path, _ in full], [tokens for _, tokens in full]))
            predicting = []
            for (_, tokens), (context, start, _) in zip(read, group, strict=True):
                states = torch.cat((before[None], next(hidden))) if tokens else before[None]
                predicting.append(states[start - context :])
            targets = torch.tensor(
                [token for _, start, end in group for token in ids[start:end]], device=runner.decoder.device
            )
            stats = linear_logprob(torch.cat(predicting), runner.decoder.head, targets)
            results += torch.split(stats.logprob, [end - start for _, start, end in group])
            while paths:
                runner.tree.drop(paths.pop())
    except NonFiniteLogits:
        raise NumericsError(
            f"the {runner.role} {runner.directory} produced NaN or infinite logits for a part of a response; check the "
            "weights, or run it in float32"
        ) from None
    finally:
        for path in (*paths, root):
            runner.tree.drop(path)
    return results


def _groups(runner: ModelRunner, root: Path, windows: Sequence[Window]) -> Iterator[Sequence[Window]]:
    """As many windows at a time as one forward pass and the free pages take."""
    pool = runner.tree.pool
    group: list[Window] = []
    rows = pages = 0
    for window in windows:
        tokens = window[2] - window[0] - 1
        need = _pages(runner, root, tokens)
        if group and (rows + tokens > MAX_ROWS or pages + need > pool.num_free):
            yield group
            group, rows, pages = [], 0, 0
        _require_room(runner, root, tokens)
        group.append(window)
        rows, pages = rows + tokens, pages + need
    if group:
        yield group


def _pages(runner: ModelRunner, path: Path, tokens: int) -> int:
    """What a fork of the path takes for some tokens: a half-filled page is copied on the first write."""
    copied = path.leaf.length > 0 and path.length % runner.tree.pool.page_size > 0
    return (runner.tree.pages_to_append(path, tokens) + copied) if tokens else 0


def _require_room(runner: ModelRunner, path: Path, tokens: int) -> None:
    if _pages(runner, path, tokens) > runner.tree.pool.num_free:
        raise CapacityError(
            f"a prompt or window of {tokens} tokens does not fit into the {runner.tree.pool.num_free} free pages of "
            f"the {runner.role}'s cache; raise memory_bytes or memory_utilization"
        )
