"""Prefixes that prompts share: which they are, and that sharing changes the work alone, never a result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.toys import VOCAB, Pair

from genssd.engine.cache.tree import Path
from genssd.engine.common.errors import CapacityError, NumericsError
from genssd.engine.common.usage import Usage
from genssd.engine.decoding import shared_prefixes
from genssd.engine.decoding.chunk import Chunk
from genssd.engine.decoding.shared_prefixes import SharedPrefixes, find_prefix_spans
from genssd.engine.engine import Engine
from genssd.engine.models.runner import ModelRunner
from genssd.engine.search.search_options import SearchOptions
from genssd.engine.search.selection import Selection
from genssd.engine.setup.loading import open_runner
from genssd.kernels.logprob import STATISTICS, TokenStats

SEARCH = SearchOptions(
    candidates=3, beam=2, chunk=Chunk(tokens=4, until=None), criterion="ppl(scope='trajectory')", max_tokens=16
)


def random_ids(count: int, seed: int) -> list[int]:
    return torch.randint(0, VOCAB - 20, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def common(one: Sequence[int], other: Sequence[int], unit: int) -> int:
    """Tokens that two prompts can share, by comparing one after the other."""
    count = 0
    while count < min(len(one), len(other)) - 1 and one[count] == other[count]:
        count += 1
    return count // unit * unit


def fresh(engine: Engine, num_pages: int = 2000, page_size: int = 4) -> Engine:
    """An engine over the same models, with empty caches of that size in which whatever was not written is NaN."""
    resources, usage = engine._resources, Usage()
    runners: dict[str, ModelRunner] = {}
    for role, runner in resources.runners.items():
        runners[role] = open_runner(
            role, runner.directory, runner.decoder, num_pages, page_size=page_size, usage=usage, threads=1
        )
        if hasattr(runners[role].tree.pool, "kv"):
            runners[role].tree.pool.kv.fill_(torch.nan)
    return Engine(replace(resources, runners=runners, usage=usage, reservations={}))


def check_empty(engine: Engine) -> None:
    for runner in engine._resources.runners.values():
        runner.tree.check()
        assert runner.tree.num_free == runner.tree.pool.num_pages


def bits(selections: Sequence[Selection]) -> list[object]:
    """Everything that a search returns, numbers to the last bit."""
    return [
        (
            s.error,
            [(t.token_ids, t.status, t.trace, str(t.score)) for t in s.trajectories],
            [(r.trace, r.token_ids, r.verdict, r.score, r.teacher_logprob.tolist()) for r in s.tree],
            [stats_bits(r.stats) for r in s.tree],
        )
        for s in selections
    ]


def stats_bits(stats: TokenStats) -> list[object]:
    return [getattr(stats, name).tolist() for name in STATISTICS]


@pytest.fixture
def apart(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Lets nothing be shared from its call on."""

    def share_nothing() -> None:
        monkeypatch.setattr(shared_prefixes, "find_prefix_spans", lambda prompts, unit: [None] * len(prompts))

    return share_nothing


PROMPTS = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=14), min_size=1, max_size=9)


@settings(max_examples=100, deadline=None)
@given(PROMPTS, st.integers(1, 3))
def test_the_spans_are_what_prompts_have_in_common(prompts: list[list[int]], unit: int) -> None:
    last = find_prefix_spans(prompts, unit)
    for i, span in enumerate(last):
        lengths = {common(prompts[i], other, unit) for j, other in enumerate(prompts) if j != i} - {0}
        chain = [] if span is None else list(span.chain())
        assert [s.end for s in chain] == sorted(lengths, reverse=True)
        assert [s.start for s in chain] == [s.end for s in chain[1:]] + [0] * bool(chain)
        for s in chain:
            holders = [j for j, other in enumerate(prompts) if other[: s.end] == prompts[i][: s.end]]
            holders = [j for j in holders if len(prompts[j]) > s.end]
            assert s.num_prompts == len(holders)
            others = [last[j] for j in holders]
            assert all(other is not None and s in other.chain() for other in others), "a prompt has another span"


def families() -> list[list[int]]:
    """Prompts after two system messages, one of which goes on with examples; equal, nested and unrelated ones."""
    system, other, examples = random_ids(13, 1), random_ids(22, 2), random_ids(17, 3)
    shared = [*system, *examples]
    return [
        [*shared, *random_ids(5, 4)],
        [*other, *random_ids(3, 5)],
        [*system, *random_ids(9, 6)],
        [*shared, *random_ids(11, 7)],
        random_ids(19, 8),
        [*shared, *random_ids(5, 4)],
        shared[:25],
        [*other, *random_ids(8, 9)],
        [*other, *random_ids(8, 9), *random_ids(6, 10)],
        [*shared, *random_ids(5, 4)[:3]],
    ]


