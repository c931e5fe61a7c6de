"""Several teachers at one node: a copy of a teacher is more candidates of it, to the bit, and in law."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from support.byte_tokenizers import build, save
from support.toys import ENDINGS, EOS, Pair, edit_json, save_checkpoint, save_markov, token_of

from genssd.engine.common.errors import CapacityError, InputError
from genssd.engine.common.usage import Usage
from genssd.engine.decoding.chunk import Chunk
from genssd.engine.engine import Engine
from genssd.engine.models.paged_runner import PagedRunner
from genssd.engine.models.pages import PagePool
from genssd.engine.readers.text_encoder import TextEncoder
from genssd.engine.readers.token_bytes import ByteTable
from genssd.engine.search.budget import Budget
from genssd.engine.search.selection import Selection
from genssd.engine.texts.text import Tokenizer

Prompts = Callable[[int, int], list[list[int]]]
EIGHT = Chunk(tokens=8, until=None)
SEARCH: dict[str, Any] = {"chunk": EIGHT, "max_tokens": 40}
LETTERS = [token_of(c) for c in "abc"]
TEACHER = torch.tensor([[0.5, 1.0, -0.3], [0.0, 0.9, 1.1], [1.2, -0.4, 0.6]])
OTHER = torch.tensor([[-0.8, 0.2, 0.9], [0.7, -0.5, 0.1], [0.3, 1.0, -0.6]])
STUDENT = torch.tensor([[1.0, -1.2, 0.4], [0.1, -0.7, 0.8], [-1.5, 0.3, 0.9]])
CHI_SQUARE_P = 1e-4  # seeded, so a correct search fails once and for all with this probability


def outcomes(selections: Sequence[Selection]) -> list[object]:
    """All that a search of one teacher and of a team of its copies have in common."""
    return [
        (
            s.prompt_ids,
            [
                (t.token_ids, t.text, t.score, t.status, t.trace, [(c.tokens, c.score, c.is_forced) for c in t.chunks])
                for t in s.trajectories
            ],
            [(r.trace, r.token_ids, r.teacher_logprob.tolist(), r.score, r.verdict, r.attempt) for r in s.tree],
            s.ended_by,
        )
        for s in selections
    ]


@pytest.fixture(scope="module")
def copies(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Directories of the teacher and of a copy."""
    copy = tmp_path_factory.mktemp("copies") / "copy"
    shutil.copytree(pair.teacher, copy)
    return [pair.teacher, copy]


@pytest.fixture(scope="module")
def team(pair: Pair, copies: list[Path]) -> Engine:
    return Engine.from_pretrained(copies, pair.student, dtype="float32", memory_bytes=1 << 24)


def with_pages(engine: Engine, num_pages: int) -> Engine:
    """An engine over the same teachers and student whose caches have so many pages of one token."""
    usage = Usage()
    runners: dict[int, PagedRunner] = {}
    for runner in engine._resources.list_runners():
        pool = PagePool.for_model(runner.decoder, num_pages, 1)
        pool.kv.fill_(torch.nan)
        runners[id(runner)] = PagedRunner(runner.role, runner.directory, runner.decoder, pool, usage=usage)
    reservations: dict[Any, Any] = {}
    first, *others = [
        replace(
            one,
            runners={role: runners[id(runner)] for role, runner in one.runners.items()},
            usage=usage,
            reservations=reservations,
            others=(),
        )
        for one in engine._resources.list_teachers()
    ]
    return Engine(replace(first, others=tuple(others)))


