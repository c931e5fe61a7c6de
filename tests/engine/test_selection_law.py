"""The law of the search on Markov chains, where every distribution is known exactly.

The best of N independent candidates, over outcomes sorted from worst to best with the teacher's cumulative
distribution F, is outcome k with probability F_k^N - F_{k-1}^N. Removing duplicates before ranking does not change it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import permutations, product
from math import exp, prod
from pathlib import Path

import pytest
import torch
from support.toys import EOS, edit_json, save_markov, token_of
from torch import Tensor

from genssd.engine.decoding.chunk import Chunk
from genssd.engine.engine import Engine
from genssd.engine.models.sampling import child_stream, prompt_stream
from genssd.engine.search.choice import draw_order, softmax
from genssd.engine.texts.loops import LoopGuard

LETTERS = [token_of(c) for c in "abc"]
TEACHER = torch.tensor([[0.5, 1.0, -0.3], [0.0, 0.9, 1.1], [1.2, -0.4, 0.6]])
STUDENT = torch.tensor([[1.0, -1.2, 0.4], [0.1, -0.7, 0.8], [-1.5, 0.3, 0.9]])
CHI_SQUARE_P = 1e-4  # seeded, so a correct search fails once and for all with this probability

Chain = Callable[[list[str], Tensor, Tensor], Engine]


@pytest.fixture
def chain(tmp_path: Path) -> Chain:
    """An engine over two chains on the same letters ("$" is the end of sequence)."""

    def make(letters: list[str], teacher: Tensor, student: Tensor) -> Engine:
        ids = [EOS if c == "$" else token_of(c) for c in letters]
        save_markov(tmp_path / "teacher", ids, teacher)
        save_markov(tmp_path / "student", ids, student)
        return Engine.from_pretrained(
            tmp_path / "teacher", tmp_path / "student", dtype="float32", memory_bytes=1 << 24, max_num_seqs=4096
        )

    return make


def path_logprob(logits: Tensor, start: int, path: tuple[int, ...]) -> float:
    table = logits.double().log_softmax(dim=1)
    return sum(float(table[a, b]) for a, b in zip((start, *path), path, strict=False))


def best_of_n_law(start: int, length: int, n: int) -> dict[tuple[int, ...], float]:
    """Probability of each chunk to be the best of n for the student."""
    paths = sorted(product(range(3), repeat=length), key=lambda path: path_logprob(STUDENT, start, path))
    law, cumulative = {}, 0.0
    for path in paths:
        before = cumulative
        cumulative += float(torch.tensor(path_logprob(TEACHER, start, path)).exp())
        law[path] = cumulative**n - before**n
    assert cumulative == pytest.approx(1.0)
    assert sum(law.values()) == pytest.approx(1.0)
    return law


def p_value(observed: dict[tuple[int, ...], int], law: dict[tuple[int, ...], float]) -> float:
    total = sum(observed.values())
    assert set(observed) <= set(law)
    assert min(law.values()) * total > 4, "a cell expects too few picks for chi-square"
    statistic = sum((observed.get(k, 0) - total * p) ** 2 / (total * p) for k, p in law.items())
    freedom = torch.tensor((len(law) - 1) / 2.0, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, torch.tensor(statistic / 2, dtype=torch.float64)))


def test_the_chain_is_what_the_models_compute(chain: Chain) -> None:
    engine = chain(["a", "b", "c"], TEACHER, STUDENT)
    response = [0, 2, 1, 1, 0, 0, 2, 2]
    for model, logits in (("teacher", TEACHER), ("student", STUDENT)):
        (stats,) = engine.score([[LETTERS[1]]], [[LETTERS[i] for i in response]], model=model)  # type: ignore[arg-type]
        expected = [path_logprob(logits, a, (b,)) for a, b in zip([1, *response], response, strict=False)]
        torch.testing.assert_close(stats.logprob, torch.tensor(expected), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("n", "length", "prompts"), [(3, 1, 1000), (2, 2, 1200)])
def test_picks_follow_the_law_of_the_best_of_n(chain: Chain, n: int, length: int, prompts: int) -> None:
    engine = chain(["a", "b", "c"], TEACHER, STUDENT)
    selections = engine.select_expand(
        [[LETTERS[0]]] * prompts,
        candidates=n,
        chunk=Chunk(tokens=length, until=None, shortest=1),
        max_tokens=2 * length,
        seed=1,
    )
    rounds: list[dict[int, dict[tuple[int, ...], int]]] = [{}, {}]
    for s in selections:
        letters = [LETTERS.index(t) for t in s.best.token_ids]
        chunks = tuple(letters[:length]), tuple(letters[length:])
        for picks, start, chunk in zip(rounds, (0, chunks[0][-1]), chunks, strict=True):
            counts = picks.setdefault(start, {})
            counts[chunk] = counts.get(chunk, 0) + 1
    assert p_value(rounds[0][0], best_of_n_law(0, length, n)) > CHI_SQUARE_P
    for start, counts in rounds[1].items():
        law = best_of_n_law(start, length, n)
        if min(law.values()) * sum(counts.values()) > 4:
            assert p_value(counts, law) > CHI_SQUARE_P
    assert sum(r.verdict == "duplicate" for s in selections for r in s.tree) > 100
    # plain sampling is another law: the test can fail
    assert p_value(rounds[0][0], best_of_n_law(0, length, 1)) < 1e-9


PEAKED = torch.tensor([[30.0, 0.0], [30.0, 0.0]])


def test_candidates_with_the_same_tokens_are_duplicates(chain: Chain) -> None:
    engine = chain(["a", "b"], PEAKED, PEAKED)
    (selection,) = engine.select_expand(
        ["b"], candidates=3, chunk=Chunk(tokens=4, until=None), max_tokens=8, loop_guard=None
    )
    assert [r.verdict for r in selection.tree] == ["kept", "duplicate", "duplicate"] * 2
    assert selection.best.text == "aaaaaaaa"
    assert [c.runner_up for c in selection.best.chunks] == [None, None]
    assert [r.ended for r in selection.tree] == ["chunk"] * 3 + ["length"] * 3


def test_a_loop_ends_a_branch_and_is_kept_without_the_guard(chain: Chain) -> None:
    engine = chain(["a", "b"], PEAKED, PEAKED)
    guard = LoopGuard(max_period=2, min_repeats=2, min_tokens=7)
    options = {"candidates": 2, "chunk": Chunk(tokens=3, until=None), "max_tokens": 12}
    (selection,) = engine.select_expand(["b"], **options, loop_guard=guard)
    # three and six tokens are too few for the guard, the trajectory of nine ends in a loop
    assert [r.verdict for r in selection.tree] == ["kept", "duplicate", "kept", "duplicate", "loop", "duplicate"]
    assert [t.status for t in selection.trajectories] == ["pruned"]
    assert selection.best.text == "aaaaaa"
    (free,) = engine.select_expand(["b"], **options, loop_guard=None)
    assert (free.best.status, free.best.text) == ("length", "a" * 12)


@pytest.mark.parametrize(
    ("policy", "lengths"), [("resample", [3, 3, 3]), ("shorten", [3, 1]), ("accept_best", [3]), ("stop", [3])]
)
def test_no_policy_accepts_a_loop(chain: Chain, policy: str, lengths: list[int]) -> None:
    engine = chain(["a", "b"], PEAKED, PEAKED)
    (selection,) = engine.select_expand(
        ["b"], candidates=2, chunk=Chunk(tokens=3, until=None), max_tokens=12, threshold=100.0,
        loop_guard=LoopGuard(max_period=2, min_repeats=2, min_tokens=7), on_unlearnable=policy, min_chunk_tokens=1,
    )  # fmt: skip
    attempts = [r for r in selection.rounds if r.round == 2]
    assert [r.chunk_tokens for r in attempts] == lengths
    assert attempts[-1].decision == "pruned"
    assert {r.verdict for r in selection.tree if r.round == 2} == {"loop", "duplicate"}
    assert (selection.best.status, selection.best.text) == ("pruned", "aaaaaa")


def test_a_candidate_that_does_not_loop_is_preferred_to_a_better_one_that_does(chain: Chain) -> None:
    teacher = torch.tensor([[1.5, 0.0], [0.0, 0.0]])
    engine = chain(["a", "b"], teacher, torch.tensor([[3.0, 0.0], [3.0, 0.0]]))
    guard = LoopGuard(max_period=1, min_repeats=2, min_tokens=4)
    options = {"candidates": 6, "chunk": Chunk(tokens=4, until=None), "max_tokens": 4, "criterion": "ppl"}
    seen = 0
    for seed in range(6):
        (guarded,) = engine.select_expand(["a"], **options, loop_guard=guard, seed=seed)
        (free,) = engine.select_expand(["a"], **options, loop_guard=None, seed=seed)
        if free.best.text == "aaaa":
            seen += 1
            assert guarded.best.text != "aaaa"
    assert seen


TEXTUAL = torch.tensor([[0.5, 0.3, 0.4, -1.5], [0.6, 0.1, 0.2, -1.5], [0.3, 0.3, 0.3, -1.5], [0.0, 0.0, 0.0, 0.0]])


@pytest.mark.parametrize(
    ("until", "tokens", "limit"),
    [("\n", 3, None), ("\n", 1, 2), ("ab", 3, 9), ("ab", 4, 4), ("a\na", 2, 30), (None, 5, None)],
)
def test_chunks_end_at_their_delimiter(chain: Chain, until: str | None, tokens: int, limit: int | None) -> None:
    engine = chain(["a", "b", "\n", "$"], TEXTUAL, TEXTUAL)
    chunk = Chunk(tokens=tokens, until=until, limit=limit)
    selections = engine.select_expand(
        ["a", "b", "ba"] * 4, candidates=3, chunk=chunk, max_tokens=23, loop_guard=None, seed=2
    )
    letter = {token_of(c): c for c in "ab\n"}
    endings = {"chunk": 0, "finished": 0, "length": 0}
    at_limit = 0
    for selection in selections:
        before = {r.trace: r.token_ids for r in selection.tree}
        for record in selection.tree:
            used = sum(len(before[record.trace[:k]]) for k in range(1, len(record.trace)))
            text = "".join(letter.get(t, "$") for t in record.token_ids)
            expected, ended = len(text), None
            for count in range(1, len(text) + 1):
                complete = until is not None and count >= tokens and text[:count].endswith(until)
                if text[count - 1] == "$":
                    ended = "finished"
                elif used + count == 23:
                    ended = "length"
                elif complete or count == chunk.longest:
                    ended = "chunk"
                    at_limit += not complete
                if ended is not None:
                    expected = count
                    break
            assert (len(text), record.ended) == (expected, ended)
            endings[record.ended] += 1
        assert selection.best.status in ("finished", "length")
    assert endings["chunk"]
    assert endings["finished"]
    assert endings["length"] or until == "\n"
    assert at_limit < endings["chunk"] or until in (None, "ab")


def test_the_end_of_sequence_is_the_models_or_the_tokenizers(chain: Chain, tmp_path: Path) -> None:
    logits = torch.tensor([[0.0, 0.0, 0.0]] * 3)
    engine = chain(["a", "b", "$"], logits, logits)
    (selection,) = engine.select_expand(["a"], candidates=1, chunk=Chunk(tokens=40, until=None), max_tokens=40)
    assert selection.best.token_ids[-1] == EOS
    edit_json(tmp_path / "teacher" / "generation_config.json", eos_token_id=[token_of("b")])
    engine = Engine.from_pretrained(tmp_path / "teacher", tmp_path / "student", dtype="float32", memory_bytes=1 << 20)
    ends = {
        s.best.token_ids[-1]
        for s in engine.select_expand(["a"] * 12, candidates=1, chunk=Chunk(tokens=40, until=None), max_tokens=40)
    }
    assert ends == {EOS, token_of("b")}


def softmax_law(start: int, n: int, beam: int, score: Callable[[int], float]) -> dict[tuple[int, ...], float]:
    """Probability of each set of letters to be kept, where a letter's weight in a draw is exp(score)."""
    law: dict[tuple[int, ...], float] = {}
    teacher = TEACHER.double().softmax(dim=1)[start].tolist()
    for drawn in product(range(3), repeat=n):
        probability = prod(teacher[letter] for letter in drawn)
        for kept in permutations(set(drawn), min(beam, len(set(drawn)))):
            left, chance = set(drawn), probability
            for letter in kept:
                chance *= exp(score(letter)) / sum(exp(score(other)) for other in left)
                left.remove(letter)
            key = tuple(sorted(kept))
            law[key] = law.get(key, 0.0) + chance
    assert sum(law.values()) == pytest.approx(1.0)
    return law


