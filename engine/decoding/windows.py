"""Windows of a response: parts of it scored as if only the prompt and a few tokens of the response preceded them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from genssd.engine.cache.tree import Path
from genssd.engine.common.amounts import format_count
from genssd.engine.criteria.candidate import Window
from genssd.engine.host.threads import computes
from genssd.engine.models.room import require_room
from genssd.engine.models.runner import MAX_ROWS, ModelRunner
from genssd.engine.models.token_runs import TokenRun, run_statistics


@computes
def local_logprob(
    runner: ModelRunner, prompt_ids: Sequence[int], ids: Sequence[int], windows: Sequence[Window]
) -> list[Tensor]:
    """Return log p(ids[start:end] | prompt, ids[context:start]) of every window (context, start, end).

    The results are float32 [end - start]. The prompt is computed once; every window is a fork of it, so positions
    continue those of the prompt. Raises CapacityError when the prompt and one window do not fit into the free pages,
    NumericsError on NaN or infinite logits.
    """
    root = runner.tree.root()
    paths: list[Path] = []
    results: list[Tensor] = []
    try:
        _require_room(runner, root, len(prompt_ids))
        before_D = runner.extend([root], [prompt_ids], last=[1])[0][-1]
        for group in _groups(runner, root, windows):
            paths = [runner.tree.fork(root) for _ in group]
            # the last token of a window is predicted, not read; a window of one token has none to read
            read = [(path, ids[context : end - 1]) for path, (context, _, end) in zip(paths, group, strict=True)]
            nonempty = [(path, tokens) for path, tokens in read if tokens]
            states = iter(runner.extend([path for path, _ in nonempty], [tokens for _, tokens in nonempty]))
            runs = [
                TokenRun(tokens=ids[start:end], before_D=before_D, states_ND=next(states) if tokens else None)
                for (_, tokens), (_, start, end) in zip(read, group, strict=True)
            ]
            stats = run_statistics(runner, runs, lambda index, offset: "a part of a response")
            results += [part.logprob for part in stats]
            while paths:
                runner.tree.drop(paths.pop())
    finally:
        for path in (*paths, root):
            runner.tree.drop(path)
    return results


def _groups(runner: ModelRunner, root: Path, windows: Sequence[Window]) -> Iterator[Sequence[Window]]:
    """Yield the windows in order, as many at a time as one forward pass and the free pages take."""
    group: list[Window] = []
    num_rows = num_pages = 0
    for window in windows:
        num_tokens = window[2] - window[0] - 1
        num_new_pages = _num_pages(runner, root, num_tokens)
        if group and (num_rows + num_tokens > MAX_ROWS or num_pages + num_new_pages > runner.tree.num_free):
            yield group
            group, num_rows, num_pages = [], 0, 0
        _require_room(runner, root, num_tokens)
        group.append(window)
        num_rows, num_pages = num_rows + num_tokens, num_pages + num_new_pages
    if group:
        yield group


def _num_pages(runner: ModelRunner, path: Path, num_tokens: int) -> int:
    """Return how many pages a fork of a path takes for some tokens; a half-filled page is copied on the first write."""
    if not num_tokens:
        return 0
    copies_page = path.leaf.length > 0 and path.length % runner.tree.pool.page_size > 0
    return runner.tree.pages_to_append(path, num_tokens) + copies_page


def _require_room(runner: ModelRunner, path: Path, num_tokens: int) -> None:
    """Raise CapacityError when a fork of a path does not fit into the free pages with so many more tokens."""
    num_pages = _num_pages(runner, path, num_tokens)
    require_room(runner, num_pages, f"a prompt or window of {format_count(num_tokens, 'token')} needs")