def count_tokens(prompts: Sequence[Sequence[int]], unit: int) -> int:
    """Number of different prefixes that are computed: those in shared places once, all others once for each prompt."""
    ends = [max(common(p, q, unit) for j, q in enumerate(prompts) if j != i) for i, p in enumerate(prompts)]
    shared = {tuple(p[: k + 1]) for p, end in zip(prompts, ends, strict=True) for k in range(end)}
    return len(shared) + sum(len(p) - end for p, end in zip(prompts, ends, strict=True))


@pytest.mark.parametrize("page_size", [1, 4])
def test_a_search_has_the_same_bits_and_computes_every_shared_token_once(
    engine: Engine, page_size: int, apart: Callable[[], None]
) -> None:
    prompts, together = families(), fresh(engine, page_size=page_size)
    selections = together.select_expand(prompts, SEARCH)
    check_empty(together)
    # a rest of one token is no prefill in the counts
    rests = [len(p) - max(common(p, q, page_size) for q in prompts if q is not p) for p in prompts]
    expected = count_tokens(prompts, page_size) - rests.count(1)
    assert together.usage.prefill_tokens == 2 * expected
    apart()
    one_by_one = fresh(engine, page_size=page_size)
    assert bits(one_by_one.select_expand(prompts, SEARCH)) == bits(selections)
    assert one_by_one.usage.prefill_tokens == 2 * sum(map(len, prompts)) > 2.5 * expected


def test_generation_shares_and_frees(engine: Engine, apart: Callable[[], None]) -> None:
    prompts, together = families(), fresh(engine)
    responses = together.generate(prompts, n=2, max_tokens=6, model="student")
    check_empty(together)
    assert together.usage.prefill_tokens <= count_tokens(prompts, 4)
    stopped = fresh(engine)
    outcomes = stopped.iter_generate(prompts, n=2, max_tokens=6, model="student")
    next(outcomes)
    assert stopped.pages_in_use[0] > 0
    outcomes.close()  # type: ignore[attr-defined]
    check_empty(stopped)
    apart()
    alone = fresh(engine)
    assert alone.generate(prompts, n=2, max_tokens=6, model="student") == responses
    assert alone.usage.prefill_tokens > 1.4 * together.usage.prefill_tokens


def test_scoring_has_the_same_bits_and_computes_every_shared_token_once(
    engine: Engine, apart: Callable[[], None]
) -> None:
    prompts = families()
    responses = [random_ids(1 + 3 * i % 7, 20 + i) for i in range(len(prompts))]
    together = fresh(engine)
    scores = [stats_bits(stats) for stats in together.score(prompts, responses)]
    check_empty(together)
    distinct = [list(p) for p in dict.fromkeys(map(tuple, prompts))]
    assert together.usage.computed_tokens == count_tokens(distinct, 4) + sum(len(r) - 1 for r in responses)
    tight = fresh(engine, num_pages=16)
    assert [stats_bits(stats) for stats in tight.score(prompts, responses)] == scores
    check_empty(tight)
    apart()
    alone = fresh(engine)
    assert [stats_bits(stats) for stats in alone.score(prompts, responses)] == scores
    assert alone.usage.computed_tokens > 1.4 * together.usage.computed_tokens


def test_a_transformers_model_has_the_same_bits_and_computes_every_shared_piece_once(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, apart: Callable[[], None]
) -> None:
    """Prefixes end where pieces end: beyond that the bits would depend on the company."""
    monkeypatch.setattr("genssd.engine.models.transformers_runner.LONGEST_PIECE", 6)
    engine = pair.engine(backend="transformers")
    prompts, together, options = families()[:5], fresh(engine, page_size=4), SEARCH.with_changes(max_tokens=8)
    selections = together.select_expand(prompts, options)
    check_empty(together)
    assert together.usage.prefill_tokens == 2 * count_tokens(prompts, 12)
    apart()
    alone = fresh(engine, page_size=4)
    assert bits(alone.select_expand(prompts, options)) == bits(selections)
    assert alone.usage.prefill_tokens == 2 * sum(map(len, prompts)) > together.usage.prefill_tokens


