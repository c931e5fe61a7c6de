"""Forced rollouts and reading at nodes, against enumeration, fresh generation and full forward passes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from support.exact_tree import ExactTree
from support.toys import ENDINGS, EOS, Pair, save_markov, token_of

from genssd.engine.calls.generation import Completion
from genssd.engine.calls.nodes import Fork
from genssd.engine.common.errors import CapacityError, InputError
from genssd.engine.engine import Engine
from genssd.engine.models.sampling import Sampling

LETTERS = [token_of(c) for c in "abc"]
PROMPT = [5, 6, 7]
RESPONSE = [10, 11, 12, 13, 14, 15, 16, 17, 18, 19] * 4


def everything(engine: Engine, forks: list[list[Fork]], **options: object) -> dict[tuple[int, Fork], list[Completion]]:
    settings = {"n": 3, "max_tokens": 60, "seed": 4, **options}
    rollouts = engine.iter_force(PROMPT, [RESPONSE, RESPONSE[:20]], forks, **settings)  # type: ignore[arg-type]
    return {(index, fork): completions for index, fork, completions in rollouts}


def test_success_after_a_forced_token_is_that_of_enumeration(tmp_path: Path) -> None:
    """Vocabulary 3, depth 4: Q at every node of one response, and the chance of each completion."""
    tree = ExactTree.random(3, 4, seed=11, scale=0.8)
    save_markov(tmp_path, LETTERS, torch.tensor(tree.logits, dtype=torch.float32))
    engine = Engine.from_pretrained(student=tmp_path, dtype="float32", memory_bytes=1 << 24, max_num_seqs=4096)
    response, n = (2, 0, 1, 2), 3000
    forks = [Fork(position=t, token=token) for t in range(4) for token in LETTERS]
    ids = [LETTERS[letter] for letter in response]
    rollouts = engine.iter_force([LETTERS[0]], [ids], [forks], n=n, max_tokens=4, seed=2)
    for _, fork, completions in rollouts:
        prefix = (*response[: fork.position], LETTERS.index(fork.token))
        leaves = [(*prefix, *(LETTERS.index(token) for token in c.token_ids)) for c in completions]
        assert all(len(leaf) == 4 for leaf in leaves)
        rate = np.mean([leaf in tree.wins for leaf in leaves])
        exact = min(1.0, tree.success(prefix))
        assert abs(rate - exact) <= 4.5 * np.sqrt(exact * (1 - exact) / n) + 1e-12
        for leaf, count in Counter(leaves).items():
            chance = tree.reach(leaf) / tree.reach(prefix)
            assert abs(count / n - chance) <= 4.5 * np.sqrt(chance * (1 - chance) / n) + 1e-12
    assert engine.pages_in_use[0] == 0


def test_shared_pages_give_what_a_fresh_prompt_gives(engine: Engine, pair: Pair) -> None:
    """The model's own log-probabilities of every completion, by one full pass of transformers."""
    forks = [Fork(position=t, token=token) for t in (0, 3, 16, 17, 39) for token in (RESPONSE[0], 77)]
    for role in ("student", "teacher"):
        done = everything(engine, [forks, forks[:4]], model=role)
        assert len(done) == 14
        for (index, fork), completions in done.items():
            prefix = [*[RESPONSE, RESPONSE[:20]][index][: fork.position], fork.token]
            assert len(completions) == 3
            for c in completions:
                assert 1 <= len(c.token_ids) <= 60 - len(prefix)
                assert (c.token_ids[-1] in ENDINGS) == (c.status == "finished")
                assert c.text == engine.tokenizer("student").decode([*prefix, *c.token_ids])
                exact = pair.logprobs(role, PROMPT + prefix, list(c.token_ids))
                torch.testing.assert_close(torch.tensor(c.logprob).double(), exact, atol=1e-4, rtol=0)


def test_completions_depend_on_their_own_place_alone(engine: Engine, pair: Pair) -> None:
    """Not on the batch, the other forks, their order, the cache's size, or what the other responses are."""
    forks = [Fork(position=t, token=token) for t in (0, 5, 9) for token in (20, 21)]
    full = everything(engine, [forks, forks])
    assert len({c.token_ids for completions in full.values() for c in completions}) > 20, "streams are not shared"
    narrow = pair.engine(max_num_seqs=2, memory_bytes=1 << 19)
    assert everything(narrow, [forks[::-1], forks]) == full
    assert everything(engine, [[forks[3]], []]) == {(0, forks[3]): full[0, forks[3]]}
    assert full[0, forks[0]] != full[1, forks[0]], "each response has streams of its own"
    for change in ({"seed": 5}, {"occurrence": 1}):
        assert everything(engine, [[forks[3]], []], **change)[0, forks[3]] != full[0, forks[3]]
    # more completions are further ones
    assert everything(engine, [[forks[3]], []], n=5)[0, forks[3]][:3] == full[0, forks[3]]


def test_the_prefix_is_computed_once(engine: Engine) -> None:
    """The number of computed tokens, against a fresh generation per forced token."""
    forks = [Fork(position=t, token=token) for t in (0, 10, 30) for token in (20, 21, 22)]
    before = engine.usage.prefill_tokens, engine.usage.forced_tokens
    done = everything(engine, [forks, forks[:6]])
    assert engine.usage.prefill_tokens - before[0] == len(PROMPT) + 30 + 10
    assert engine.usage.forced_tokens - before[1] == 15 == len(done)
    before_naive = engine.usage.prefill_tokens
    for fork in forks:
        engine.generate([[*PROMPT, *RESPONSE[: fork.position], fork.token]], model="student", n=3, max_tokens=4)
    assert engine.usage.prefill_tokens - before_naive == 3 * (3 * (len(PROMPT) + 1) + 0 + 10 + 30)


