"""The life of branches: pages without an owner are freed, many branches expand at once, suspended ones come back."""

from __future__ import annotations

import gc
import threading

import pytest
import torch
from support.small_pages import small_pages
from support.toys import Pair

from genssd.engine.common.errors import CapacityError, InputError
from genssd.engine.decoding.branch import Branch
from genssd.engine.decoding.chunk import Chunk
from genssd.engine.engine import Engine
from genssd.engine.models.sampling import Sampling

PROMPT = [5, 6, 7, 8, 9, 10, 11]
FIVE = Chunk(tokens=5, until=None)
PAGE_BYTES = 16 * 1024  # of both models' pages of 16 tokens


def grown(root: Branch, n: int) -> list[Branch]:
    """Committed children of a branch that go on."""
    live = [child for child in root.expand(n, FIVE) if child.ended == "chunk"]
    for child in live:
        child.commit()
    return live


def check_trees(engine: Engine) -> None:
    for runner in engine._resources.runners.values():
        runner.tree.check()


def test_branches_that_nobody_holds_return_their_pages(engine: Engine) -> None:
    root = engine.branch("abc")
    children = root.expand(3, FIVE)
    held = engine.pages_in_use[0]
    del children[1:]
    assert 0 < engine.pages_in_use[0] < held
    check_trees(engine)
    del root, children
    assert engine.pages_in_use[0] == 0
    check_trees(engine)


def test_a_cache_full_of_branches_that_nobody_holds_is_empty(pair: Pair) -> None:
    """Candidates of a branch take most of the cache; those before are forgotten, some of them in cycles."""
    engine = pair.engine(memory_bytes=20 * PAGE_BYTES)
    gc.disable()
    try:
        for seed in range(5):
            root = engine.branch("x" * 30, seed=seed)
            children: list[object] = []
            children += root.expand(5, Chunk(tokens=20, until=None))
            if seed % 2:
                children.append(children)
    finally:
        gc.enable()
    with pytest.raises(CapacityError, match=r"beside the branches that are held; drop some"):
        root.expand(5, Chunk(tokens=30, until=None))
    del root, children
    gc.collect()
    assert engine.pages_in_use[0] == 0


def test_a_branch_may_be_collected_in_another_thread_while_the_engine_works(engine: Engine) -> None:
    """The pages are freed by the engine's own thread, before it takes others."""
    branches = [engine.branch("abc", seed=seed) for seed in range(20)]
    kept = engine.branch("abc", seed=99)
    engine.expand(branches, 2, FIVE)
    thread = threading.Thread(target=branches.clear)
    thread.start()
    children = kept.expand(3, FIVE)
    thread.join()
    again = engine.branch("abc", seed=99)
    assert [k.token_ids for k in again.expand(3, FIVE)] == [k.token_ids for k in children]
    check_trees(engine)
    del kept, again, children
    assert engine.pages_in_use[0] == 0


def test_a_with_block_drops_its_branch(engine: Engine) -> None:
    with engine.branch("abc") as root:
        (child,) = root.expand(1, 5)
        assert child.length <= Chunk(tokens=5).longest
    assert root.dropped
    with pytest.raises(ZeroDivisionError), child:
        _ = 1 / 0
    assert child.dropped
    assert engine.pages_in_use[0] == 0


def test_many_branches_expand_in_one_batch_as_they_would_alone(engine: Engine) -> None:
    prompts = ["abc", "de", "x" * 40, "abc"]
    branches = [engine.branch(prompt, seed=seed) for seed, prompt in enumerate(prompts)]
    branches.append(engine.branch("cold", sampling=Sampling(temperature=0.3)))
    steps = engine.usage.sampled_tokens
    together = engine.expand(branches, 3, FIVE)
    assert [len(children) for children in together] == [3] * 5
    assert engine.usage.sampled_tokens - steps == sum(k.length for children in together for k in children)
    for seed, (prompt, children) in enumerate(zip(prompts, together, strict=False)):
        alone = engine.branch(prompt, seed=seed).expand(3, FIVE)
        assert [k.token_ids for k in alone] == [k.token_ids for k in children]
        for one, other in zip(alone, children, strict=True):
            assert torch.equal(one.stats.logprob, other.stats.logprob)
    assert engine.expand([], 2, FIVE) == []


def test_branches_that_do_not_fit_together_change_nothing(pair: Pair) -> None:
    engine = pair.engine(memory_bytes=16 * PAGE_BYTES)
    cold = engine.branch("d" * 20, sampling=Sampling(temperature=0.3))
    branches = [cold, *(engine.branch("x" * 30, seed=seed) for seed in range(3))]
    with pytest.raises(CapacityError, match=r"^the branches: 15 candidates of up to 5 tokens need 36 pages"):
        engine.expand(branches, 5, FIVE)
    assert [b.num_children for b in branches] == [0] * 4
    assert engine.pages_in_use[0] <= 4  # the prompt of the branch that was expanded first
    assert [k.token_ids for k in cold.expand(2, FIVE)] == [
        k.token_ids for k in pair.engine().branch("d" * 20, sampling=Sampling(temperature=0.3)).expand(2, FIVE)
    ]


