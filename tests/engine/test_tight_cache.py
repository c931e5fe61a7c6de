"""A cache of exactly the largest prompt's need: every prompt finishes, with the responses of an ample cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from genssd.engine.common.usage import Usage
from genssd.engine.criteria.candidate import Candidate
from genssd.engine.decoding.chunk import Chunk
from genssd.engine.engine import Engine
from genssd.engine.models.paged_runner import PagedRunner
from genssd.engine.models.pages import PagePool
from genssd.engine.search.search_options import SearchOptions
from genssd.engine.search.selection import Selection

Prompts = Callable[[int, int], list[list[int]]]
BEAM = SearchOptions(
    candidates=3, beam=2, chunk=Chunk(tokens=4, until=None), criterion="ppl(scope='trajectory')", max_tokens=20
)


class LastTokens:
    """The student's log-probability of a response's last tokens, read anew in a window after the prompt."""

    def __init__(self, longest: int) -> None:
        self.longest = longest

    def score(self, candidate: Candidate) -> float:
        ids = (*candidate.history_ids, *candidate.token_ids)
        assert candidate.local_logprob is not None
        (logprob,) = candidate.local_logprob(ids, [(0, max(0, len(ids) - self.longest), len(ids))])
        return float(logprob.double().mean())

    def higher_is_better(self) -> bool:
        return True


def engine_of(loaded: Engine, num_pages: int, page_size: int) -> Engine:
    """An engine over the same models, with caches of its own."""
    resources, runners = loaded._resources, {}
    for role, runner in resources.runners.items():
        pool = PagePool.for_model(runner.decoder, num_pages, page_size)
        pool.kv.fill_(torch.nan)
        runners[role] = PagedRunner(role, runner.directory, runner.decoder, pool)
    return Engine(replace(resources, runners=runners, usage=Usage(), reservations={}))


def run(engine: Engine, prompts: Sequence[list[int]], options: SearchOptions) -> list[Selection]:
    selections = sorted(engine.iter_select_expand(prompts, options), key=lambda selection: selection.index)
    for runner in engine._resources.runners.values():
        runner.tree.check()
    assert engine.pages_in_use[0] == 0
    return selections


def outcomes(selections: Sequence[Selection]) -> list[Any]:
    return [
        (s.error, [(t.token_ids, t.status, t.trace) for t in s.trajectories], [(r.trace, r.verdict) for r in s.tree])
        for s in selections
    ]


def smallest_cache(engine: Engine, prompt: list[int], options: SearchOptions, page_size: int, least: int) -> int:
    """The fewest pages, `least` or more, in which the prompt finishes alone."""

    def finishes(num_pages: int) -> bool:
        return run(engine_of(engine, num_pages, page_size), [prompt], options)[0].error is None

    if finishes(least):
        return least
    below, above = least, 2 * least
    while not finishes(above):
        below, above = above, 2 * above
    while above - below > 1:
        middle = (below + above) // 2
        below, above = (below, middle) if finishes(middle) else (middle, above)
    return above


@pytest.mark.parametrize(
    ("page_size", "options", "num_shared"),
    [
        pytest.param(1, BEAM, 0, id="pages-of-1"),
        pytest.param(3, BEAM, 0, id="pages-of-3"),
        pytest.param(
            3, SearchOptions(candidates=2, beam=3, chunk=Chunk(tokens=3, until=None), max_tokens=15), 0, id="beam-3"
        ),
        # two groups of prompts, whose beginnings take turns in the cache
        pytest.param(1, BEAM, 7, id="shared-pages-of-1"),
        pytest.param(3, BEAM, 11, id="shared-pages-of-3"),
        pytest.param(3, BEAM.with_changes(criterion=LastTokens(8)), 11, id="shared-windows"),
        pytest.param(3, BEAM.with_changes(criterion="scas", max_tokens=12), 11, id="shared-activations"),
        # the criterion's window needs more room than the round, which then waits decoded
        pytest.param(3, BEAM.with_changes(criterion=LastTokens(8)), 0, id="windows"),
        # only the window over a whole response is long: it is judged when the prompt holds no page any more
        pytest.param(3, BEAM.with_changes(criterion=LastTokens(40), max_tokens=24, seed=2), 0, id="long-windows"),
    ],
)
def test_every_prompt_finishes_in_a_cache_of_the_largest_need(
    engine: Engine, random_prompts: Prompts, page_size: int, options: SearchOptions, num_shared: int
) -> None:
    beginnings = [[150 + i] * num_shared for i in range(2)]
    prompts = [beginnings[i % 2] + prompt[: 12 - num_shared] for i, prompt in enumerate(random_prompts(5, 31))]
    need = 1
    for prompt in prompts:
        need = smallest_cache(engine, prompt, options, page_size, need)
    ample, tight = engine_of(engine, 2000, page_size), engine_of(engine, need, page_size)
    assert outcomes(run(tight, prompts, options)) == outcomes(run(ample, prompts, options))
    assert tight.usage.prefill_tokens > ample.usage.prefill_tokens, "no prompt was suspended"
    assert tight.usage.sampled_tokens >= ample.usage.sampled_tokens
    fewer = run(engine_of(engine, need - 1, page_size), prompts, options)
    failed = [s for s in fewer if s.error is not None]
    assert 0 < len(failed) < len(prompts)
    for selection in failed:
        assert f"{need - 1} pages (memory_bytes=" in str(selection.error)