def test_behind_the_end_nothing_comes(engine: Engine) -> None:
    end, last = Fork(position=4, token=ENDINGS[0]), Fork(position=9, token=33)
    before = engine.usage.sampled_tokens
    done = everything(engine, [[end, last], []], max_tokens=10)
    assert [(c.status, c.token_ids) for c in done[0, end]] == [("finished", ())] * 3
    assert [(c.status, c.token_ids) for c in done[0, last]] == [("length", ())] * 3
    tokenizer = engine.tokenizer("student")
    assert done[0, end][0].text == tokenizer.decode([*RESPONSE[:4], ENDINGS[0]])
    assert done[0, last][0].text == tokenizer.decode([*RESPONSE[:9], 33])
    assert engine.usage.sampled_tokens == before


def test_nothing_is_left_behind(engine: Engine, pair: Pair) -> None:
    rollouts = engine.iter_force(PROMPT, [RESPONSE], [[Fork(position=t, token=9) for t in range(30)]], n=2)
    next(rollouts)
    assert engine.pages_in_use[0] > 0
    rollouts.close()  # type: ignore[attr-defined]
    assert engine.pages_in_use[0] == 0
    tiny = pair.engine(memory_bytes=1 << 15)
    with pytest.raises(CapacityError, match=r"the prompt: prompt and response need 3 more pages, with 1 free of"):
        list(tiny.iter_force(PROMPT, [RESPONSE], [[Fork(position=39, token=9)]], max_tokens=45))
    assert tiny.pages_in_use[0] == 0
    with pytest.raises(CapacityError, match=r"the prompt: the responses need 26 pages, with 0 free of"):
        list(tiny.iter_force(PROMPT, [RESPONSE], [[Fork(position=3, token=9)]], max_tokens=400))
    assert tiny.pages_in_use[0] == 0


def test_bad_requests(engine: Engine) -> None:
    for forks, options, message in (
        ([[Fork(position=41, token=1)], []], {}, "a fork lies outside its response of 40 tokens"),
        ([[Fork(position=10, token=1)], []], {"max_tokens": 10}, "or max_tokens"),
        ([[Fork(position=1, token=999)], []], {}, "token id 999 is outside"),
        ([[]], {}, "2 responses but forks of 1"),
        ([[], []], {"n": 0}, "n must be at least 1, not 0"),
    ):
        with pytest.raises(InputError, match=message):
            everything(engine, forks, **options)


def test_greedy_forks_agree_with_greedy_generation(engine: Engine) -> None:
    """The fork that forces what stands there goes on as the response did."""
    greedy = Sampling(temperature=0.0)
    ((full,),) = engine.generate([PROMPT], model="student", sampling=greedy, max_tokens=30)
    forks = [Fork(position=t, token=token) for t, token in enumerate(full.token_ids)]
    for _, fork, (c,) in engine.iter_force(PROMPT, [full.token_ids], [forks], sampling=greedy, max_tokens=30):
        assert c.token_ids == full.token_ids[fork.position + 1 :]
        assert (c.text, c.status) == (full.text, full.status)


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_reading_is_that_of_a_full_pass(engine: Engine, pair: Pair, role: str) -> None:
    reader = engine.node_reader(role)  # type: ignore[arg-type]
    positions = [[39, 0, 7], []], [[1, 0], [20, 3]]
    for at in positions:
        before = engine.usage.prefill_tokens
        states = reader.states(PROMPT, [RESPONSE, RESPONSE[:21]], at, "x")
        assert engine.usage.prefill_tokens - before == 3 + sum(max(of, default=0) for of in at)
        model = pair.teacher_model if role == "teacher" else pair.student_model
        with torch.no_grad():
            table = model(torch.tensor([PROMPT + RESPONSE])).logits[0].double().log_softmax(1)
        for rows, of in zip(states, at, strict=True):
            assert len(rows) == len(of)
            exact = table[[len(PROMPT) - 1 + t for t in of]]
            tokens = [[3, EOS, 8], [1], [2, 2]][: len(of)]
            for logprob, ids, row in zip(reader.logprob(rows, tokens, "x"), tokens, exact, strict=True):
                np.testing.assert_allclose(logprob, row[ids].numpy(), atol=1e-4)
            assert reader.likeliest(rows, 4, "x") == [row.topk(4).indices.tolist() for row in exact]
    assert engine.pages_in_use[0] == 0


def test_padding_is_never_likely(tmp_path: Path) -> None:
    """An embedding that is wider than the vocabulary: the ids behind it share in nothing."""
    save_markov(tmp_path, LETTERS, torch.zeros(3, 3), vocab_size=300)
    engine = Engine.from_pretrained(student=tmp_path, dtype="float32", memory_bytes=1 << 20)
    reader = engine.node_reader()
    (states,) = reader.states([LETTERS[0]], [LETTERS], [[0, 2]], "x")
    assert all(len(row) == max(row) + 1 for row in (sorted(ids) for ids in reader.likeliest(states, 9999, "x")))
    np.testing.assert_allclose(reader.logprob(states, [LETTERS, LETTERS], "x"), np.log(1 / 3), atol=1e-5)


def test_reading_says_what_does_not_fit(pair: Pair) -> None:
    tiny = pair.engine(memory_bytes=1 << 15)
    with pytest.raises(CapacityError, match="row 3: prompt and response need 3 more pages, with 1 free"):
        tiny.node_reader().states(PROMPT, [RESPONSE], [[39]], "row 3")
    with pytest.raises(CapacityError, match="row 3: prompt and response have more tokens than the 512 positions"):
        tiny.node_reader().states(PROMPT, [RESPONSE * 20], [[600]], "row 3")
    assert tiny.pages_in_use[0] == 0