def test_prefixes_that_do_not_fit_together_are_given_up_and_computed_again(engine: Engine) -> None:
    """Three long system messages take turns in a cache that holds one prompt at a time."""
    systems = [random_ids(40, seed) for seed in (1, 2, 3)]
    prompts = [[*systems[i % 3], *random_ids(2 + i % 4, 10 + i)] for i in range(9)]
    ample, tight = fresh(engine), fresh(engine, num_pages=32)
    options = SEARCH.with_changes(max_tokens=12)
    expected = bits(ample.select_expand(prompts, options))
    assert bits(tight.select_expand(prompts, options)) == expected
    check_empty(tight)
    assert ample.usage.prefill_tokens <= 2 * (3 * 40 + sum(len(p) - 40 for p in prompts))
    assert tight.usage.prefill_tokens > ample.usage.prefill_tokens + 2 * 3 * 40, "no prefix was given up"


@pytest.mark.parametrize("other", ["generate", "score", "local_logprob", "mean_activations"])
def test_another_call_gets_the_pages_of_prefixes_that_no_running_prompt_holds(engine: Engine, other: str) -> None:
    system = random_ids(60, 1)
    prompts = [[*system, *random_ids(3, 2)], random_ids(4, 3), [*system, *random_ids(5, 4)]]
    small = fresh(engine, num_pages=28)
    small._resources = replace(small._resources, max_num_seqs=1)
    searches = small.iter_generate(prompts, max_tokens=4)
    assert [next(searches).error for _ in range(2)] == [None, None]
    assert small.pages_in_use[0] >= 15, "the system message is kept for the third prompt"
    if other == "generate":
        assert small.generate([random_ids(60, 5)], max_tokens=8)[0][0].token_ids
    elif other == "local_logprob":
        assert len(small.local_logprob(random_ids(80, 6), [1, 2, 3], [(0, 1, 3)], model="teacher")[0]) == 2
    elif other == "mean_activations":
        assert small.mean_activations(random_ids(80, 6), [1, 2, 3], model="teacher").counted == (True,) * 3
    else:
        assert len(small.score([random_ids(80, 6)], [[1, 2, 3]], model="teacher")[0]) == 3
    assert small.pages_in_use[0] < 15
    assert [outcome.error for outcome in searches] == [None]
    check_empty(small)


def test_a_failed_computation_leaves_no_page_behind(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts, broken = families(), fresh(engine)
    runner = broken._resources.runners["student"]
    extend, calls = type(runner).extend, 0

    def fail(self: ModelRunner, *arguments: object, **options: object) -> list[torch.Tensor]:
        nonlocal calls
        calls += self.role == "student"
        if calls == 2:
            raise NumericsError("no numbers")
        return extend(self, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(type(runner), "extend", fail)
    with pytest.raises(NumericsError):
        broken.select_expand(prompts, SEARCH)
    monkeypatch.undo()
    check_empty(broken)
    assert bits(broken.select_expand(prompts, SEARCH)) == bits(fresh(engine).select_expand(prompts, SEARCH))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_order_of_prompts_and_shortages_reads_the_same_states(engine: Engine, data: st.DataObject) -> None:
    """Prompts open and end, spans are given up; every path goes on with the states of a lone prompt."""
    prompts = families()
    runner = fresh(engine, num_pages=60)._resources.runners["student"]
    prefixes = SharedPrefixes(runner, dict(enumerate(prompts)))
    running: dict[int, Path] = {}
    for _ in range(data.draw(st.integers(1, 12))):
        action = data.draw(st.sampled_from(["open", "open", "open", "end", "give_up", "forget"]))
        key = data.draw(st.integers(0, len(prompts) - 1))
        if action == "open" and key not in running:
            missing = sum(map(len, prefixes.missing([key])))
            try:
                path, count = prefixes.open(key, prompts[key])
            except CapacityError:
                continue
            assert (path.length, count) == (prefixes.length(key), missing)
            running[key] = path
        elif action in ("end", "forget") and key in running:
            runner.tree.drop(running.pop(key))
            if action == "forget":
                prefixes.forget(key)
                assert prefixes.length(key) == 0
        elif action == "give_up":
            before = runner.tree.num_free
            is_given_up = prefixes.give_up(list(islice(running, 2)))
            assert (runner.tree.num_free > before) == is_given_up
        runner.tree.check()
    for key, path in running.items():
        (warm,) = runner.extend([path], [prompts[key][path.length :]])
        (cold,) = runner.extend([cold_path := runner.tree.root()], [prompts[key]])
        assert torch.equal(warm, cold[-len(warm) :])
        runner.tree.drop(cold_path)
        runner.tree.drop(path)
    prefixes.close()
    runner.tree.check()
    assert runner.tree.num_free == runner.tree.pool.num_pages
