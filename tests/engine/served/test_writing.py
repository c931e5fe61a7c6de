"""A served teacher writes what the same model writes in this process: tokens, ends of chunks, numbers, and the law."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.search_criteria import list_search_criteria
from support.stub_server import Manners, StubServer, filtered
from support.toys import Pair

from genssd import Engine
from genssd.engine.common.errors import InputError, ServerError
from genssd.engine.decoding.chunk import Chunk
from genssd.engine.models.sampling import Sampling
from genssd.engine.search.budget import Budget
from genssd.engine.search.selection import Selection
from genssd.engine.served.options import ServerOptions

PROMPTS = [[60, 61, 62], [70, 5, 6, 7], [80] * 20, [9, 8, 7, 6]]
GREEDY = {"sampling": Sampling(temperature=0.0), "candidates": 1}


@pytest.fixture(scope="module")
def stub(pair: Pair) -> Iterator[StubServer]:
    with StubServer(pair.teacher, pair.teacher_model).running() as server:
        yield server


@pytest.fixture(scope="module")
def here(pair: Pair) -> Engine:
    return pair.engine()


@pytest.fixture(scope="module")
def served(pair: Pair, stub: StubServer) -> Engine:
    return connect(pair, stub)


def connect(pair: Pair, stub: StubServer, student: bool = True, **options: Any) -> Engine:
    return Engine.from_pretrained(
        stub.url,
        pair.student if student else None,
        dtype="float32",
        memory_bytes=1 << 22,
        teacher_tokenizer=pair.teacher,
        server=ServerOptions(**{"timeout": 10.0, "patience": 10.0, **options}),
    )


def logit_gaps(pair: Pair, prompt: list[int], response: tuple[int, ...]) -> list[float]:
    """The distance of the two best logits at every token of a response."""
    with torch.no_grad():
        logits = pair.teacher_model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]
    best = logits.double().topk(2).values
    return (best[:, 0] - best[:, 1]).tolist()


def require_same(here: Selection, served: Selection, pair: Pair, prompt: list[int]) -> int:
    """Compare greedy responses up to the first near tie; return how many had one."""
    one, other = here.best.token_ids, served.best.token_ids
    gaps = logit_gaps(pair, prompt, one)
    tie = next((i for i, gap in enumerate(gaps) if gap < 1e-3), None)
    assert one[:tie] == other[:tie]
    return tie is not None


@pytest.mark.parametrize(
    "chunk",
    [
        Chunk(tokens=5, until=None),
        Chunk(tokens=4, until="a", limit=9),
        Chunk(tokens=1, until="e"),
        Chunk(tokens=6, until="ab", limit=30),
        Chunk(tokens=3, until="\ufffd", limit=7),
    ],
)
def test_greedy_responses_and_their_chunks_are_those_of_the_model_here(
    here: Engine, served: Engine, pair: Pair, chunk: Chunk
) -> None:
    options = {**GREEDY, "chunk": chunk, "max_tokens": 40}
    ties = 0
    for prompt, one, other in zip(
        PROMPTS, here.select_expand(PROMPTS, **options), served.select_expand(PROMPTS, **options), strict=True
    ):
        tie = require_same(one, other, pair, prompt)
        ties += tie
        if tie:
            continue
        assert [c.tokens for c in one.best.chunks] == [c.tokens for c in other.best.chunks]
        assert (one.best.status, one.best.text) == (other.best.status, other.best.text)
        torch.testing.assert_close(one.best.stats.logprob, other.best.stats.logprob)
        for mine, theirs in zip(one.tree, other.tree, strict=True):
            torch.testing.assert_close(mine.teacher_logprob, theirs.teacher_logprob, atol=1e-4, rtol=1e-4)
    assert ties < len(PROMPTS)
    assert served.pages_in_use[0] == 0


def test_every_criterion_has_the_values_of_the_model_here(here: Engine, served: Engine, pair: Pair) -> None:
    options = {**GREEDY, "candidates": 2, "chunk": Chunk(tokens=6, until=None), "max_tokens": 12, "answers": ["42"]}
    num_compared = 0
    for name in list_search_criteria():
        for prompt in PROMPTS:
            (one,), (other,) = (e.select_expand([prompt], criterion=name, **options) for e in (here, served))
            if require_same(one, other, pair, prompt):
                continue
            scores = [[record.score for record in selection.tree] for selection in (one, other)]
            assert scores[1] == pytest.approx(scores[0], rel=1e-3, abs=1e-4, nan_ok=True), name
            num_compared += 1
            break
    assert num_compared == len(list_search_criteria())


def test_two_requests_write_a_chunk_and_nothing_is_discarded(served: Engine, stub: StubServer) -> None:
    before = len(stub.requests), served.usage.discarded_tokens
    (selection,) = served.select_expand([PROMPTS[0]], **GREEDY, chunk=Chunk(tokens=3, until="a", limit=9), max_tokens=9)
    first, second = stub.requests[before[0] : before[0] + 2]
    assert (first["max_tokens"], first.get("stop")) == (3, None)
    assert (second["max_tokens"], second["stop"]) == (6, ["a"])
    assert second["prompt"] == [*PROMPTS[0], *selection.best.token_ids[:3]]
    assert served.usage.discarded_tokens == before[1]


def test_a_delimiter_that_began_in_the_first_request_ends_the_chunk_as_here(
    here: Engine, served: Engine, pair: Pair
) -> None:
    """The server cannot see the part of the delimiter that was written before; what it writes beyond is dropped."""
    free = here.select_expand([PROMPTS[2]], **GREEDY, chunk=Chunk(tokens=30, until=None), max_tokens=30)[0].best
    texts = here.tokenizer("teacher").pieces(free.token_ids)
    place = next(i for i in range(2, 24) if texts[i] and texts[i - 1 : i + 1] != texts[i : i + 2] and texts[i + 1])
    until = texts[place] + texts[place + 1]
    chunk = Chunk(tokens=place + 1, until=until, limit=30)
    mine, theirs = (e.select_expand([PROMPTS[2]], **GREEDY, chunk=chunk, max_tokens=30)[0].best for e in (here, served))
    assert [c.tokens for c in mine.chunks] == [c.tokens for c in theirs.chunks]
    assert mine.chunks[0].tokens == place + 2
    assert served.usage.discarded_tokens > 0


def test_greedy_candidates_of_one_branch_are_asked_for_once(served: Engine, here: Engine, stub: StubServer) -> None:
    before = len(stub.requests)
    options = {
        "candidates": 3,
        "sampling": Sampling(temperature=0.0),
        "chunk": Chunk(tokens=4, until=None),
        "max_tokens": 4,
    }
    (mine,), (theirs,) = (e.select_expand([PROMPTS[1]], **options) for e in (here, served))
    assert [request["n"] for request in stub.requests[before:]] == [1]
    assert [c.token_ids for c in theirs.tree] == [c.token_ids for c in mine.tree]


def test_the_first_of_the_responses_can_be_the_most_likely_one(served: Engine, here: Engine) -> None:
    for engine in (here, served):
        (outcome,) = engine.iter_generate([PROMPTS[0]], n=3, max_tokens=6, greedy_first=True)
        (greedy,) = engine.generate([PROMPTS[0]], max_tokens=6, sampling=Sampling(temperature=0.0))
        assert outcome.completions[0].token_ids == greedy[0].token_ids


@pytest.mark.parametrize(
    "sampling",
    [Sampling(), Sampling(temperature=0.7, top_k=5), Sampling(temperature=1.5, top_p=0.8), Sampling(min_p=0.1)],
)
def test_sampled_tokens_follow_the_same_law(served: Engine, pair: Pair, sampling: Sampling) -> None:
    """A chi-square test of the first tokens against transformers' logits and filters in float64."""
    fields = {
        "temperature": sampling.temperature,
        "top_k": sampling.top_k or -1,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p,
    }
    with torch.no_grad():
        raw = pair.teacher_model(torch.tensor([PROMPTS[3]])).logits[0, -1].double().log_softmax(-1)
    law = filtered(raw, fields).exp()
    number = 150
    (completions,) = served.generate([PROMPTS[3]], n=number, max_tokens=1, sampling=sampling, seed=3)
    counts = Counter(completion.token_ids[0] for completion in completions)
    assert all(law[token] > 0 for token in counts)
    for completion in completions[:20]:
        assert completion.logprob[0] == pytest.approx(float(raw[completion.token_ids[0]]), abs=1e-6)
    common = [i for i in range(len(law)) if law[i] * number >= 5]
    rest = number - sum(counts[i] for i in common), number * (1 - float(law[common].sum()))
    statistic = sum((counts[i] - number * float(law[i])) ** 2 / (number * float(law[i])) for i in common)
    statistic += (rest[0] - rest[1]) ** 2 / rest[1] if rest[1] >= 1 else 0.0
    degrees = max(len(common), 1)
    assert statistic < degrees + 4.0 * math.sqrt(2.0 * degrees)


