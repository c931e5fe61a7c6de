"""Training rows of a diagnosis: the nodes' weights, and the training that reads them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.tiny_pair import TinyPair
from support.training_runs import config_for, metrics

from genssd.distill.data.example_files import read_examples
from genssd.distill.diagnose.config import DiagnoseConfig
from genssd.distill.diagnose.weighted_rows import make_weighted_rows
from genssd.distill.train.trainer import run_train
from genssd.engine.common.errors import InputError

Write = Callable[..., Path]
ALIGNMENTS: list[float | str] = [0.5, -0.25, "flat", 0.0, 1.0]


def question() -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Three rollouts: nodes at tokens 1 to 5 of the first, one without an alignment in the second, none in the last."""
    row = {
        "index": 3, "prompt": "4+4=", "answer": "8", "student_prompt_ids": [5, 6], "source": {"file": "f", "line": 4},
        "rollouts": [{"token_ids": [7, 8, 9, 10, 11, 12, 13]}, {"token_ids": [7, 8]}, {"token_ids": [9]}],
    }  # fmt: skip
    nodes = [
        {"index": 3, "rollout": 0, "position": i + 1, "alignment": {"t": {"reverse_kl": value, "jsd": -1.0}}}
        for i, value in enumerate(ALIGNMENTS)
    ]
    nodes.append({"index": 3, "rollout": 1, "position": 0, "alignment": {"t": {"reverse_kl": "forced", "jsd": "flat"}}})
    return row, nodes


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("positive", [0, 1, 0, 0, 0, 1, 0]),
        ("alignment", [0, 0.5, 0, 0, 0, 1, 0]),
        ("nodes", [0, 1, 1, 0, 1, 1, 0]),
    ],
)
def test_a_training_reads_the_weights(
    tiny_pair: TinyPair, write_rows: Write, tmp_path: Path, rule: Any, expected: list[float]
) -> None:
    tokenizer = tiny_pair.engine.tokenizer("student")
    row, nodes = question()
    options = {"teacher": "t", "rule": rule, "tokenizer": tokenizer.fingerprint}
    rows = make_weighted_rows(row, nodes, loss="reverse_kl", **options)
    assert [r["rollout"] for r in rows] == [0]
    path = write_rows(rows, "weighted.jsonl")
    (example,) = read_examples([path], tokenizer, max_length=100, statuses=("finished",)).examples
    assert example.completion_ids == (7, 8, 9, 10, 11, 12, 13)
    assert example.token_weights() == expected
    assert make_weighted_rows(row, nodes, loss="jsd", **options) == [] or rule == "nodes"
    teacher = {"teacher_model_name_or_path": str(tiny_pair.teacher), "kd_loss": "reverse_kl", "kd_ratio": 1.0}
    run_train(config_for(tiny_pair, path, tmp_path / "run", max_steps=1, **teacher))
    (weighted,) = metrics(tmp_path / "run")
    # the same rollout with one token of weight at a time
    alone = []
    for place, weight in enumerate(expected):
        if weight:
            single = json.loads(json.dumps(rows[0]))
            single["chunks"] = [{"tokens": 1, "weight": float(i == place)} for i in range(7)]
            out = tmp_path / str(place)
            run_train(config_for(tiny_pair, write_rows([single], f"{place}.jsonl"), out, max_steps=1, **teacher))
            alone.append((weight, metrics(out)[0]["loss"]))
    mean = sum(weight * loss for weight, loss in alone) / sum(expected)
    assert weighted["loss"] == pytest.approx(mean, rel=1e-4)


def test_the_loss_of_the_weights_is_one_of_the_losses() -> None:
    with pytest.raises(InputError, match="weights_loss: jsd is not among the losses reverse_kl, sampled"):
        DiagnoseConfig(student="s", teacher=("t",), data="d", losses=("reverse_kl", "sampled"), weights_loss="jsd")
