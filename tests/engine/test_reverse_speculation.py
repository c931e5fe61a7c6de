"""Token-level selection: the student may refuse every token of the teacher."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from toys import Pair

from genssd.engine.engine import Engine
from genssd.engine.errors import InputError, NumericsError
from genssd.engine.reverse_speculation import ReverseSpeculation
from genssd.engine.sampling import Sampling, attempt_key, noise_key

Prompts = Callable[[int, int], list[list[int]]]
WRITES = Sampling(temperature=0.7, top_k=20, top_p=0.95)


def test_a_student_that_accepts_everything_changes_nothing(engine: Engine, random_prompts: Prompts) -> None:
    prompts = random_prompts(5, 1)
    plain = engine.generate(prompts, n=2, sampling=WRITES, max_tokens=24, seed=3)
    lenient = ReverseSpeculation(probability=0.0, top=1 << 30)
    assert engine.generate(prompts, n=2, sampling=WRITES, max_tokens=24, seed=3, rsd=lenient) == plain


def test_a_student_that_accepts_nothing_writes_alone(engine: Engine, pair: Pair, random_prompts: Prompts) -> None:
    """Greedy on its side: the tokens are the argmax of transformers' logits at every step."""
    strict = ReverseSpeculation(probability=1.0, top=1, tries=2, student=Sampling(temperature=0.0))
    prompts = random_prompts(4, 2)
    for prompt, (completion,) in zip(prompts, engine.generate(prompts, max_tokens=12, rsd=strict), strict=True):
        assert completion.substituted == len(completion.token_ids)
        ids = list(prompt)
        for token in completion.token_ids:
            logits = pair.student_model(torch.tensor([ids])).logits[0, -1]
            assert logits[token] > logits.max() - 1e-3
            ids.append(token)


def test_every_token_is_accepted_or_the_students_own(engine: Engine, pair: Pair, random_prompts: Prompts) -> None:
    rules = ReverseSpeculation(probability=0.002, top=60, tries=3, student=Sampling(temperature=0.0))
    prompts = random_prompts(6, 4)
    refused = 0
    for prompt, (completion,) in zip(
        prompts, engine.generate(prompts, sampling=WRITES, max_tokens=20, rsd=rules), strict=True
    ):
        logprob = pair.logprobs("student", prompt, list(completion.token_ids))
        ids = list(prompt)
        unacceptable = 0
        for token, p in zip(completion.token_ids, logprob.tolist(), strict=True):
            logits = pair.student_model(torch.tensor([ids])).logits[0, -1]
            acceptable = p >= math.log(0.002) and int((logits > logits[token]).sum()) < 60
            unacceptable += not acceptable
            assert acceptable or logits[token] > logits.max() - 1e-3
            ids.append(token)
        assert unacceptable <= completion.substituted
        assert completion.substituted < len(completion.token_ids) or len(completion.token_ids) < 4
        refused += completion.substituted
        teacher = pair.logprobs("teacher", prompt, list(completion.token_ids))
        torch.testing.assert_close(torch.tensor(completion.logprob), teacher.float(), atol=1e-3, rtol=1e-3)
    assert refused


def test_batches_and_order_change_nothing(engine: Engine, random_prompts: Prompts) -> None:
    prompts, rules = random_prompts(5, 5), ReverseSpeculation(tries=2)
    together = engine.generate(prompts, n=2, sampling=WRITES, max_tokens=16, rsd=rules)
    assert [engine.generate([p], n=2, sampling=WRITES, max_tokens=16, rsd=rules)[0] for p in prompts] == together
    assert engine.generate(prompts[::-1], n=2, sampling=WRITES, max_tokens=16, rsd=rules) == together[::-1]


def test_skipped_prompts_leave_the_others_as_they_are(engine: Engine, random_prompts: Prompts) -> None:
    prompts = random_prompts(4, 6)
    prompts[2] = prompts[0]  # equal prompts draw different responses, skipped or not
    everything = dict(engine.iter_generate(prompts, max_tokens=12))
    some = dict(engine.iter_generate(prompts, max_tokens=12, skip=frozenset({0, 3})))
    assert some == {1: everything[1], 2: everything[2]}


def test_attempts_draw_from_noise_of_their_own() -> None:
    keys = {attempt_key(stream, position, k) for stream in (1, 2) for position in range(50) for k in range(6)}
    assert len(keys) == 600
    assert attempt_key(7, 9, 0) == noise_key(7, 9)
    assert all(-(1 << 63) <= key < 1 << 63 for key in keys)


def test_what_it_refuses(engine: Engine, pair: Pair) -> None:
    with pytest.raises(InputError, match="needs model='teacher'"):
        engine.generate([[1, 2]], model="student", rsd=ReverseSpeculation())
    alone = Engine.from_pretrained(teacher=pair.teacher, memory_bytes=1 << 21)
    with pytest.raises(InputError, match="this engine has no student"):
        alone.generate([[1, 2]], rsd=ReverseSpeculation())
    for options in ({"probability": 1.5}, {"probability": -0.1}, {"top": 0}, {"tries": 0}):
        with pytest.raises(InputError, match="rsd: "):
            ReverseSpeculation(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_broken_weights_are_named(pair: Pair, role: str) -> None:
    engine = Engine.from_pretrained(pair.teacher, pair.student, memory_bytes=1 << 21)
    with torch.inference_mode():
        engine._runners[role].decoder.head[5] = math.nan  # type: ignore[index]
    with pytest.raises(NumericsError, match=rf"the {role} .* for prompt 0, response position 0"):
        engine.generate([[1, 2, 3]], max_tokens=4, rsd=ReverseSpeculation())
    assert engine.pages_in_use[0] == 0
