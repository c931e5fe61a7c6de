"""A writer whose device works by itself: steps are laid out before their tokens are known, and nothing else changes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from support.toys import Pair

from genssd.engine.common.errors import NumericsError
from genssd.engine.decoding.chunk import Chunk
from genssd.engine.decoding.drawing import WriterDrawing
from genssd.engine.decoding.expander import Expander
from genssd.engine.engine import Engine
from genssd.engine.models.paged_runner import PagedRunner
from genssd.engine.models.pages import PagePool
from genssd.engine.models.pending_read import PendingRead
from genssd.engine.models.sampling import Sampling
from genssd.engine.search.selection import Selection
from genssd.kernels.logprob import STATISTICS
from genssd.kernels.weight import cells_of

Prompts = Callable[[int, int], list[list[int]]]


def ahead(engine: Engine, *, pages: int | None = None) -> Engine:
    """pages: of one token each, so that a step needs new ones."""
    for role, runner in engine._resources.runners.items():
        if pages is not None:
            pool = PagePool.for_model(runner.decoder, pages, page_size=1)
            runner = engine._resources.runners[role] = PagedRunner(role, runner.directory, runner.decoder, pool)
        runner.runs_ahead = True
    return engine


def assert_same(actual: Sequence[Selection], reference: Sequence[Selection]) -> None:
    for one, other in zip(actual, reference, strict=True):
        assert len(one.tree) == len(other.tree)
        for a, b in zip(one.tree, other.tree, strict=True):
            assert (a.trace, a.token_ids, a.verdict, a.score) == (b.trace, b.token_ids, b.verdict, b.score)
            assert torch.equal(a.teacher_logprob, b.teacher_logprob)
            for name in STATISTICS:
                assert torch.equal(getattr(a.stats, name), getattr(b.stats, name)), name


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(top_p=0.9), Sampling(temperature=0.0)])
@pytest.mark.parametrize("chunk", [Chunk(tokens=1, until=None), Chunk(tokens=5, until=None), Chunk(until="sentence")])
def test_trajectories_have_the_same_bits(pair: Pair, random_prompts: Prompts, chunk: Chunk, sampling: Sampling) -> None:
    options: dict[str, Any] = {"candidates": 3, "beam": 2, "chunk": chunk, "max_tokens": 18, "sampling": sampling}
    prompts = random_prompts(5, 10)
    engine = ahead(pair.engine())
    assert_same(engine.select_expand(prompts, **options), pair.engine().select_expand(prompts, **options))
    assert engine.pages_in_use[0] == 0


def test_suspended_prompts_come_to_the_same_end(pair: Pair, random_prompts: Prompts) -> None:
    """Chunks that fill their pages to the last: the token computed ahead has room, too."""
    prompts = [p[:5] for p in random_prompts(7, 12)]
    options: dict[str, Any] = {"candidates": 2, "chunk": Chunk(tokens=4, until=None), "max_tokens": 28, "seed": 1}
    tight = ahead(pair.engine(), pages=48)
    assert_same(tight.select_expand(prompts, **options), pair.engine().select_expand(prompts, **options))
    assert tight.usage.prefill_tokens > 2 * sum(map(len, prompts)), "no prompt was suspended"
    assert tight.pages_in_use[0] == 0


def test_a_response_may_fill_all_positions(pair: Pair) -> None:
    prompt = [i % 200 for i in range(500)]
    given: dict[str, Any] = {"max_tokens": 12, "seed": 4}
    actual, reference = (engine.generate([prompt], **given) for engine in (ahead(pair.engine()), pair.engine()))
    assert [c.token_ids for c in actual[0]] == [c.token_ids for c in reference[0]]


def test_a_step_is_queued_before_the_host_reads_the_tokens_of_the_one_before(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    engine = ahead(pair.engine())
    for target, name in (
        (engine._resources.runners["teacher"], "prepare"),
        (engine._resources.runners["teacher"], "run"),
        (WriterDrawing, "_draw"),
        (PendingRead, "tolist"),
        (Expander, "_take_token"),
    ):
        monkeypatch.setattr(target, name, recorded(getattr(target, name), name, order))
    root = engine.branch([1, 2, 3])
    for branch in (*root.expand(2, Chunk(tokens=3, until=None)), root):
        branch.drop()
    step = ["_draw", "prepare", "run", "tolist", "tolist", "_take_token", "_take_token"]
    assert order == ["prepare", "run", *step * 3]


def recorded(function: Callable[..., Any], name: str, order: list[str]) -> Callable[..., Any]:
    def call(*arguments: Any, **options: Any) -> Any:
        order.append(name)
        return function(*arguments, **options)

    return call


def test_broken_weights_are_named(pair: Pair) -> None:
    engine = ahead(pair.engine())
    weight = cells_of(engine._resources.runners["teacher"].decoder.head.weight)
    kept = weight[:1].clone()
    try:
        with torch.inference_mode():
            weight[:1] = math.nan
        with pytest.raises(NumericsError, match=r"teacher .* for prompt 0, response position 0"):
            engine.generate([[1, 2, 3]], max_tokens=4)
    finally:
        with torch.inference_mode():
            weight[:1] = kept
    assert engine.pages_in_use[0] == 0
