"""Token-level selection: the student may refuse every token of the teacher."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.toys import Pair, edit_json, save_markov, token_of

from genssd.engine.common.errors import InputError, NumericsError
from genssd.engine.decoding.speculation_rules import ReverseSpeculation
from genssd.engine.engine import Engine
from genssd.engine.models.sampling import Sampling, attempt_key, noise_key
from genssd.kernels.weight import cells_of

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


def test_the_law_of_a_token(tmp_path: Path) -> None:
    """Two states that do not remember: the exact law is that of independent tries, then the student's own draw."""
    letters = [token_of(letter) for letter in "abc"]
    teacher = torch.tensor([[1.0, 0.2, -0.5]]).expand(3, 3)
    student = torch.tensor([[-1.5, 0.6, 0.9]]).expand(3, 3)
    save_markov(tmp_path / "teacher", letters, teacher)
    save_markov(tmp_path / "student", letters, student)
    engine = Engine.from_pretrained(tmp_path / "teacher", tmp_path / "student", dtype="float32", memory_bytes=1 << 22)
    rules = ReverseSpeculation(probability=0.3, top=2, tries=2, student=Sampling())
    q, p = teacher[0].softmax(0), student[0].softmax(0)
    refused = float(q[0])  # rank 3 for the student
    law = [refused**2 * float(p[0])] + [float(q[i]) * (1 + refused) + refused**2 * float(p[i]) for i in (1, 2)]
    assert sum(law) == pytest.approx(1.0)
    draws = 4000
    completions = engine.generate([[letters[0]]] * draws, max_tokens=1, sampling=Sampling(), rsd=rules)
    counts = [sum(c.token_ids[0] == letter for (c,) in completions) for letter in letters]
    for count, share in zip(counts, law, strict=True):
        assert abs(count - draws * share) < 4.0 * math.sqrt(draws * share * (1 - share))
    substituted = sum(c.substituted for (c,) in completions)
    assert abs(substituted - draws * refused**2) < 4.0 * math.sqrt(draws * refused**2)
    strict = ReverseSpeculation(probability=0.0, top=1, tries=50, student=Sampling())
    (only,) = engine.generate([[letters[0]]], max_tokens=30, sampling=Sampling(), rsd=strict)[0]
    assert set(only.token_ids) == {letters[2]}, "the likeliest is rank 1"


def test_a_response_ends_as_either_model_ends(pair: Pair, tmp_path: Path) -> None:
    student = tmp_path / "student"
    shutil.copytree(pair.student, student)
    written = 67
    edit_json(student / "generation_config.json", eos_token_id=[written])
    engine = Engine.from_pretrained(pair.teacher, student, dtype="float32", memory_bytes=1 << 22)
    assert written not in engine.tokenizer("teacher").end_token_ids
    everything = ReverseSpeculation(probability=0.0, top=1 << 30)
    completions = engine.generate([[1, 2, 3]] * 200, max_tokens=8, rsd=everything)
    assert any(c.token_ids[-1] == written and c.status == "finished" for (c,) in completions)
    assert not any(written in c.token_ids[:-1] for (c,) in completions)


def test_batches_and_order_change_nothing(engine: Engine, random_prompts: Prompts) -> None:
    prompts, rules = random_prompts(5, 5), ReverseSpeculation(tries=2)
    together = engine.generate(prompts, n=2, sampling=WRITES, max_tokens=16, rsd=rules)
    assert [engine.generate([p], n=2, sampling=WRITES, max_tokens=16, rsd=rules)[0] for p in prompts] == together
    assert engine.generate(prompts[::-1], n=2, sampling=WRITES, max_tokens=16, rsd=rules) == together[::-1]


def test_skipped_prompts_leave_the_others_as_they_are(engine: Engine, random_prompts: Prompts) -> None:
    prompts = random_prompts(4, 6)
    prompts[2] = prompts[0]  # equal prompts draw different responses, skipped or not
    everything = {g.index: g.completions for g in engine.iter_generate(prompts, max_tokens=12)}
    some = {g.index: g.completions for g in engine.iter_generate(prompts, max_tokens=12, skip=frozenset({0, 3}))}
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
        cells_of(engine._resources.runners[role].decoder.head.weight)[:1] = math.nan  # type: ignore[index]
    with pytest.raises(NumericsError, match=rf"the {role} .* for prompt 0, response position 0"):
        engine.generate([[1, 2, 3]], max_tokens=4, rsd=ReverseSpeculation())
    assert engine.pages_in_use[0] == 0