def test_noise_depends_on_the_place_in_the_tree_and_candidates_differ(served: Engine) -> None:
    options: Any = {"candidates": 4, "chunk": Chunk(tokens=5, until=None), "max_tokens": 10, "seed": 5}
    alone = served.select_expand([PROMPTS[1]], **options)[0]
    beside = served.select_expand(PROMPTS, **options)[1]
    assert [c.token_ids for c in alone.tree] == [c.token_ids for c in beside.tree]
    assert len({c.token_ids for c in alone.tree[:4]}) == 4
    other = served.select_expand([PROMPTS[1]], **{**options, "seed": 6})[0]
    assert other.tree[0].token_ids != alone.tree[0].token_ids
    twice = served.select_expand([PROMPTS[1], PROMPTS[1]], **options)
    assert twice[0].tree[0].token_ids != twice[1].tree[0].token_ids


def test_a_server_with_one_noise_for_all_completions_is_asked_for_each(pair: Pair) -> None:
    with StubServer(pair.teacher, pair.teacher_model, Manners(same_noise=True)).running() as stub:
        engine = connect(pair, stub)
        (selection,) = engine.select_expand([PROMPTS[1]], candidates=3, chunk=Chunk(tokens=6, until=None), max_tokens=6)
        assert len({c.token_ids for c in selection.tree}) == 3
        assert all(request["n"] == 1 for request in stub.requests[3:])


