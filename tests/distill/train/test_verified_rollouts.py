"""On-policy training on the completions alone that have a verdict, and the losses by verdict."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_pair import TinyPair
from support.training_runs import ROWS, config_for, metrics, weights

from genssd.distill.answers.forms import Outcome, Verdict
from genssd.distill.answers.judge import AnswerJudge
from genssd.distill.data.examples import Example
from genssd.distill.train.batches import ExampleBatch
from genssd.distill.train.config import TrainConfig
from genssd.distill.train.key_attention_options import KeyAttentionOptions
from genssd.distill.train.on_policy import RolloutPlan, Rollouts
from genssd.distill.train.rollout_options import RolloutOptions
from genssd.distill.train.trainer import run_train
from genssd.engine.common.errors import InputError

Write = Callable[..., Path]
ANSWERED = [{**row, "answer": "8"} for row in ROWS]


def run(pair: TinyPair, data: Path, out: Path, train_on: Any, **options: Any) -> TrainConfig:
    config = config_for(
        pair, data, out, lmbda=1.0, kd_ratio=1.0, kd_loss="reverse_kl", teacher_model_name_or_path=str(pair.teacher),
        rollout=RolloutOptions(max_tokens=6, memory_bytes=1 << 22, train_on=train_on),
        **{"max_steps": 1, **options},
    )  # fmt: skip
    run_train(config)
    return config


def judge_by(monkeypatch: pytest.MonkeyPatch, decide: Callable[[list[int]], Outcome]) -> None:
    """A random model's text has no answers, so a rule on its tokens decides in place of the judge."""
    monkeypatch.setattr(AnswerJudge, "judge", lambda self, prompt, ids, answer: Verdict(outcome=decide(list(ids))))


def by_parity(ids: list[int]) -> Outcome:
    return ("correct", "wrong", "undecidable")[sum(ids) % 3]  # type: ignore[return-value]


def test_each_verdict_alone_has_the_loss_that_it_has_among_all(
    tiny_pair: TinyPair, write_rows: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_rows(ANSWERED)
    judge_by(monkeypatch, by_parity)
    options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    run(tiny_pair, data, tmp_path / "all", "all", **options)
    run(tiny_pair, data, tmp_path / "unverified", "unverified", **options)
    (both,), (plain,) = metrics(tmp_path / "all"), metrics(tmp_path / "unverified")
    assert not any("correct" in name for name in plain)
    assert both["loss"] == pytest.approx(plain["loss"], rel=1e-5)
    assert both["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-4)
    counts = {name: both[f"completions_{name}"] for name in ("correct", "wrong", "undecidable")}
    assert sum(counts.values()) == 8
    assert min(counts["correct"], counts["wrong"]) > 0
    for name, other in (("correct", "wrong"), ("wrong", "correct")):
        run(tiny_pair, data, tmp_path / name, name, **options)
        (row,) = metrics(tmp_path / name)
        assert row["loss"] == pytest.approx(both[f"divergence_{name}"], rel=1e-5)
        assert row[f"divergence_{name}"] == row["divergence"]
        assert f"divergence_{other}" not in row
        assert {n: row[f"completions_{n}"] for n in counts} == counts


def test_a_step_without_a_completion_to_train_on_changes_nothing(
    tiny_pair: TinyPair, write_rows: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first step leaves momentum, which would move the weights in the second one."""
    judged: list[int] = []

    def decide(ids: list[int]) -> Outcome:
        judged.append(0)
        return "wrong" if len(judged) <= 4 else "correct"

    judge_by(monkeypatch, decide)
    run(tiny_pair, write_rows(ANSWERED), tmp_path / "run", "wrong", max_steps=2, save_steps=1)
    first, last = weights(tmp_path / "run" / "checkpoint-1"), weights(tmp_path / "run")
    assert all(torch.equal(first[name], last[name]) for name in first)
    assert any(not torch.equal(first[name], value) for name, value in weights(tiny_pair.student).items())
    rows = metrics(tmp_path / "run")
    assert [row["completions_wrong"] for row in rows] == [4, 0]
    assert rows[1]["loss"] == rows[1]["grad_norm"] == 0.0


@pytest.mark.parametrize(
    ("text", "outcome"), [("so 4 + 4 = 8", "correct"), ("so 4 + 4 = 9", "wrong"), ("no number", "wrong")]
)
def test_the_judge_reads_what_the_student_wrote(tiny_pair: TinyPair, text: str, outcome: Outcome) -> None:
    tokenizer = tiny_pair.engine.tokenizer("student")
    prompt = tuple(tokenizer.encode("4+4=", special=True))
    example = Example(input_ids=(*prompt, 5), num_prompt=len(prompt), answer="8", weight=0.5)
    for train_on in ("all", "correct", "wrong", "unverified"):
        options = RolloutOptions(train_on=train_on)  # type: ignore[arg-type]
        plan = RolloutPlan(options=options, probability=1.0, seed=0, max_length=100)
        rollouts = Rollouts(tiny_pair.engine, plan, AnswerJudge(tokenizer), {})
        written = rollouts._replace_completion(example, tokenizer.encode(text, special=False))
        assert written.outcome == (None if train_on == "unverified" else outcome)
        assert written.weight == (0.5 if train_on in ("all", "unverified", outcome) else 0.0)


def test_parts_of_a_step_hold_one_verdict_and_those_that_are_not_trained_are_left_out() -> None:
    verdicts: list[Outcome] = ["wrong", "correct", "wrong", "wrong", "correct"]
    examples = [
        Example(input_ids=(i, i), num_prompt=1, outcome=verdict, weight=float(verdict == "wrong"))
        for i, verdict in enumerate(verdicts)
    ]
    parts = ExampleBatch(examples=examples, on_policy=True).split(2)
    assert [[e.input_ids[0] for e in part.examples] for part in parts] == [[0, 2], [3]]
    none = ExampleBatch(examples=[examples[1], examples[4]], on_policy=True)
    assert none.split(1) == [ExampleBatch(examples=[examples[1]], on_policy=True)]


def test_rows_without_an_answer_are_refused(tiny_pair: TinyPair, write_rows: Write, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"line 2: no reference answer.*rollout\.train_on"):
        run(tiny_pair, write_rows([ANSWERED[0], ROWS[1]]), tmp_path / "run", "wrong")


def test_attention_to_key_words_is_of_all_completions() -> None:
    with pytest.raises(InputError, match=r"key_attention is a mean over all completions: not with rollout\.train_on"):
        TrainConfig(
            model_name_or_path="m", data=("d",), lmbda=1.0, kd_ratio=1.0, teacher_model_name_or_path="t",
            rollout=RolloutOptions(train_on="wrong"), key_attention=KeyAttentionOptions(weight=1.0),
        )  # fmt: skip
