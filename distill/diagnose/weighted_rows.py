"""Rollouts of a diagnosis as training rows, in which tokens weigh what their alignment says.

    node_weights   weight of a token that is a node, in the field `chunks` of its row; all other tokens weigh 0
    positive       1 where the alignment of the first teacher, with the loss weights_loss, is above 0, else 0
    alignment      that alignment, where it is above 0, else 0
    nodes          1 at every node at which that alignment is defined: the same rollouts and nodes without the choice

`genssd train --data RUN/weighted_rows.jsonl --kd-ratio 1 --kd-loss LOSS --teacher-model-name-or-path TEACHER` trains on
these tokens alone. Probing a few positions to decide where to train is that of 2608.04419; which weights follow from
the probes is our choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from genssd.distill.diagnose.alignment import LossName
from genssd.distill.diagnose.config import WeightRule
from genssd.distill.diagnose.rows import Row

WEIGHTED_ROWS_FILE = "weighted_rows.jsonl"


def make_weighted_rows(
    row: Row, nodes: Sequence[Row], *, teacher: str, loss: LossName, rule: WeightRule, tokenizer: str
) -> list[dict[str, Any]]:
    """Return a training row for every rollout of a question that has a token of a weight above 0.

    row: line of questions.jsonl. nodes: its lines of nodes.jsonl. teacher: name of the reader. tokenizer: fingerprint
    of the student's.
    """
    rows = []
    for number, rollout in enumerate(row["rollouts"]):
        weights = [0.0] * len(rollout["token_ids"])
        for node in nodes:
            if node["rollout"] == number:
                weights[node["position"]] = _weigh_node(node["alignment"][teacher][loss], rule)
        if not any(weights):
            continue
        chunks = [{"tokens": len(list(run)), "weight": weight} for weight, run in groupby(weights)]
        rows.append(
            {
                "index": row["index"],
                "rollout": number,
                "prompt": row["prompt"],
                "answer": row["answer"],
                "tokenizer": tokenizer,
                "student_prompt_ids": row["student_prompt_ids"],
                "completion_ids": rollout["token_ids"],
                "chunks": chunks,
                "weights": {"teacher": teacher, "loss": loss, "rule": rule},
                "source": row["source"],
            }
        )
    return rows


def _weigh_node(alignment: float | str, rule: WeightRule) -> float:
    """Return the weight of a node. alignment: a cosine, or the reason why there is none."""
    if isinstance(alignment, str):
        return 0.0
    if rule == "nodes":
        return 1.0
    return float(alignment > 0.0) if rule == "positive" else max(0.0, alignment)
