"""Prompts that are handed out one after the other: what each gets is what it gets in a call with all of them."""

from __future__ import annotations

from collections import deque

import pytest
from support.toys import Pair

from genssd.engine.decoding.chunk import Chunk

PROMPTS = ["abc", "x" * 3000, "defg", "abc", "hi"]
"""The second one is longer than the models' positions; the fourth equals the first."""
SEARCH = {"candidates": 2, "chunk": Chunk(tokens=4, until=None), "max_tokens": 12}


class ListFeed:
    """Hands out a list; None in it says that there is nothing at the moment."""

    def __init__(self, *places: int | None) -> None:
        self.places = deque(places)
        self.waits = 0

    def take(self, *, wait: bool) -> int | None:
        while self.places:
            place = self.places.popleft()
            if place is not None or not wait:
                return place
            self.waits += 1
        return None


@pytest.mark.parametrize("max_num_seqs", [1, 2, 64])
def test_fed_prompts_get_what_they_get_together(pair: Pair, max_num_seqs: int) -> None:
    engine = pair.engine(max_num_seqs=max_num_seqs)
    searched = {s.index: s for s in engine.iter_select_expand(PROMPTS, **SEARCH)}  # type: ignore[arg-type]
    written = {g.index: g for g in engine.iter_generate(PROMPTS, n=2, max_tokens=12)}
    for places in ([4, 1, 3], [None, 0, None, None, 2], [1], []):
        asked = {place for place in places if place is not None}
        feed = ListFeed(*places)
        some = list(engine.iter_select_expand(PROMPTS, **SEARCH, feed=feed))  # type: ignore[arg-type]
        assert {s.index for s in some} == asked
        assert len(some) == len(asked)
        for one in some:
            assert one.error == searched[one.index].error
            assert [t.token_ids for t in one.trajectories] == [t.token_ids for t in searched[one.index].trajectories]
            assert one.occurrence == searched[one.index].occurrence
        others = {g.index: g for g in engine.iter_generate(PROMPTS, n=2, max_tokens=12, feed=ListFeed(*places))}
        assert others == {place: written[place] for place in asked}
    assert engine.pages_in_use[0] == 0


def test_prompts_are_planned_when_they_arrive(pair: Pair) -> None:
    engine = pair.engine()
    list(engine.iter_generate(PROMPTS, n=2, max_tokens=12, feed=ListFeed(0, None, 4, 1)))
    assert engine.usage.planned_prompts == engine.usage.finished_prompts == 2
    assert engine.usage.planned_tokens == engine.usage.sampled_tokens


def test_an_engine_without_work_waits_for_the_feed(pair: Pair) -> None:
    feed = ListFeed(None, None, 2)
    assert [g.index for g in pair.engine().iter_generate(PROMPTS, max_tokens=4, feed=feed)] == [2]
    assert feed.waits >= 1
