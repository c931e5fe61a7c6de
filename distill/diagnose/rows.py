"""The lines of a diagnosis: the journal's, one per question, and nodes.jsonl's, one per node with its alignments."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from genssd.distill.data.problems import ProblemRow
from genssd.distill.diagnose.alignment import Floats, Loss, align, ideal_gradient, renormalised, teacher_advantage
from genssd.distill.diagnose.forcing import Outcome, Question, Spent
from genssd.distill.diagnose.placement import window_of
from genssd.distill.diagnose.reading import ReadNode
from genssd.distill.diagnose.reliability import gradient_variance, half_agreement
from genssd.engine.text import Tokenizer

Row = Mapping[str, Any]


def question_row(
    question: Question,
    problem: ProblemRow,
    contexts: Mapping[str, str],
    correct: Sequence[bool],
    planned: int,
    read: Sequence[ReadNode],
    outcomes: Sequence[Outcome],
    spent: Spent,
    source: Mapping[str, Any],
    tokenizer: Tokenizer,
    completions: int,
) -> dict[str, Any]:
    """A line of questions.jsonl: all that was found out about one question. planned: nodes before the budget."""
    return {
        "index": question.index,
        "prompt": problem.prompt,
        "answer": problem.answer,
        "contexts": dict(contexts),
        "source": dict(source),
        "rollouts": [
            {
                "token_ids": list(rollout.token_ids),
                "pieces": tokenizer.pieces(rollout.token_ids),
                "status": rollout.status,
                "correct": right,
            }
            for rollout, right in zip(question.rollouts, correct, strict=True)
        ],
        "planned_nodes": planned,
        "nodes": [
            {
                "rollout": node.rollout,
                "position": node.position,
                "sampled": node.candidates.index(question.rollouts[node.rollout].token_ids[node.position]),
                "candidates": list(node.candidates),
                "texts": [tokenizer.token_text(token) for token in node.candidates],
                # null: no probability at all, which JSON has no number for
                "logprob": {
                    name: [value if math.isfinite(value) else None for value in values]
                    for name, values in of.logprob.items()
                },
                "completions": completions,
                "successes": [list(half) for half in outcome.successes],
                "truncated": list(outcome.truncated),
            }
            for of, outcome in zip(read, outcomes, strict=True)
            for node in (of.node,)
        ],
        "spent": dataclasses.asdict(spent),
    }


def node_rows(row: Row, losses: Sequence[Loss], beta: float, alpha: float) -> list[dict[str, Any]]:
    """The lines of nodes.jsonl of one question's line. The first reader is the student; the others are teachers."""
    return [_node_row(row, node, losses, beta, alpha) for node in row["nodes"]]


def _node_row(row: Row, node: Row, losses: Sequence[Loss], beta: float, alpha: float) -> dict[str, Any]:
    (_, log_p), *teachers = (
        (name, np.array([-math.inf if value is None else value for value in values]))
        for name, values in node["logprob"].items()
    )
    mass = float(np.exp(log_p).sum())
    log_p_C = renormalised(log_p)
    log_q = {name: renormalised(values) for name, values in teachers}
    rollout = row["rollouts"][node["rollout"]]
    return {
        "index": row["index"],
        "rollout": node["rollout"],
        "position": node["position"],
        "window": window_of(node["position"]),
        "correct": rollout["correct"],
        "solved": sum(other["correct"] for other in row["rollouts"]) / len(row["rollouts"]),
        "text": rollout["pieces"][node["position"]],
        "candidates": node["candidates"],
        "texts": node["texts"],
        "sampled": node["sampled"],
        "mass": mass,
        "p": np.exp(log_p_C).tolist(),
        "q": {name: np.exp(values).tolist() for name, values in log_q.items()},
        **_measured(log_p_C, log_q, node, losses, beta, alpha),
    }


def _measured(
    log_p_C: Floats, log_q: Mapping[str, Floats], node: Row, losses: Sequence[Loss], beta: float, alpha: float
) -> dict[str, Any]:
    """What the completions tell; with one candidate there are none, and what does not depend on them is 0."""
    count = len(log_p_C)
    if count == 1:
        forced = {name: dict.fromkeys(losses, "forced") for name in log_q}
        nothing = {"success": None, "value": None, "ideal": [0.0], "variance": [0.0], "agreement": 0.0}
        return {**nothing, "truncated": 0.0, "advantage": dict.fromkeys(log_q, 0.0), "alignment": forced}
    half = node["completions"] // 2
    first_C, second_C = (np.array(half_of, dtype=np.float64) / half for half_of in node["successes"])
    success_C = (first_C + second_C) / 2.0
    return {
        "success": success_C.tolist(),
        "value": float(np.exp(log_p_C) @ success_C),
        "ideal": ideal_gradient(log_p_C, success_C).tolist(),
        "variance": gradient_variance(log_p_C, success_C, node["completions"]).tolist(),
        "agreement": half_agreement(log_p_C, first_C, second_C),
        "truncated": sum(node["truncated"]) / (node["completions"] * count),
        "advantage": {name: teacher_advantage(log_p_C, values, success_C) for name, values in log_q.items()},
        "alignment": {
            name: {
                loss: align(loss, log_p_C, values, success_C, sampled=node["sampled"], beta=beta, alpha=alpha)
                for loss in losses
            }
            for name, values in log_q.items()
        },
    }
