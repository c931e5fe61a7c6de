"""The low-level tree: expand, commit, drop."""

from __future__ import annotations

import pytest
import torch
from support.toys import Pair

from genssd.engine.common.errors import CapacityError, InputError
from genssd.engine.decoding.branch import Branch
from genssd.engine.decoding.chunk import Chunk
from genssd.engine.engine import Engine
from genssd.engine.models.sampling import Sampling

FIVE = Chunk(tokens=5, until=None)
PAGE_BYTES = 16 * 1024  # of both models' pages of 16 tokens


def drop_all(*branches: Branch) -> None:
    for branch in branches:
        branch.drop()


def going_on(branch: Branch, n: int = 3) -> list[Branch]:
    """Committed children that have not ended; the others are dropped."""
    children = branch.expand(n, FIVE)
    live = [child for child in children if child.ended == "chunk"]
    drop_all(*(child for child in children if child.ended != "chunk"))
    for child in live:
        child.commit()
    return live


def test_candidates_are_scored_exactly(engine: Engine, pair: Pair) -> None:
    root = engine.branch([5, 6, 7])
    children = root.expand(3, FIVE)
    for child in children:
        assert child.history == []
        assert child.length == len(child.chunk) == len(child.stats) == len(child.writer_logprob)
        for role, actual in (("student", child.stats.logprob), ("teacher", child.writer_logprob)):
            exact = pair.logprobs(role, [5, 6, 7], child.token_ids)
            torch.testing.assert_close(actual.double(), exact, atol=1e-4, rtol=0)
    drop_all(root, *children)


def test_a_grandchild_continues_its_own_branch(engine: Engine, pair: Pair) -> None:
    root = engine.branch([5, 6, 7], seed=3)
    live = going_on(root, 4)
    assert len(live) >= 2
    for child in live:
        first = list(child.history)
        grandchildren = child.expand(2, FIVE)
        for grandchild in grandchildren:
            assert grandchild.token_ids[:5] == first
            assert grandchild.trace[:1] == child.trace
            exact = pair.logprobs("student", [5, 6, 7], grandchild.token_ids)[5:]
            torch.testing.assert_close(grandchild.stats.logprob.double(), exact, atol=1e-4, rtol=0)
        drop_all(*grandchildren)
    drop_all(root, *live)


def test_expanding_again_gives_other_candidates_and_the_same_as_at_once(engine: Engine) -> None:
    root, twin = engine.branch("abc", seed=1), engine.branch("abc", seed=1)
    first, second = root.expand(2, FIVE), root.expand(2, FIVE)
    together = twin.expand(4, FIVE)
    assert [k.token_ids for k in first + second] == [k.token_ids for k in together]
    assert [k.trace for k in first + second] == [(0,), (1,), (2,), (3,)]
    assert len({tuple(k.token_ids) for k in together}) == 4
    drop_all(root, twin, *first, *second, *together)


def test_a_branch_draws_what_the_search_draws(engine: Engine) -> None:
    (selection,) = engine.select_expand(["abc"], candidates=3, chunk=FIVE, max_tokens=10, seed=6)
    root = engine.branch("abc", seed=6)
    children = root.expand(3, FIVE)
    assert [tuple(k.token_ids) for k in children] == [r.token_ids for r in selection.tree[:3]]
    drop_all(root, *children)


def test_the_branch_itself_stays_as_it_is(engine: Engine) -> None:
    root = engine.branch("abc")
    children = root.expand(2, FIVE)
    assert root.token_ids == []
    assert root.text == ""
    children[0].commit()
    assert children[0].history
    assert children[1].history == []
    assert children[0].text == engine.tokenizer("teacher").decode(children[0].token_ids)
    assert len(children[0].stats) == 0
    assert len(children[0].history_stats[0]) == len(children[0].history)
    drop_all(root, *children)


def test_an_uncommitted_or_ended_branch_cannot_be_expanded(engine: Engine) -> None:
    root = engine.branch("abc")
    children = root.expand(1, FIVE)
    with pytest.raises(InputError, match=r"call commit\(\)"):
        children[0].expand(1, FIVE)
    drop_all(*children)
    ended = root.expand(12, Chunk(tokens=60, until=None))
    finished = next(child for child in ended if child.ended == "finished")
    finished.commit()
    with pytest.raises(InputError, match="ended"):
        finished.expand(1, FIVE)
    drop_all(root, *ended)


@pytest.mark.parametrize("n", [0, -1])
def test_a_number_of_candidates_below_one_is_named(engine: Engine, n: int) -> None:
    root = engine.branch("abc")
    try:
        with pytest.raises(InputError, match=f"{n}"):
            root.expand(n, FIVE)
    finally:
        root.drop()


def test_a_dropped_branch_cannot_be_expanded(engine: Engine) -> None:
    """Its cache is gone: what it would sample next has nothing to do with what it holds."""
    root = engine.branch("abc", seed=3)
    live = going_on(root, 4)
    dropped = live[0]
    drop_all(*live)
    held = list(dropped.token_ids)
    children: list[Branch] = []
    try:
        with pytest.raises(InputError, match="dropped"):
            children = dropped.expand(1, FIVE)
    finally:
        drop_all(root, dropped, *children)
    assert dropped.token_ids == held
    drop_all(dropped)  # again: nothing happens