def test_without_seeds_the_server_draws_by_itself(pair: Pair, stub: StubServer) -> None:
    engine, before = connect(pair, stub, seeds=False), len(stub.requests)
    options: Any = {"candidates": 4, "chunk": Chunk(tokens=8, until=None), "max_tokens": 8}
    one, other = (engine.select_expand([PROMPTS[1]], **options)[0] for _ in range(2))
    assert [c.token_ids for c in one.tree] != [c.token_ids for c in other.tree]
    assert [request["n"] for request in stub.requests[before:]] == [4, 4]
    assert not any("seed" in request for request in stub.requests[before:])


def test_the_most_likely_tokens_are_kept_along_the_best_response(served: Engine, pair: Pair) -> None:
    (selection,) = served.select_expand(
        [PROMPTS[0]], candidates=2, chunk=Chunk(tokens=3, until="a", limit=6), max_tokens=12, teacher_topk=4
    )
    best = selection.best
    with torch.no_grad():
        logits = pair.teacher_model(torch.tensor([[*PROMPTS[0], *best.token_ids]])).logits[0]
    expected = logits[len(PROMPTS[0]) - 1 : -1].double().log_softmax(-1).topk(4)
    assert best.teacher_topk is not None
    assert torch.equal(best.teacher_topk.ids, expected.indices)
    torch.testing.assert_close(best.teacher_topk.logprob.double(), expected.values, atol=1e-4, rtol=1e-5)


def test_more_most_likely_tokens_than_the_server_gives_are_refused(served: Engine) -> None:
    with pytest.raises(InputError, match=r"teacher_topk=21: the server .* does not return so many.*logprobs above 20"):
        served.select_expand([PROMPTS[0]], teacher_topk=21)


def test_branches_of_ones_own_are_written_by_the_server(served: Engine, here: Engine) -> None:
    texts = []
    for engine in (here, served):
        with engine.branch(PROMPTS[0], sampling=Sampling(temperature=0.0)) as root:
            (child,) = root.expand(1, Chunk(tokens=5, until=None))
            child.commit()
            (grandchild,) = child.expand(1, 4)
            texts.append((child.history, grandchild.chunk, grandchild.stats.logprob))
            grandchild.drop()
            child.drop()
    assert texts[0][:2] == texts[1][:2]
    torch.testing.assert_close(texts[0][2], texts[1][2])
    assert served.pages_in_use[0] == 0


def test_a_teacher_without_a_student_generates(pair: Pair, stub: StubServer, here: Engine) -> None:
    engine = connect(pair, stub, student=False)
    options: Any = {"max_tokens": 8, "sampling": Sampling(temperature=0.0)}
    (mine,), (theirs,) = (e.generate([PROMPTS[0]], **options) for e in (here, engine))
    assert mine[0].token_ids == theirs[0].token_ids
    assert stub.url in repr(engine)
    assert engine.positions("teacher") == engine.max_sequence_length("teacher") == 512
    assert engine.vocabulary("teacher") == pair.teacher_model.config.vocab_size
    with pytest.raises(InputError, match="has no student"):
        engine.select_expand([PROMPTS[0]])


@pytest.mark.parametrize(
    "use",
    [
        lambda e: e.score([PROMPTS[0]], [[1, 2]], model="teacher"),
        lambda e: e.local_logprob(PROMPTS[0], [1, 2], [(0, 0, 2)], model="teacher"),
        lambda e: e.node_reader("teacher"),
        lambda e: list(e.iter_force(PROMPTS[0], [[1]], [[]], model="teacher")),
        lambda e: e.generate([PROMPTS[0]], rsd=None, model="teacher") and e.score([PROMPTS[0]], ["a"], model="teacher"),
    ],
)
def test_what_needs_the_weights_is_refused_by_name(served: Engine, stub: StubServer, use: Any) -> None:
    with pytest.raises(InputError, match=rf"the teacher is served at {stub.url}.*needs its weights here"):
        use(served)


