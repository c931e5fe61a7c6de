"""Counts of an engine while its calls run: what progress lines and estimates are made from."""

from __future__ import annotations

import gc

from support.tiny_pair import TinyPair

from genssd.engine.calls.nodes import Fork
from genssd.engine.decoding.chunk import Chunk
from genssd.engine.engine import Engine
from genssd.engine.models.sampling import Sampling

PROMPTS = ["3+4=", "1+1=", "2+5="]


def open_engine(pair: TinyPair) -> Engine:
    return Engine.from_pretrained(pair.teacher, pair.student, dtype="float32", memory_bytes=1 << 22)


def assert_complete(engine: Engine, prompts: int) -> None:
    usage = engine.usage
    assert (usage.planned_prompts, usage.finished_prompts) == (prompts, prompts)
    assert usage.planned_tokens == usage.sampled_tokens > 0, "no token is still to come"


def test_plain_generation_is_planned_at_its_longest_and_counted_as_it_ends(tiny_pair: TinyPair) -> None:
    engine = open_engine(tiny_pair)
    rows = engine.iter_generate(PROMPTS, n=2, max_tokens=8, sampling=Sampling())
    first, rest = next(rows), list(rows)
    assert_complete(engine, 3)
    before = engine.usage.sampled_tokens
    rows = engine.iter_generate(PROMPTS, n=2, max_tokens=8, sampling=Sampling())
    assert next(rows) == first
    assert engine.usage.planned_prompts == 6
    assert engine.usage.finished_prompts == 4
    ended = sum(len(completion.token_ids) for completion in first.completions)
    assert engine.usage.planned_tokens == before + ended + 2 * 2 * 8, "two prompts of two responses of eight tokens"
    assert list(rows) == rest


def test_a_search_is_planned_with_all_its_candidates(tiny_pair: TinyPair) -> None:
    engine = open_engine(tiny_pair)
    rows = engine.iter_select_expand(PROMPTS, candidates=3, beam=2, max_tokens=8, chunk=Chunk(tokens=4))
    first = next(rows)
    outstanding = engine.usage.planned_tokens - first.tokens_sampled
    assert (engine.usage.planned_prompts, engine.usage.finished_prompts) == (3, 1)
    assert outstanding == 2 * (3 * 2 * 8), "two prompts of two branches with three candidates each"
    list(rows)
    assert_complete(engine, 3)


def test_the_tokens_that_models_compute_are_counted_whatever_they_are_for(tiny_pair: TinyPair) -> None:
    engine = open_engine(tiny_pair)
    engine.score([[1, 2, 3]], [[4, 5]], model="student")
    assert engine.usage.computed_tokens == 4, "the last token of a response is not read"
    list(engine.iter_force([1, 2, 3], [[4, 5]], [[Fork(position=1, token=6)]], model="student", max_tokens=4))
    assert engine.usage.planned_prompts == 1
    assert engine.usage.computed_tokens >= 4 + 3 + 1 + 1


def test_bytes_of_the_pages_in_use(tiny_pair: TinyPair) -> None:
    engine = open_engine(tiny_pair)
    pages, _ = engine.pages_in_use
    assert engine.bytes_in_use[0] == pages == 0
    assert 0 < engine.bytes_in_use[1] <= 1 << 22
    branch = engine.branch("3+4=")
    branch.expand(2, Chunk(tokens=4))
    held, _ = engine.bytes_in_use
    assert 0 < held < engine.bytes_in_use[1]
    branch.drop()


def test_the_pages_in_use_can_be_read_without_changing_the_caches(tiny_pair: TinyPair) -> None:
    engine = open_engine(tiny_pair)
    branch = engine.branch("3+4=")
    branch.expand(2, Chunk(tokens=4))
    held = engine.cache_use.held_pages
    assert held > 0
    del branch
    gc.collect()
    assert engine.cache_use.held_pages == held, "another thread may be changing the tree of branches"
    assert engine.bytes_in_use == (0, engine.cache_use.bytes)
    assert engine.cache_use.held_pages == engine.pages_in_use[0] == 0
