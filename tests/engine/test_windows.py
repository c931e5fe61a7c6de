"""Parts of a response scored on their own, against transformers; and the criteria that the search asks online."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path as FilePath
from typing import Any

import pytest
import torch
from support.toys import ENDINGS, Pair, save_markov, token_of

from genssd.engine.cache.tree import Path
from genssd.engine.common.errors import CapacityError, InputError, NumericsError
from genssd.engine.criteria.by_step import LocalNaturalness
from genssd.engine.criteria.candidate import Candidate, Window
from genssd.engine.criteria.criterion import PoolCriterion
from genssd.engine.criteria.criterion_calls import evaluate
from genssd.engine.criteria.criterion_names import resolve
from genssd.engine.criteria.likelihood import Perplexity
from genssd.engine.criteria.reference_answer import RationaleDifficulty
from genssd.engine.decoding.chunk import Chunk
from genssd.engine.engine import Engine
from genssd.engine.search.selection import CandidateRecord, Selection
from genssd.engine.texts.steps import step_spans
from genssd.kernels.logprob import TokenStats
from genssd.kernels.weight import cells_of

Prompts = Callable[[int, int], list[list[int]]]
TOLERANCE = 1e-4  # as in test_score.py
PAGE_BYTES = 16 * 1024  # of one page of 16 tokens in both caches of `pair`
TEXT = (
    "First we add 3.5 apples. Then we take one away! Is that all?\nNo, there is more.\n\nWe count them again. "
    "So it is 2. And so on."
)


def random_ids(length: int, seed: int) -> list[int]:
    return torch.randint(0, 250, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def random_windows(length: int, count: int, seed: int) -> list[Window]:
    generator = torch.Generator().manual_seed(seed)
    windows = []
    for _ in range(count):
        context, start, end = sorted(torch.randint(0, length + 1, (3,), generator=generator).tolist())
        windows.append((min(context, end - 1), min(start, end - 1), end) if end else (0, 0, 1))
    return windows


def alone(pair: Pair, prompt: list[int], ids: Sequence[int], window: Window, role: str = "student") -> torch.Tensor:
    """transformers on the prompt and the window as one sequence."""
    context, start, end = window
    return pair.logprobs(role, prompt + list(ids[context:start]), list(ids[start:end]))


def assert_windows(pair: Pair, engine: Engine, prompt: list[int], ids: list[int], windows: list[Window]) -> None:
    parts = engine.local_logprob(prompt, ids, windows)
    assert [len(part) for part in parts] == [end - start for _, start, end in windows]
    for window, part in zip(windows, parts, strict=True):
        assert part.dtype == torch.float32
        torch.testing.assert_close(part.double(), alone(pair, prompt, ids, window), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("prompt_length", [1, 15, 16, 17, 40])
def test_every_window_equals_transformers_on_it_alone(engine: Engine, pair: Pair, prompt_length: int) -> None:
    prompt, ids = random_ids(prompt_length, 1), random_ids(60, 2)
    windows = [(0, 0, 60), (0, 0, 1), (59, 59, 60), (7, 7, 30), (7, 8, 9), (0, 59, 60), (16, 32, 48), (7, 7, 30)]
    assert_windows(pair, engine, prompt, ids, windows + random_windows(60, 8, prompt_length))


def test_the_whole_response_equals_scoring(engine: Engine) -> None:
    prompt, ids = random_ids(21, 3), random_ids(50, 4)
    (full,) = engine.local_logprob(prompt, ids, [(0, 0, 50)])
    torch.testing.assert_close(full, engine.score([prompt], [ids])[0].logprob, atol=TOLERANCE, rtol=0)
    (full,) = engine.local_logprob(prompt, ids, [(0, 0, 50)], model="teacher")
    torch.testing.assert_close(full, engine.score([prompt], [ids], model="teacher")[0].logprob, atol=TOLERANCE, rtol=0)


def test_a_text_prompt_and_no_window(engine: Engine) -> None:
    ids = random_ids(9, 5)
    assert engine.local_logprob("a prompt", ids, []) == []
    (part,) = engine.local_logprob("a prompt", ids, [(2, 4, 9)])
    prompt = engine.tokenizer("student").encode("a prompt", special=True)
    assert torch.equal(part, engine.local_logprob(prompt, ids, [(2, 4, 9)])[0])


def test_order_and_company_change_nothing(engine: Engine) -> None:
    prompt, ids = random_ids(21, 6), random_ids(50, 7)
    windows = random_windows(50, 12, 8)
    together = engine.local_logprob(prompt, ids, windows)
    backwards = engine.local_logprob(prompt, ids, windows[::-1])[::-1]
    apart = [engine.local_logprob(prompt, ids, [window])[0] for window in windows]
    for one, two, three in zip(together, backwards, apart, strict=True):
        torch.testing.assert_close(one, two, atol=TOLERANCE, rtol=0)
        torch.testing.assert_close(one, three, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(("rows", "pages"), [(40, 256), (2048, 9), (2048, 7), (24, 8)])
def test_many_windows_go_in_groups(pair: Pair, monkeypatch: pytest.MonkeyPatch, rows: int, pages: int) -> None:
    """The rows of one pass or the free pages limit a group; all pages are freed."""
    monkeypatch.setattr("genssd.engine.decoding.windows.MAX_ROWS", rows)
    monkeypatch.setattr("genssd.engine.models.runner.MAX_ROWS", min(rows, 24))
    tight = pair.engine(memory_bytes=pages * PAGE_BYTES)
    runner = tight._resources.runners["student"]
    extend, sizes = runner.extend, []

    def counted(paths: Sequence[Path], tokens: Sequence[Sequence[int]], **options: Any) -> list[torch.Tensor]:
        sizes.append(sum(map(len, tokens)))
        return extend(paths, tokens, **options)

    monkeypatch.setattr(runner, "extend", counted)
    prompt, ids = random_ids(19, 9), random_ids(40, 10)
    assert_windows(pair, tight, prompt, ids, [*random_windows(40, 25, 11), (0, 10, 40)])
    assert tight.pages_in_use == (0, 2 * pages)
    assert sizes[0] == len(prompt)
    assert len(sizes) > 2 or pages == 256
    assert max(sizes) <= max(rows, 39)


def test_windows_beside_a_branch_that_holds_pages(pair: Pair) -> None:
    tight = pair.engine(memory_bytes=14 * PAGE_BYTES)
    prompt, ids = random_ids(30, 12), random_ids(40, 13)
    root = tight.branch(prompt)
    children = root.expand(2, Chunk(tokens=5, until=None))
    held = tight.pages_in_use
    before = [child.stats.logprob.clone() for child in children]
    assert_windows(pair, tight, prompt, ids, random_windows(40, 9, 14))
    assert tight.pages_in_use == held
    children[0].commit()
    grandchild = children[0].expand(1, Chunk(tokens=3, until=None))[0]
    expected = pair.logprobs("student", prompt + children[0].history, grandchild.chunk)
    torch.testing.assert_close(grandchild.stats.logprob.double(), expected, atol=TOLERANCE, rtol=0)
    assert torch.equal(before[0], children[0].history_stats[0].logprob)
    for branch in (*children, grandchild, root):
        branch.drop()
    assert tight.pages_in_use[0] == 0


@pytest.mark.parametrize(
    ("prompt", "response", "window"), [(20, 60, (0, 0, 60)), (80, 8, (0, 0, 8)), (20, 60, (0, 5, 60))]
)
def test_a_cache_too_small_is_named(pair: Pair, prompt: int, response: int, window: Window) -> None:
    tight = pair.engine(memory_bytes=5 * PAGE_BYTES)
    with pytest.raises(CapacityError, match="memory_bytes"):
        tight.local_logprob(random_ids(prompt, 15), random_ids(response, 16), [(0, 0, 1), window])
    assert tight.pages_in_use[0] == 0
    assert_windows(pair, tight, random_ids(20, 15), random_ids(8, 16), [(0, 0, 8)])


def test_a_window_that_fits_exactly_is_scored(pair: Pair) -> None:
    """'Raises CapacityError when the prompt and one window do not fit': 48 + 16 - 1 tokens fill the 64 of the cache."""
    tight = pair.engine(memory_bytes=4 * PAGE_BYTES)
    prompt, ids = random_ids(48, 17), random_ids(16, 18)
    assert len(tight.score([prompt], [ids])[0]) == 16
    assert_windows(pair, tight, prompt, ids, [(0, 0, 16)])


def test_a_window_may_reach_the_last_position(engine: Engine) -> None:
    """Like `score`: the last token is predicted, not read."""
    prompt, ids = random_ids(500, 19), random_ids(12, 20)
    (stats,) = engine.score([prompt], [ids])
    (part,) = engine.local_logprob(prompt, ids, [(0, 0, 12)])
    torch.testing.assert_close(part, stats.logprob, atol=TOLERANCE, rtol=0)


def test_beyond_the_last_position_is_named(engine: Engine) -> None:
    with pytest.raises(CapacityError, match=r"the prompt with a window has 512 tokens.*512 positions"):
        engine.local_logprob(random_ids(500, 19), random_ids(13, 20), [(0, 0, 13)])


@pytest.mark.parametrize("window", [(0, 0, 0), (3, 2, 5), (2, 4, 3), (0, 2, 9), (-1, 0, 3)])
def test_a_window_that_is_none_is_refused(engine: Engine, window: Window) -> None:
    """Empty, start before context, end before start, beyond the response, before it."""
    with pytest.raises(InputError, match="window"):
        engine.local_logprob(random_ids(5, 21), random_ids(6, 22), [window])


def test_bad_ids_are_named(engine: Engine) -> None:
    with pytest.raises(InputError, match="the response: token id 259 is outside"):
        engine.local_logprob([1], [1, 259], [(0, 0, 2)])
    with pytest.raises(InputError, match="the prompt"):
        engine.local_logprob("", [1], [(0, 0, 1)])


def test_a_broken_student_gives_its_pages_back(pair: Pair) -> None:
    broken = pair.engine()
    weight = cells_of(broken._resources.runners["student"].decoder.head.weight)
    kept = weight[:1].clone()
    try:
        with torch.inference_mode():
            weight[:1] = math.nan
        with pytest.raises(NumericsError, match=r"student .* NaN or infinite logits"):
            broken.local_logprob([1, 2], random_ids(9, 23), [(0, 0, 5), (3, 5, 9)])
    finally:
        with torch.inference_mode():
            weight[:1] = kept
    assert broken.pages_in_use[0] == 0


# local naturalness (section 2.3)


def response(engine: Engine, prompt: list[int], ids: list[int]) -> Candidate:
    """A finished trace as criteria see it."""
    (stats,) = engine.score([prompt], [ids])
    return Candidate(
        token_ids=tuple(ids),
        stats=stats,
        final=True,
        finished=False,
        pieces_of=engine.tokenizer("student").pieces,
        local_logprob=partial(engine.local_logprob, prompt),
    )


def text_ids(text: str) -> list[int]:
    return [token_of(character) for character in text]


@pytest.mark.parametrize("criterion", [LocalNaturalness(), LocalNaturalness(steps=0), LocalNaturalness(share=0.0)])
def test_one_step_is_the_mean_log_probability(engine: Engine, pair: Pair, criterion: LocalNaturalness) -> None:
    prompt, ids = random_ids(11, 24), text_ids("one step and no end")
    expected = float(pair.logprobs("student", prompt, ids).mean())
    assert criterion.score(response(engine, prompt, ids)) == pytest.approx(expected, abs=TOLERANCE)


@pytest.mark.parametrize("criterion", [LocalNaturalness(steps=99), LocalNaturalness(share=1.0)])
def test_with_all_steps_in_view_it_is_the_mean_of_the_steps_means(
    engine: Engine, pair: Pair, criterion: LocalNaturalness
) -> None:
    prompt, ids = random_ids(11, 25), text_ids(TEXT)
    made = response(engine, prompt, ids)
    steps = made.steps()
    assert len(steps) == 7
    assert [t for start, end in steps for t in range(start, end)] == list(range(len(ids)))
    full = pair.logprobs("student", prompt, ids)
    means = [float(full[start:end].mean()) for start, end in steps]
    assert criterion.score(made) == pytest.approx(math.fsum(means) / len(means), abs=TOLERANCE)
    assert made.local_logprob is not None
    parts = made.local_logprob(ids, criterion.windows(made))
    weighted = sum(float(part.mean()) * len(part) for part in parts) / len(ids)
    assert weighted == pytest.approx(float(full.mean()), abs=TOLERANCE)


@pytest.mark.parametrize("steps", [0, 1, 2, 4])
def test_local_naturalness_against_transformers_step_by_step(engine: Engine, pair: Pair, steps: int) -> None:
    prompt, ids = random_ids(11, 26), text_ids(TEXT)
    made = response(engine, prompt, ids)
    spans = made.steps()
    means = []
    for i, (start, end) in enumerate(spans):
        window = (spans[max(0, i - steps)][0], start, end)
        means.append(float(alone(pair, prompt, ids, window).mean()))
    value = LocalNaturalness(steps=steps).score(made)
    assert value == pytest.approx(math.fsum(means) / len(means), abs=TOLERANCE)
    assert abs(value - float(made.logprob.mean())) > 0.01


def test_without_context_a_markov_student_differs_at_the_first_tokens_alone(tmp_path: FilePath) -> None:
    letters = [token_of(c) for c in "ab. \n"]
    generator = torch.Generator().manual_seed(27)
    save_markov(tmp_path / "student", letters, torch.randn(5, 5, generator=generator) * 2)
    engine = Engine.from_pretrained(student=tmp_path / "student", dtype="float32", memory_bytes=1 << 20)
    ids = text_ids("aab. bbab a. ab bab.\n\naaaa. bab")
    spans = step_spans(engine.tokenizer("student").pieces(ids))
    assert len(spans) == 4
    prompt = [letters[0], letters[1]]
    (full,) = engine.score([prompt], [ids])
    for (start, end), part in zip(spans, engine.local_logprob(prompt, ids, [(a, a, b) for a, b in spans]), strict=True):
        torch.testing.assert_close(part[1:], full.logprob[start + 1 : end], atol=1e-5, rtol=0)
        (first,) = engine.score([prompt], [[ids[start]]])
        torch.testing.assert_close(part[:1], first.logprob, atol=1e-5, rtol=0)


# online, in the search


@pytest.fixture(scope="module")
def writers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """Two Markov chains over letters, stops and spaces: their texts have steps."""
    root = tmp_path_factory.mktemp("writers")
    letters = [*(token_of(c) for c in "abc. \n"), ENDINGS[-1]]
    teacher = torch.zeros(7, 7)
    teacher[:3, 3], teacher[3, 4], teacher[:, 6] = -0.5, 2.0, -2.0
    save_markov(root / "teacher", letters, teacher)
    save_markov(root / "student", letters, torch.randn(7, 7, generator=torch.Generator().manual_seed(28)))
    engine = Engine.from_pretrained(root / "teacher", root / "student", dtype="float32", memory_bytes=1 << 21)
    yield engine
    assert engine.pages_in_use[0] == 0


def recorded(engine: Engine, selection: Selection, record: CandidateRecord) -> Candidate:
    """A candidate from what the search kept of it."""
    by_trace = {r.trace: r for r in selection.tree}
    above = [by_trace[record.trace[:k]] for k in range(1, len(record.trace))]
    history = TokenStats.concatenate([r.stats for r in above]) if above else TokenStats.empty()
    before = [r.teacher_logprob for r in above]
    return Candidate(
        token_ids=record.token_ids,
        stats=record.stats,
        history_ids=tuple(t for r in above for t in r.token_ids),
        history=history,
        teacher_logprob=record.teacher_logprob,
        history_teacher_logprob=torch.cat(before) if before else torch.empty(0),
        final=record.ended != "chunk",
        finished=record.ended == "finished",
        pieces_of=engine.tokenizer("teacher").pieces,
        local_logprob=partial(engine.local_logprob, list(selection.student_prompt_ids)),
    )


ONLINE = [
    *(
        "ppl(scope='window', window=30)",
        "ppl(norm='byte')",
        "lalp",
        "lalp(steps=1)",
        "lalp(share=0.5)",
        "lark",
        "rsr",
    ),
    *("rsr(scope='trajectory')", "aslec_drop", "aslec_casl(gamma=-1.0)", "divergence", "rsd_accept", "surprisal_band"),
    *("0.7*rsr + 0.3*length(longest=True)", "0.5*lark + 0.5*lalp + aslec_drop"),
]


@pytest.mark.parametrize("name", ONLINE)
@pytest.mark.parametrize("which", ["pair", "writers"])
def test_recorded_scores_are_the_criterion_of_what_was_recorded(
    engine: Engine, writers: Engine, which: str, name: str
) -> None:
    criterion = resolve(name)
    used = engine if which == "pair" else writers
    prompts: list[str | list[int]] = ["ab", "a. b"] if which == "writers" else [random_ids(9, 29), random_ids(17, 30)]
    selections = used.select_expand(
        prompts,
        candidates=3,
        beam=2,
        chunk=Chunk(tokens=14, until=None),
        max_tokens=40,
        criterion=name,
        loop_guard=None,
    )
    with_steps = 0
    for selection in selections:
        for depth in range(1 + max(record.round for record in selection.tree)):
            pool = [record for record in selection.tree if record.round == depth]
            made = [recorded(used, selection, record).lengthened(8) for record in pool]
            with_steps += sum(len(one.steps()) > 1 for one in made)
            values = evaluate(criterion, made)
            assert [r.score for r in pool] == pytest.approx(values, abs=TOLERANCE)
            rank = [-v if criterion.higher_is_better() else v for v in values]
            kept = [rank[i] for i, r in enumerate(pool) if r.verdict == "kept"]
            beaten = [rank[i] for i, r in enumerate(pool) if r.verdict == "beaten"]
            assert not beaten or max(kept) <= min(beaten) + TOLERANCE
        finals = [t for t in selection.trajectories if t.token_ids]
        wholes = [
            Candidate(
                token_ids=t.token_ids,
                stats=t.stats,
                teacher_logprob=torch.cat([r.teacher_logprob for r in line(selection, t.trace)]),
                final=True,
                finished=t.status == "finished",
                pieces_of=used.tokenizer("teacher").pieces,
                local_logprob=partial(used.local_logprob, list(selection.student_prompt_ids)),
            )
            for t in finals
        ]
        assert [t.score for t in finals] == pytest.approx(evaluate(criterion, wholes), abs=TOLERANCE)
    assert with_steps or which == "pair"


def line(selection: Selection, trace: tuple[int, ...]) -> list[CandidateRecord]:
    by_trace = {r.trace: r for r in selection.tree}
    return [by_trace[trace[:k]] for k in range(1, len(trace) + 1)]


def test_local_naturalness_online_against_transformers(engine: Engine, pair: Pair) -> None:
    """Chunks of characters between which the search cuts steps anywhere."""
    selections = engine.select_expand(
        [random_ids(9, seed) for seed in range(31, 39)],
        candidates=3,
        chunk=Chunk(tokens=40, until=None),
        max_tokens=120,
        criterion="lalp(steps=1)",
        loop_guard=None,
    )
    several = 0
    for selection, record in ((one, record) for one in selections for record in one.tree):
        prompt = list(selection.student_prompt_ids)
        made = recorded(engine, selection, record).lengthened(8)
        ids, begin = [*made.history_ids, *made.token_ids], len(made.history_ids)
        spans = made.steps()
        means = []
        for i, (start, end) in enumerate(spans):
            if end > begin:
                window = (spans[max(0, i - 1)][0], max(start, begin), end)
                means.append(float(alone(pair, prompt, ids, window).mean()))
        several += len(means) > 1
        expected = math.fsum(means) / len(means) if means else -math.inf
        assert record.score == pytest.approx(expected, abs=TOLERANCE)
    assert several


def test_what_has_to_be_fitted_over_the_data_is_refused(engine: Engine) -> None:
    with pytest.raises(InputError, match=r"fitted over all of the data.*aslec_casl\(gamma=\.\.\.\)"):
        engine.select_expand(["a"], criterion="aslec_casl")
    with pytest.raises(InputError, match="fitted over all of the data"):
        engine.select_expand(["a"], criterion="aslec_casl + ppl")


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_with_one_chunk_the_perplexity_picks_what_grape_picks(engine: Engine, seed: int) -> None:
    """Section 1.4, against generating first and scoring afterwards."""
    prompts = [random_ids(5 + k, 32 + k) for k in range(4)]
    selections = engine.select_expand(
        prompts, candidates=5, chunk=Chunk(tokens=30, until=None), max_tokens=30, seed=seed, loop_guard=None
    )
    drawn = engine.generate(prompts, n=5, max_tokens=30, seed=seed)
    for prompt, selection, completions in zip(prompts, selections, drawn, strict=True):
        ids = [c.token_ids for c in completions]
        means = [float(s.logprob.double().mean()) for s in engine.score([prompt] * 5, ids)]
        winner = max(range(5), key=lambda i: means[i])
        assert selection.best.token_ids == tuple(ids[winner])
        assert selection.best.score == pytest.approx(math.exp(-means[winner]), rel=1e-3)


def test_duplicates_do_not_move_the_others_values(writers: Engine) -> None:
    """The search drops them before it selects; the pool that the criterion judges is what competes."""
    (selection,) = writers.select_expand(
        ["ab"], candidates=12, chunk=Chunk(tokens=2, until=None), max_tokens=2, criterion="lark", loop_guard=None
    )
    distinct = [record for record in selection.tree if record.verdict != "duplicate"]
    assert len(distinct) < len(selection.tree)
    values = evaluate(resolve("lark"), [recorded(writers, selection, record) for record in distinct])
    assert [record.score for record in distinct] == pytest.approx(values, abs=TOLERANCE)


class Failing:
    """Fails in the second round."""

    def score(self, candidate: Candidate) -> float:
        if candidate.history_ids:
            raise RuntimeError("on purpose")
        return 1.0

    def higher_is_better(self) -> bool:
        return True


def test_a_criterion_that_fails_gives_the_pages_back(pair: Pair) -> None:
    fresh = pair.engine()
    with pytest.raises(InputError, match=r"Failing failed in score.*on purpose"):
        fresh.select_expand(
            [random_ids(9, 40), random_ids(20, 41)],
            candidates=3,
            chunk=Chunk(tokens=6, until=None),
            criterion=Failing(),
        )
    assert fresh.pages_in_use[0] == 0
    fresh.select_expand([random_ids(9, 40)], candidates=3, chunk=Chunk(tokens=6, until=None), max_tokens=12)


@pytest.mark.parametrize("pages", [14, 17, 20, 24])
def test_windows_in_a_tight_cache_do_not_end_the_search(pair: Pair, pages: int) -> None:
    """A prompt that does not fit waits or fails by itself; the others get what they get in a roomy cache."""
    prompts = [random_ids(20, 50 + k) for k in range(4)]

    def run(engine: Engine) -> list[Selection]:
        return engine.select_expand(
            prompts, candidates=3, chunk=Chunk(tokens=12, until=None), max_tokens=36, criterion="lalp", loop_guard=None
        )

    tight = pair.engine(memory_bytes=pages * PAGE_BYTES)
    try:
        results = run(tight)
    finally:
        assert tight.pages_in_use[0] == 0
    for actual, reference in zip(results, run(pair.engine()), strict=True):
        if actual.error is None:
            assert actual.best.token_ids == reference.best.token_ids


def test_a_pool_criterion_sees_one_prompts_round(engine: Engine) -> None:
    class Counting:
        pool = "prompt"
        num_features = 1
        seen: list[int]

        def __init__(self) -> None:
            self.seen = []

        def features(self, candidate: Candidate) -> tuple[float, ...]:
            return (Perplexity().score(candidate),)

        def score_pool(self, features: Sequence[tuple[float, ...]]) -> list[float]:
            self.seen.append(len(features))
            return [-value for (value,) in features]

        def higher_is_better(self) -> bool:
            return True

    counting = Counting()
    assert isinstance(counting, PoolCriterion)
    prompts = [random_ids(9, 60), random_ids(20, 61)]
    options = {"candidates": 3, "chunk": Chunk(tokens=6, until=None), "max_tokens": 12, "loop_guard": None}
    actual = engine.select_expand(prompts, criterion=counting, **options)  # type: ignore[arg-type]
    reference = engine.select_expand(prompts, **options)  # type: ignore[arg-type]
    assert [s.best.token_ids for s in actual] == [s.best.token_ids for s in reference]
    assert set(counting.seen) <= {3, 1}


def test_every_pair_of_steps_meets(engine: Engine) -> None:
    """The steps of a text tile it, whatever the chunking: windows of consecutive steps overlap in their context."""
    made = response(engine, [5], text_ids(TEXT))
    windows = LocalNaturalness(steps=1).windows(made)
    for (_, start, end), (context, following, _) in pairwise(windows):
        assert (context, following) == (start, end)


def test_a_response_as_criteria_see_it(engine: Engine, pair: Pair) -> None:
    """Three committed chunks: everything in the order of the tokens, nothing left in the history."""
    prompt = random_ids(9, 70)
    branch = engine.branch(prompt, seed=3)
    for _ in range(3):
        children = branch.expand(4, Chunk(tokens=4, until=None))
        branch.drop()
        branch = next(child for child in children if child.ended == "chunk")
        for child in children:
            if child is not branch:
                child.drop()
        branch.commit()
    full = branch.response()
    branch.drop()
    assert (len(full.token_ids), full.history_ids, len(full.history)) == (12, (), 0)
    assert (full.final, full.finished, full.num_content) == (True, False, 12)
    ids = list(full.token_ids)
    torch.testing.assert_close(full.logprob, pair.logprobs("student", prompt, ids), atol=TOLERANCE, rtol=0)
    assert full.teacher_logprob is not None
    expected = pair.logprobs("teacher", prompt, ids)
    torch.testing.assert_close(full.teacher_logprob.double(), expected, atol=TOLERANCE, rtol=0)
    assert full.local_logprob is not None
    (part,) = full.local_logprob(ids, [(2, 5, 12)])
    torch.testing.assert_close(part.double(), alone(pair, prompt, ids, (2, 5, 12)), atol=TOLERANCE, rtol=0)


def test_rationale_difficulty_is_the_ratio_of_transformers_perplexities(pair: Pair, engine: Engine) -> None:
    """Online, with answers; the last step of an ended response is left out."""
    criterion = RationaleDifficulty(before_answer="=")
    prompts = [random_ids(9, seed) for seed in range(41, 45)]
    answers = ["7", "12", "a b", "0"]
    selections = engine.select_expand(
        prompts,
        candidates=2,
        chunk=Chunk(tokens=12, until=None),
        max_tokens=30,
        criterion=criterion,
        loop_guard=None,
        answers=answers,
    )
    encode = engine.tokenizer("student").encode_plain
    ended = 0
    for selection, answer in zip(selections, answers, strict=True):
        prompt, ending = list(selection.student_prompt_ids), encode(f"= {answer}")
        for record in selection.tree:
            made = recorded(engine, selection, record)
            ids = [*made.history_ids, *made.token_ids][: len(made.history_ids) + made.num_content]
            if made.final:
                ended += 1
                ids = ids[: made.steps()[-1][0]] if len(made.steps()) > 1 else []
            led = pair.logprobs("student", prompt, [*ids, *ending])[len(ids) + 1 :].mean()
            alone_ = pair.logprobs("student", prompt, ending)[1:].mean()
            assert record.score == pytest.approx(math.exp(alone_ - led), rel=1e-3)
    assert ended


def test_rationale_difficulty_leaves_room_for_the_answer(pair: Pair) -> None:
    engine = pair.engine(memory_bytes=1 << 24)
    positions = engine.max_sequence_length("student")
    prompt = random_ids(positions - 60, 3)
    (selection,) = engine.select_expand(
        [prompt], criterion="rationale_difficulty", answers=["12345"], candidates=2, chunk=Chunk(tokens=4, until=None)
    )
    assert selection.error is None
    assert len(selection.best.token_ids) <= 60 - 32 - 5
    with pytest.raises(CapacityError, match="prompt 0: prompt and reference answer leave no position"):
        engine.select_expand([prompt], criterion="rationale_difficulty", answers=["5" * 40])


def test_rationale_difficulty_needs_answers(engine: Engine) -> None:
    with pytest.raises(InputError, match="prompt 1: no reference answer"):
        engine.select_expand([[1, 2], [3, 4]], criterion="rationale_difficulty", answers=["1", None])
    with pytest.raises(InputError, match="prompt 0: no reference answer"):
        engine.select_expand([[1, 2]], criterion="0.5*ppl + 0.5*rationale_difficulty")
    with pytest.raises(InputError, match="2 prompts but 1 answer"):
        engine.select_expand([[1, 2], [3, 4]], answers=["1"])


def test_windows_of_a_criterion_are_counted(pair: Pair) -> None:
    engine = pair.engine()
    engine.select_expand(
        [[1, 2, 3]], candidates=1, chunk=Chunk(tokens=8, until=None), max_tokens=8, criterion="ppl", loop_guard=None
    )
    assert engine.usage.window_tokens == 0
    engine.local_logprob([1, 2, 3], [4, 5, 6, 7], [(0, 1, 3), (2, 2, 4)])
    assert engine.usage.window_tokens == 3 + 2 + 1