@pytest.mark.parametrize(("criterion", "beam"), [("ppl", 1), ("teacher_logprob", 2)])
def test_draws_follow_the_softmax_without_replacement(chain: Chain, criterion: str, beam: int) -> None:
    """With a temperature the better candidates are more likely: low perplexities, high log-probabilities."""
    engine = chain(["a", "b", "c"], TEACHER, STUDENT)
    temperature = 12.0 if criterion == "ppl" else 0.8  # so that the laws below differ

    def score(letter: int) -> float:
        if criterion == "ppl":
            return -exp(-path_logprob(STUDENT, 0, (letter,))) / temperature
        return path_logprob(TEACHER, 0, (letter,)) / temperature

    selections = engine.select_expand(
        [[LETTERS[0]]] * 2500,
        candidates=3,
        beam=beam,
        chunk=Chunk(tokens=1, until=None, shortest=1),
        max_tokens=1,
        criterion=criterion,
        selection_temperature=temperature,
        seed=3,
    )
    observed: dict[tuple[int, ...], int] = {}
    for s in selections:
        kept = [r for r in s.tree if r.verdict == "kept"]
        letters = {r.token_ids: LETTERS.index(r.token_ids[0]) for r in s.tree}
        weights = {ids: exp(score(letter)) for ids, letter in letters.items()}
        for record in s.tree:
            if record.verdict == "duplicate":
                assert record.probability is None
            else:
                assert record.probability == pytest.approx(weights[record.token_ids] / sum(weights.values()), rel=1e-3)
        key = tuple(sorted(letters[r.token_ids] for r in kept))
        observed[key] = observed.get(key, 0) + 1
    assert p_value(observed, softmax_law(0, 3, beam, score)) > CHI_SQUARE_P
    # the best candidates, and the opposite direction, are other laws: the test can fail
    assert p_value(observed, softmax_law(0, 3, beam, lambda letter: 20 * score(letter))) < 1e-6
    assert p_value(observed, softmax_law(0, 3, beam, lambda letter: -score(letter))) < 1e-6