def test_a_prompt_longer_than_the_server_takes_is_an_outcome(served: Engine) -> None:
    long, short = served.iter_select_expand([[5] * 600, PROMPTS[0]], candidates=1, max_tokens=3)
    assert long.error is not None
    assert "the teacher served at" in long.error
    assert short.error is None


def test_budgets_end_a_search_over_a_server(served: Engine) -> None:
    (selection,) = served.select_expand(
        [PROMPTS[0]], candidates=2, chunk=Chunk(tokens=3, until=None), max_tokens=60, prompt_budget=Budget(tokens=14)
    )
    assert selection.ended_by in ("prompt_budget.tokens", None)
    assert selection.tokens_sampled <= 14


def test_a_tight_cache_of_the_student_suspends_prompts_and_changes_nothing(pair: Pair, stub: StubServer) -> None:
    options: Any = {"candidates": 3, "beam": 2, "chunk": Chunk(tokens=8, until=None), "max_tokens": 24}
    results = []
    for memory in (1 << 22, 20 << 13):
        engine = Engine.from_pretrained(
            stub.url, pair.student, dtype="float32", memory_bytes=memory, teacher_tokenizer=pair.teacher
        )
        results.append([s.best.token_ids for s in engine.select_expand(PROMPTS, **options)])
        assert engine.pages_in_use[0] == 0
    assert results[0] == results[1]


def test_closing_an_iterator_gives_up_its_requests(served: Engine, stub: StubServer) -> None:
    outcomes = served.iter_select_expand(PROMPTS, candidates=2, chunk=Chunk(tokens=4, until=None), max_tokens=8)
    next(outcomes)
    outcomes.close()
    assert served.pages_in_use[0] == 0
    assert len(served.select_expand(PROMPTS, candidates=2, max_tokens=8)) == len(PROMPTS)


def test_many_prompts_are_in_flight_at_once(pair: Pair) -> None:
    with StubServer(pair.teacher, pair.teacher_model).running() as stub:
        prompts = [[i, i + 1, i + 2] for i in range(64)]
        for in_flight, count in ((64, 64), (3, 9)):
            stub.manners.together = 0
            engine = connect(pair, stub, in_flight=in_flight)
            stub.most_at_once, stub.manners.together = 0, in_flight
            engine.generate(prompts[:count], max_tokens=1)
            assert stub.most_at_once == in_flight


def test_a_failing_search_reports_the_prompt(pair: Pair) -> None:
    with StubServer(pair.teacher, pair.teacher_model).running() as stub:
        engine = connect(pair, stub)
        stub.faults.extend(["foreign"])
        with (
            engine.branch(PROMPTS[0]) as root,
            pytest.raises(ServerError, match="token id 100000 is not in the tokenizer"),
        ):
            root.expand(1, 3)
        stub.faults.extend(["foreign"])
        with pytest.raises(ServerError, match=r"^prompt 0: the server .* token id 100000 is not in the tokenizer"):
            engine.generate([PROMPTS[0]], max_tokens=3)
        assert engine.pages_in_use[0] == 0


@pytest.mark.parametrize("first", ["here", "served"])
def test_a_served_teacher_competes_with_one_here(pair: Pair, here: Engine, stub: StubServer, first: str) -> None:
    names = [pair.teacher, stub.url] if first == "here" else [stub.url, pair.teacher]
    engine = Engine.from_pretrained(
        names, pair.student, dtype="float32", memory_bytes=1 << 22, teacher_tokenizer=pair.teacher,
        server=ServerOptions(timeout=10.0, patience=10.0),
    )  # fmt: skip
    options = {"chunk": Chunk(tokens=5, until=None), "max_tokens": 20, "loop_guard": None}
    alone = here.select_expand(PROMPTS, **GREEDY, **options)
    both = engine.select_expand(PROMPTS, **GREEDY, **options)
    num_ties = sum(require_same(a, b, pair, p) for a, b, p in zip(alone, both, PROMPTS, strict=True))
    assert num_ties < len(PROMPTS)
    # the same model greedily writes the same twice: the second teacher's candidates are duplicates, up to near ties
    verdicts = Counter((r.teacher, r.verdict) for s in both for r in s.tree)
    assert verdicts[0, "kept"] >= sum(len(s.rounds) for s in both) - 2 * num_ties
    assert verdicts[1, "duplicate"] >= sum(len(s.rounds) for s in both) - 2 * num_ties
    drawn = engine.select_expand(PROMPTS, candidates=2, **options)
    assert {c.teacher for s in drawn for c in s.best.chunks} == {0, 1}
    assert all(use.tokens_sampled and use.seconds > 0.0 for s in drawn for use in s.teachers)
    assert engine.server is not None
    assert engine.server.requests
    assert engine.pages_in_use[0] == 0