def test_dropping_in_any_order_frees_everything(engine: Engine) -> None:
    for seed in range(4):
        root = engine.branch([9, 9, 9, 9], seed=seed)
        branches = [root, *going_on(root)]
        for parent in branches[1:3]:
            branches += parent.expand(2, FIVE)
        order = torch.randperm(len(branches), generator=torch.Generator().manual_seed(seed)).tolist()
        held = engine.pages_in_use[0]
        assert held
        for i in order:
            branches[i].drop()
            assert engine.pages_in_use[0] <= held
            held = engine.pages_in_use[0]
        assert held == 0


def test_siblings_survive_the_drop_of_their_parent(engine: Engine, pair: Pair) -> None:
    root = engine.branch([40] * 21, seed=2)
    children = going_on(root, 4)
    root.drop()
    for child in children[1:]:
        child.drop()
    grandchildren = children[0].expand(2, FIVE)
    children[0].drop()
    for grandchild in grandchildren:
        exact = pair.logprobs("student", [40] * 21, grandchild.token_ids)[5:]
        torch.testing.assert_close(grandchild.stats.logprob.double(), exact, atol=1e-4, rtol=0)
    drop_all(*grandchildren)


def test_a_teacher_alone_expands_without_statistics(pair: Pair) -> None:
    engine = Engine.from_pretrained(pair.teacher, dtype="float32", memory_bytes=1 << 20)
    root = engine.branch([1, 2], sampling=Sampling(temperature=0.8))
    (child,) = root.expand(1, FIVE)
    assert len(child.stats) == 0
    assert len(child.writer_logprob) == len(child.chunk)
    child.commit()
    drop_all(root, child)
    assert engine.pages_in_use[0] == 0
    with pytest.raises(InputError, match=r"no student; give student="):
        engine.select_expand(["a"])
    with pytest.raises(InputError, match=r"no student"):
        engine.score(["a"], ["b"])


def test_candidates_that_never_fit_are_refused_before_anything_is_taken(pair: Pair) -> None:
    engine = pair.engine(memory_bytes=10 * PAGE_BYTES)
    root = engine.branch("abc")
    with pytest.raises(CapacityError, match=r"4 candidates of up to 40 tokens need 13 pages"):
        root.expand(4, Chunk(tokens=40, until=None))
    assert engine.pages_in_use[0] == 0
    assert root.num_children == 0


def test_candidates_that_do_not_fit_now_take_nothing(pair: Pair) -> None:
    """An expansion alone would fit, but other branches hold the pages: it is refused as a whole, and fits later."""
    engine = pair.engine(memory_bytes=20 * PAGE_BYTES)
    holder = engine.branch("x" * 30)
    held = holder.expand(5, Chunk(tokens=20, until=None))
    other = engine.branch("other", seed=5)
    before = engine.pages_in_use[0]
    request = 4, Chunk(tokens=40, until=None)
    with pytest.raises(CapacityError):
        other.expand(*request)
    assert engine.pages_in_use[0] == before, "a refused expansion holds pages"
    drop_all(holder, *held)
    assert engine.pages_in_use[0] == 0
    children = other.expand(*request)
    fresh = pair.engine().branch("other", seed=5).expand(*request)
    assert [k.token_ids for k in children] == [k.token_ids for k in fresh]
    drop_all(other, *children)
    assert engine.pages_in_use[0] == 0


def test_other_calls_say_that_branches_hold_the_cache(pair: Pair) -> None:
    engine = pair.engine(memory_bytes=20 * PAGE_BYTES)
    holder = engine.branch("x" * 30)
    held = holder.expand(5, Chunk(tokens=20, until=None))
    before = engine.pages_in_use[0]
    with pytest.raises(CapacityError):
        engine.generate(["abc"], max_tokens=200)
    assert engine.pages_in_use[0] == before
    with pytest.raises(CapacityError):
        engine.score(["a" * 200], ["b" * 90])
    assert engine.pages_in_use[0] == before
    (selection,) = engine.select_expand(["abc"], candidates=2, chunk=Chunk(tokens=90, until=None), max_tokens=90)
    assert selection.error is not None
    with pytest.raises(InputError, match="prompt 0 has no trajectory"):
        _ = selection.best
    assert engine.pages_in_use[0] == before
    drop_all(holder, *held)
    assert engine.pages_in_use[0] == 0


def test_a_branch_at_the_last_position_says_so(pair: Pair) -> None:
    engine = pair.engine()
    root = engine.branch([7] * 509)
    (child,) = root.expand(1, FIVE)
    assert child.length <= 3
    if child.length == 3:
        assert child.ended in ("length", "finished")
    drop_all(root, child)
    with pytest.raises(CapacityError, match=r"prompt has 512 tokens.*512 positions"):
        engine.branch([7] * 512)