def test_the_order_of_draws_is_that_of_the_law() -> None:
    """Over many streams, pairs are drawn with the probability of the first times that of the second among the rest."""
    losses = [0.3, 1.1, 0.0, math.inf]
    probabilities = softmax(losses, 0.7)
    assert probabilities[3] == 0.0
    weights = [exp(-loss / 0.7) for loss in losses]
    assert probabilities == pytest.approx([weight / sum(weights) for weight in weights])
    observed: dict[tuple[int, ...], int] = {}
    for seed in range(4000):
        stream = prompt_stream(seed, [1, 2], 0)
        places = [(child_stream(stream, 7, index), 7) for index in range(4)]
        order = draw_order(probabilities, losses, places)
        assert order[3] == 3
        assert draw_order(probabilities, losses, places) == order
        observed[tuple(order[:2])] = observed.get(tuple(order[:2]), 0) + 1
    law = {(a, b): probabilities[a] * probabilities[b] / (1 - probabilities[a]) for a, b in permutations(range(3), 2)}
    assert p_value(observed, law) > CHI_SQUARE_P


def test_infinite_and_huge_values_have_probabilities() -> None:
    assert softmax([math.inf, math.inf], 1.0) == [0.5, 0.5]
    assert softmax([-math.inf, 3.0, -math.inf], 1.0) == [0.5, 0.0, 0.5]
    assert softmax([1e300, -1e300], 1e-30) == [0.0, 1.0]
    assert draw_order([0.0, 1.0, 0.0], [2.0, 0.0, 1.0], [(1, 0), (2, 0), (3, 0)]) == [1, 2, 0]
