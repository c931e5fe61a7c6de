"""The problems and the models that ship with the package."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path

import pytest

from genssd import Chunk, Engine, Sampling
from genssd.distill import small_pair
from genssd.distill.answers.judge import judge
from genssd.distill.small_pair.chat import build_tokenizer, write_corpus
from genssd.distill.small_pair.models import build_student, save
from genssd.distill.small_pair.problems import STYLES, detect_style, make_problems, write_solution, write_step
from genssd.distill.small_pair.training import (
    STUDENT_PHASES,
    iter_batches,
    make_example_writer,
    scale_learning_rate,
    train,
)

PAIR = Path(next(iter(small_pair.__path__)))


def test_problems_are_reproducible_and_the_splits_are_disjoint() -> None:
    training, repeated = make_problems(400, 5), make_problems(400, 5)
    assert training == repeated
    held_out = make_problems(200, 5, split="eval")
    assert not {p.operands for p in training} & {p.operands for p in held_out}
    assert len({p.operands for p in training}) == 400
    assert make_problems(5, 6) != training[:5]


def test_a_solution_is_right_in_every_style() -> None:
    rng = random.Random(0)
    for problem in make_problems(60, 7):
        assert sum(problem.operands) == int(problem.answer)
        assert all(str(operand) in problem.question for operand in problem.operands)
        solution = write_solution(problem, rng)
        assert judge(solution, problem.answer).is_correct
        *steps, last = solution.split("\n")
        assert len(steps) == len(problem.operands) - 1
        assert last == f"\\boxed{{{problem.answer}}}"


@pytest.mark.parametrize("style", STYLES)
def test_every_digit_operation_of_a_step_is_true(style: str) -> None:
    rng = random.Random(1)
    for _ in range(200):
        total, operand = rng.randint(10, 299), rng.randint(10, 99)
        step = write_step(total, operand, style, rng)
        assert detect_style(step.rstrip("\n")) == style
        assert step.endswith("\n")
        worked = step.split(": ")[-1].split(", ")
        assert worked[-1].strip().lstrip("=") == str(total + operand)
        for operation in worked[:-1]:
            left, right = operation.split("=")
            assert sum(map(int, left.split("+"))) == int(right)
    with pytest.raises(ValueError, match="unknown style 'poem'"):
        write_step(10, 10, "poem", rng)


def test_the_pair_is_small_and_shares_its_tokenizer() -> None:
    files = [p for role in ("teacher", "student") for p in (PAIR / role).iterdir()]
    assert sum(p.stat().st_size for p in files) <= 8 << 20
    assert (PAIR / "teacher" / "tokenizer.json").read_bytes() == (PAIR / "student" / "tokenizer.json").read_bytes()
    classes = [
        json.loads((PAIR / role / "config.json").read_text())["architectures"] for role in ("teacher", "student")
    ]
    assert classes == [["Qwen3ForCausalLM"], ["LlamaForCausalLM"]]
    assert (PAIR / "make.log").exists()


@pytest.mark.slow
def test_the_teacher_is_right_and_selection_turns_its_steps_to_what_the_student_can_follow() -> None:
    problems = make_problems(40, 4242, split="eval")
    prompts = [[{"role": "user", "content": p.question}] for p in problems]
    engine = Engine.from_pretrained(PAIR / "teacher", PAIR / "student", memory_bytes=1 << 28)
    greedy = engine.generate(prompts, sampling=Sampling(temperature=0.0), max_tokens=192)
    assert sum(judge(c[0].text, p.answer).is_correct for c, p in zip(greedy, problems, strict=True)) >= 36

    def spelled(candidates: int) -> float:
        chunk = Chunk(tokens=1, until="\n", limit=64)
        kept = engine.select_expand(prompts, candidates=candidates, chunk=chunk, max_tokens=192)
        styles = [detect_style(line) for s in kept for line in s.best.text.split("\n")]
        return styles.count("spelled") / sum(style is not None for style in styles)

    alone, selected = spelled(1), spelled(4)
    assert alone < 0.45
    assert selected > alone + 0.2


def test_real_text_of_any_kind_goes_through(tmp_path: Path) -> None:
    engine = Engine.from_pretrained(PAIR / "teacher", PAIR / "student", memory_bytes=1 << 27)
    text = "\u00bfCu\u00e1nto? \u4e2d\u6587 \U0001f600 \\frac{1}{2} " * 30
    ids = engine.tokenizer("teacher").encode(text, special=False)
    assert engine.tokenizer("teacher").decode(ids) == text
    (selection,) = engine.select_expand([text], candidates=2, chunk=Chunk(tokens=4, until=None), max_tokens=8)
    assert selection.error is None


def test_the_makers_parts_train_a_model_that_can_be_loaded(tmp_path: Path) -> None:
    tokenizer = build_tokenizer(write_corpus(100))
    phase = dataclasses.replace(STUDENT_PHASES[0], steps=2, batch=2, warmup=1)
    model = build_student(tokenizer)
    before = model.get_input_embeddings().weight.detach().clone()
    writer = make_example_writer(tokenizer, make_problems(10, 1), phase)
    steps: list[int] = []
    train(model, phase, iter_batches(writer, phase, 0, seed=0), lambda step: str(steps.append(step)), every=1)
    assert steps == [1, 2]
    assert not before.equal(model.get_input_embeddings().weight)
    save(model, tokenizer, tmp_path)
    engine = Engine.from_pretrained(tmp_path, memory_bytes=1 << 27)
    assert engine.tokenizer("teacher").encode("12+3", special=False)


def test_the_learning_rate_warms_up_and_falls_to_its_final_fraction() -> None:
    phase = dataclasses.replace(STUDENT_PHASES[0], steps=20, warmup=4, final_lr_fraction=0.3)
    rates = [scale_learning_rate(step, phase) for step in range(21)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[20] == pytest.approx(0.3)
    assert scale_learning_rate(20, dataclasses.replace(phase, horizon=36)) == pytest.approx(0.65)