def test_what_cannot_be_expanded_is_named_by_its_index(engine: Engine) -> None:
    root, other = engine.branch("abc"), engine.branch("de")
    (child,) = root.expand(1, FIVE)
    with pytest.raises(InputError, match="branch 1 is a candidate"):
        engine.expand([root, child], 2, FIVE)
    with pytest.raises(InputError, match="branch 2 is given twice"):
        engine.expand([root, other, root], 2, FIVE)
    other.drop()
    with pytest.raises(InputError, match="branch 0 was dropped"):
        engine.expand([other, root], 2, FIVE)
    for chunk in ("5", 1.5, True, None):
        with pytest.raises(InputError, match="chunk must be a Chunk or a number of tokens"):
            root.expand(2, chunk)  # type: ignore[arg-type]


def test_max_tokens_is_for_the_whole_response(engine: Engine) -> None:
    with pytest.raises(InputError, match="max_tokens must be at least 1, not 0"):
        engine.branch("abc", max_tokens=0)
    lengths = set()
    live, ended = [engine.branch("abc", seed=3, max_tokens=12)], []
    while live:
        for child in live.pop().expand(4, FIVE):
            child.commit()
            (live if child.ended is None else ended).append(child)
        del live[3:]
    assert max(child.length for child in ended) == 12
    for child in ended:
        assert child.ended == ("length" if child.length == 12 and child.history[-1] < 250 else "finished")
        lengths.add(child.length)
    assert len(lengths) > 1


def test_suspended_branches_come_back_with_each_token_of_their_tree_computed_once(pair: Pair) -> None:
    """They hold the same pages as before, and go on to the same candidates."""
    engine = small_pages(pair, 90, page_size=3)
    root = engine.branch(PROMPT, seed=4)
    first = grown(root, 4)[:2]
    leaves = [leaf for branch in first for leaf in grown(branch, 3)[:2]]
    deep = grown(leaves[0], 2)[:1]
    root.drop()
    for branch in (*first, leaves[0]):
        branch.drop()
    branches = [*deep, *leaves[1:]]
    assert len(branches) == 4
    held = engine.pages_in_use[0]
    twins = [engine.branch(PROMPT, seed=4)]
    tokens = {tuple(branch.token_ids[:end]) for branch in branches for end in range(1, branch.length + 1)}
    for branch in branches:
        branch.suspend()
    assert engine.pages_in_use[0] == 0
    before = engine.usage.prefill_tokens
    together = engine.expand(branches, 2, 1)
    # both models compute the prompt and every node of the tree of responses once
    assert engine.usage.prefill_tokens - before == 2 * (7 + len(tokens))
    assert twins[0].num_children == 0
    for children in together:
        for child in children:
            child.drop()
    check_trees(engine)
    # the last token of each branch is new in the teacher's cache, where the search would read it next
    assert held <= engine.pages_in_use[0] <= held + len(branches)
    for branch, children in zip(branches, together, strict=True):
        for child in children:
            exact = pair.logprobs("student", PROMPT, child.token_ids)[branch.length :]
            torch.testing.assert_close(child.stats.logprob.double(), exact, atol=1e-4, rtol=0)


def test_representations_are_short(engine: Engine) -> None:
    root = engine.branch("abc")
    (child,) = root.expand(1, FIVE)
    (selection,) = engine.select_expand(["abc"], candidates=2, chunk=5, max_tokens=10)
    ((completion,),) = engine.generate(["abc"], max_tokens=40)
    assert repr(root) == "<Branch of 3 prompt tokens: round 0, 0 tokens committed, 0 in the chunk, open>"
    assert repr(child) == "<Branch of 3 prompt tokens: round 1, 0 tokens committed, 5 in the chunk, ended: chunk>"
    assert repr(selection).startswith("<Selection 0: 1 trajectory of ")
    best = selection.best
    assert repr(best).startswith(
        f"<Trajectory of {len(best.token_ids)} tokens, {best.status}, score {best.score:.4g}: "
    )
    assert repr(completion).startswith(f"<Completion of {len(completion.token_ids)} tokens, {completion.status}: ")
    assert repr(child.candidate()).startswith("<Candidate of 5 tokens after 0, ")
    for value in (root, child, selection, selection.best, completion, child.candidate(), engine, selection.tree[0]):
        assert len(repr(value)) < 300
        assert "\n" not in repr(value)
