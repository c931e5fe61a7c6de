"""Evaluation: intervals and files."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from support.tiny_pair import TinyPair
from support.toys import VOCAB, save_markov, token_of

from genssd import Sampling
from genssd.distill.answers.intervals import Estimate, bootstrap, wilson
from genssd.distill.evaluating import EvaluateConfig, run_evaluate
from genssd.engine.errors import InputError

Write = Callable[..., Path]


def test_wilson_against_its_formula() -> None:
    # solving (p - x)^2 = z^2 x (1 - x) / n for x gives both ends
    n, k, z = 50, 9, 1.96
    estimate = wilson([True] * k + [False] * (n - k))
    p = k / n
    roots = np.roots([1 + z * z / n, -(2 * p + z * z / n), p * p])
    assert (estimate.low, estimate.high) == pytest.approx(tuple(sorted(roots)))
    assert wilson([False] * 10).low == 0.0
    assert wilson([True] * 10).high == 1.0


def test_bootstrap_matches_the_normal_interval() -> None:
    values = np.random.default_rng(0).normal(size=400)
    estimate = bootstrap(list(values), seed=1)
    half = 1.96 * values.std() / math.sqrt(400)
    assert estimate.value == pytest.approx(values.mean())
    assert estimate.low == pytest.approx(values.mean() - half, abs=0.02)
    assert estimate.high == pytest.approx(values.mean() + half, abs=0.02)
    assert bootstrap(list(values), seed=1) == estimate


def test_a_model_whose_answers_are_known(tmp_path: Path, write_rows: Write) -> None:
    """A chain that writes 3 after any prompt with probability 3/4, else 7, and then ends."""
    letters = [token_of("="), token_of("3"), token_of("7"), VOCAB - 3]
    logits = torch.full((4, 4), -50.0)
    logits[0, 1], logits[0, 2] = math.log(0.75), math.log(0.25)
    logits[1, 3] = logits[2, 3] = 0.0
    save_markov(tmp_path / "model", letters, logits)
    data = write_rows([{"prompt": "1+2=", "answer": "3"}, {"prompt": "3+4=", "answer": "7"}] * 20)
    config = EvaluateConfig(
        model=str(tmp_path / "model"),
        data=str(data),
        output_dir=str(tmp_path / "run"),
        samples=40,
        sampling=Sampling(),
        max_tokens=4,
        memory_bytes=1 << 22,
    )
    seen: list[tuple[int, int]] = []
    result = run_evaluate(config, report=lambda done, total: seen.append((done, total)))
    assert result.accuracy.value == 0.5
    assert result.correct == (True, False) * 20
    assert result.mean_tokens == 2.0
    assert result.unfinished == 0
    assert result.avg_at_k is not None
    assert result.avg_at_k.value == pytest.approx(0.5, abs=0.05)
    rows = [json.loads(line) for line in (tmp_path / "run" / "evaluation.jsonl").read_text().splitlines()]
    shares = [np.mean([s["correct"] for s in row["samples"]]) for row in rows]
    assert np.mean(shares[0::2]) == pytest.approx(0.75, abs=0.06)
    assert rows[0]["response"] == "3"
    assert result.undecided == 0
    assert rows[0]["undecided"] is None
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["accuracy"]["value"] == 0.5
    assert seen[0] == (1, 80)
    assert seen[-1] == (80, 80)


def test_responses_that_cannot_be_judged_are_counted(tmp_path: Path, write_rows: Write) -> None:
    letters = [token_of("="), token_of("3"), VOCAB - 3]
    logits = torch.full((3, 3), -50.0)
    logits[0, 1] = logits[1, 2] = 0.0
    save_markov(tmp_path / "model", letters, logits)
    data = write_rows([{"prompt": "1+2=", "answer": "3"}, {"prompt": "1+2=", "answer": "B"}])
    config = EvaluateConfig(
        model=str(tmp_path / "model"),
        data=str(data),
        output_dir=str(tmp_path / "run"),
        max_tokens=4,
        memory_bytes=1 << 22,
    )
    result = run_evaluate(config)
    assert (result.correct, result.undecided) == ((True, False), 1)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["undecided"] == 1
    rows = [json.loads(line) for line in (tmp_path / "run" / "evaluation.jsonl").read_text().splitlines()]
    assert rows[1]["undecided"] == "the reference is the letter of an option, the response gives something else"


def test_rows_need_answers(tiny_pair: TinyPair, write_rows: Write, tmp_path: Path) -> None:
    data = write_rows([{"prompt": "a", "answer": "1"}, {"prompt": "b"}])
    with pytest.raises(InputError, match=r"data\.jsonl, line 2: no answer; a row needs answer, target or solution"):
        run_evaluate(EvaluateConfig(model=str(tiny_pair.student), data=str(data), output_dir=str(tmp_path)))


def test_an_estimate_prints_percent() -> None:
    assert str(Estimate(value=0.5, low=0.25, high=0.755)) == "50.0 % [25.0, 75.5]"