@pytest.mark.parametrize("changes", [{}, {"beam": 3}, {"selection_temperature": 0.5, "beam": 2}], ids=str)
def test_a_copy_of_the_teacher_is_as_many_more_candidates(
    engine: Engine, team: Engine, random_prompts: Prompts, changes: dict[str, Any]
) -> None:
    prompts = random_prompts(4, 51)
    alone = engine.select_expand(prompts, candidates=4, **SEARCH, **changes)
    both = team.select_expand(prompts, candidates=2, **SEARCH, **changes)
    assert outcomes(both) == outcomes(alone)
    assert {r.teacher for s in both for r in s.tree} == {0, 1}
    for s in both:
        assert all(r.teacher == r.trace[-1] // 2 for r in s.tree)
        kept = [r for r in s.tree if r.verdict == "kept"]
        for index, use in enumerate(s.teachers):
            own = [r for r in s.tree if r.teacher == index]
            assert use.tokens_sampled == sum(len(r.token_ids) for r in own)
            assert use.decisions == len({r.round for r in own})
            assert use.wins == len({r.round for r in kept if r.teacher == index})
            assert use.tokens_kept == sum(c.tokens for c in s.best.chunks if c.teacher == index)
            assert use.seconds > 0.0
        assert sum(use.tokens_kept for use in s.teachers) == len(s.best.token_ids)
    assert team.pages_in_use[0] == 0
    assert engine.select_expand(prompts[:1], candidates=2, **SEARCH)[0].teachers == ()


def test_asking_a_copy_is_sampling_again(engine: Engine, team: Engine, random_prompts: Prompts) -> None:
    prompts = random_prompts(6, 52)
    free = engine.select_expand(prompts, candidates=2, **SEARCH)
    scores = sorted(c.score for s in free for c in s.best.chunks)
    options = {**SEARCH, "candidates": 2, "threshold": scores[len(scores) // 3]}
    again = engine.select_expand(prompts, **options, on_unlearnable="resample", max_resamples=1)
    asked = team.select_expand(prompts, **options, on_unlearnable="ask_teacher")
    assert outcomes(asked) == outcomes(again)
    for s in asked:
        assert all(r.teachers == (r.attempt,) for r in s.rounds)
        assert all(r.teacher == r.attempt for r in s.tree)
        for one in s.rounds:
            siblings = [r for r in s.tree if (r.round, r.attempt) == (one.round, one.attempt)]
            refused = all(r.verdict in ("threshold", "duplicate", "loop") for r in siblings)
            # the second teacher writes where all of the first one's candidates were refused, and nowhere else
            assert (one.decision in ("asked", "pruned")) == refused
            assert (one.decision == "pruned") == (refused and one.attempt == 1)
    decisions = [one.decision for s in asked for one in s.rounds]
    assert {"selected", "asked", "pruned"} <= set(decisions)
    assert any(c.teacher == 1 for s in asked for c in s.best.chunks)
    assert team.pages_in_use[0] == 0


def test_results_do_not_depend_on_batching_or_suspension(
    pair: Pair, copies: list[Path], random_prompts: Prompts
) -> None:
    prompts = random_prompts(5, 53)
    options = {**SEARCH, "candidates": 2, "beam": 2, "max_tokens": 48}
    expected = Engine.from_pretrained(copies, pair.student, dtype="float32", memory_bytes=1 << 24)
    outcome = outcomes(expected.select_expand(prompts, **options))
    narrow = Engine.from_pretrained(copies, pair.student, dtype="float32", memory_bytes=1 << 24, max_num_seqs=3)
    assert outcomes(narrow.select_expand(prompts, **options)) == outcome
    tight = with_pages(expected, 180)
    assert outcomes(tight.select_expand(prompts, **options)) == outcome
    assert tight.usage.prefill_tokens > expected.usage.prefill_tokens, "nothing was suspended"
    assert tight.pages_in_use[0] == 0
    with pytest.raises(CapacityError, match="cache"):
        with_pages(expected, 40).select_expand(prompts, **options)


def test_a_teacher_that_does_not_win_is_dropped(pair: Pair, tmp_path: Path, random_prompts: Prompts) -> None:
    save_checkpoint(tmp_path / "worse", seed=9, scale=0.1)  # nearly uniform: the student never prefers it
    for file in ("config.json", "generation_config.json"):
        edit_json(tmp_path / "worse" / file, eos_token_id=ENDINGS)
    engine = Engine.from_pretrained([tmp_path / "worse", pair.student], pair.student, memory_bytes=1 << 24)
    prompts = random_prompts(3, 54)
    kept = engine.select_expand(prompts, candidates=2, **SEARCH)
    dropping = engine.select_expand(prompts, candidates=2, **SEARCH, drop_teacher_after=2)
    assert any(len(s.rounds) > 2 for s in dropping)
    for whole, s in zip(kept, dropping, strict=True):
        assert s.best.token_ids == whole.best.token_ids
        worse, better = s.teachers
        assert (worse.wins, better.wins, better.dropped_after) == (0, len(s.rounds), None)
        assert worse.decisions == min(2, len(s.rounds))
        assert worse.dropped_after == (2 if len(s.rounds) >= 2 else None)
        assert [r.teachers for r in s.rounds] == [(0, 1) if r.round < 2 else (1,) for r in s.rounds]


def law_of_best(length: int, teachers: Sequence[torch.Tensor], n: int) -> dict[tuple[int, ...], float]:
    """Probability of each chunk to be the student's best of n candidates from each teacher, by brute force."""
    paths = torch.cartesian_prod(*[torch.arange(3)] * length).reshape(-1, length).tolist()

    def probability(logits: torch.Tensor, path: list[int]) -> float:
        table = logits.double().log_softmax(1)
        return math.exp(sum(float(table[a, b]) for a, b in zip([0, *path], path, strict=False)))

    paths.sort(key=lambda path: probability(STUDENT, path))
    law, cumulative, before = {}, [0.0] * len(teachers), 0.0
    for path in paths:
        cumulative = [c + probability(t, path) for c, t in zip(cumulative, teachers, strict=True)]
        now = math.prod(c**n for c in cumulative)
        law[tuple(path)], before = now - before, now
    assert before == pytest.approx(1.0)
    return law


def p_value(observed: dict[tuple[int, ...], int], law: dict[tuple[int, ...], float]) -> float:
    total = sum(observed.values())
    assert min(law.values()) * total > 4, "a cell expects too few picks for chi-square"
    statistic = sum((observed.get(k, 0) - total * p) ** 2 / (total * p) for k, p in law.items())
    return float(
        torch.special.gammaincc(
            torch.tensor((len(law) - 1) / 2.0, dtype=torch.float64), torch.tensor(statistic / 2, dtype=torch.float64)
        )
    )


@pytest.mark.parametrize("second", [TEACHER, OTHER], ids=["a copy", "another teacher"])
def test_picks_follow_the_law_of_the_best_of_both(tmp_path: Path, second: torch.Tensor) -> None:
    ids = [EOS if c == "$" else token_of(c) for c in "abc"]
    for name, logits in (("one", TEACHER), ("two", second), ("student", STUDENT)):
        save_markov(tmp_path / name, ids, logits)
    engine = Engine.from_pretrained(
        [tmp_path / "one", tmp_path / "two"], tmp_path / "student", dtype="float32", memory_bytes=1 << 24,
        max_num_seqs=4096,
    )  # fmt: skip
    selections = engine.select_expand(
        [[LETTERS[0]]] * 500, candidates=2, chunk=Chunk(tokens=1, until=None, shortest=1), max_tokens=1, seed=2
    )
    picks: dict[tuple[int, ...], int] = {}
    for s in selections:
        path = tuple(LETTERS.index(t) for t in s.best.token_ids)
        picks[path] = picks.get(path, 0) + 1
    assert p_value(picks, law_of_best(1, [TEACHER, second], 2)) > CHI_SQUARE_P
    assert p_value(picks, law_of_best(1, [TEACHER], 2)) < 1e-6  # the test can fail
    if second is TEACHER:  # the law of twice the candidates of one teacher
        assert p_value(picks, law_of_best(1, [TEACHER], 4)) > CHI_SQUARE_P


def spell(tokenizer: Tokenizer, ids: Sequence[int]) -> list[bytes | str]:
    """The bytes of every token that is text, and the name of every other one."""
    table = ByteTable.of(tokenizer, "a model")
    return [table.bytes_of[i] if i in table.bytes_of else str(tokenizer.hf.convert_ids_to_tokens(i)) for i in ids]


def merge(parts: Sequence[bytes | str]) -> list[bytes | str]:
    """Parts of a text, with bytes that follow each other joined."""
    merged: list[bytes | str] = []
    for part in parts:
        last = merged[-1] if merged else None
        if isinstance(part, bytes) and isinstance(last, bytes):
            merged[-1] = last + part
        else:
            merged.append(part)
    return merged


def test_teachers_with_different_tokenizers_write_one_text(tmp_path: Path) -> None:
    """Each teacher and the student have tokens of their own of the same bytes, whoever wrote a chunk."""
    for seed, kind in enumerate(("qwen", "gemma", "smollm")):
        save(tmp_path / kind, build(kind), seed=seed, scale=6.0)
    teachers = [tmp_path / "qwen", tmp_path / "gemma"]
    engine = Engine.from_pretrained(teachers, tmp_path / "smollm", dtype="float32", memory_bytes=1 << 24)
    selections = engine.select_expand(
        ["one and two", "the other is"], candidates=2, chunk=Chunk(tokens=6, until=None), max_tokens=36,
        criterion="random", beam=2, loop_guard=None,
    )  # fmt: skip
    tokenizers = [one.tokenizer("teacher") for one in engine.teachers]
    student = engine.tokenizer("student")
    encoder = TextEncoder(student, ByteTable.of(student, "student"), "student")
    writers: list[int] = []
    for s in selections:
        assert s.error is None
        for t in s.trajectories:
            start, written = 0, list[bytes | str]()
            for chunk in t.chunks:
                written += spell(tokenizers[chunk.teacher], t.token_ids[start : start + chunk.tokens])
                start += chunk.tokens
                writers.append(chunk.teacher)
            assert start == len(t.token_ids)
            # the student has the tokens of the whole text that all wrote together
            expected: list[int] = []
            for part in merge(written):
                if isinstance(part, str):
                    expected.append(student.hf.convert_tokens_to_ids(part))
                else:
                    expected += encoder.encode(part.decode(errors="surrogateescape"), is_whole=True).ids
            assert list(t.student_ids) == expected
            assert merge(spell(student, t.student_ids)) == merge(written)
    assert set(writers) == {0, 1}
    assert any(a != b for a, b in pairwise(writers)), "no teacher went on with what another one wrote"
    assert engine.pages_in_use[0] == 0


def test_what_a_team_cannot_do_is_refused_by_name(pair: Pair, copies: list[Path], team: Engine, engine: Engine) -> None:
    for teachers, student, message in (
        (copies, None, "give student="),
        ([pair.teacher, pair.teacher], pair.student, "is given twice; for more candidates"),
        (["http://a/v1", "http://b/v1"], pair.student, "only one of several teachers may be the URL"),
        ([], pair.student, "the list is empty"),
    ):
        with pytest.raises(InputError, match=message):
            Engine.from_pretrained(teachers, student)
    with pytest.raises(InputError, match="ask_teacher needs several teachers"):
        engine.select_expand(["a"], on_unlearnable="ask_teacher")
    with pytest.raises(InputError, match="drop_teacher_after=2 needs several teachers"):
        engine.select_expand(["a"], drop_teacher_after=2)
    with pytest.raises(InputError, match="drop_teacher_after is for teachers that write in the same rounds"):
        team.select_expand(["a"], on_unlearnable="ask_teacher", drop_teacher_after=2)
    with pytest.raises(InputError, match="drop_teacher_after must be at least 1"):
        team.select_expand(["a"], drop_teacher_after=0)
    with pytest.raises(InputError, match="must be at least 64, which the candidates of 2 teachers"):
        team.select_expand(["a"], candidates=4, chunk=EIGHT, prompt_budget=Budget(tokens=32))
    for call in (lambda: team.generate(["a"]), lambda: team.branch("a")):
        with pytest.raises(InputError, match="several teachers write in a search alone"):
            call()
    assert len(team.teachers[1].generate([[5]], max_tokens=3)[0]) == 1
