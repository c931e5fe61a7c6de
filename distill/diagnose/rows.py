"""Lines that a diagnosis writes: of questions.jsonl, one per question, and of nodes.jsonl, one per node."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from genssd.distill.data.problems import ProblemRow
from genssd.distill.diagnose.alignment import (
    Floats,
    LossName,
    ideal_gradient,
    measure_alignment,
    renormalise,
    teacher_advantage,
)
from genssd.distill.diagnose.forcing import NodeReading, Outcome, Question, QuestionCost
from genssd.distill.diagnose.placement import find_window
from genssd.distill.diagnose.reliability import gradient_variance, half_agreement
from genssd.engine.texts.text import Tokenizer

Row = Mapping[str, Any]
"""A line of questions.jsonl or nodes.jsonl."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QuestionSource:
    """The row of the data that a question comes from."""

    file: str
    problem: ProblemRow
    contexts: Mapping[str, str]
    """Texts of the row's contexts, by field."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """Measurements of one question. readings and outcomes have one element per node within the budget."""

    correct: Sequence[bool]
    """Whether each rollout is correct."""
    undecided: Sequence[str | None]
    """Why each rollout could not be judged; None where it was."""
    planned_nodes: int
    """Number of nodes before the budget is applied."""
    readings: Sequence[NodeReading]
    outcomes: Sequence[Outcome]
    completions: int
    """Number of completions per candidate."""
    cost: QuestionCost


def make_question_row(
    question: Question, source: QuestionSource, findings: Findings, tokenizer: Tokenizer
) -> dict[str, Any]:
    """Return the line of questions.jsonl of one question. tokenizer: the student's."""
    return {
        "index": question.index,
        "prompt": source.problem.prompt,
        "student_prompt_ids": list(question.prompt_ids),
        "answer": source.problem.answer,
        "contexts": dict(source.contexts),
        "source": {"file": source.file, "line": source.problem.line},
        "rollouts": [
            {
                "token_ids": list(rollout.token_ids),
                "pieces": tokenizer.pieces(rollout.token_ids),
                "status": rollout.status,
                "correct": is_correct,
                "undecided": undecided,
            }
            for rollout, is_correct, undecided in zip(
                question.rollouts, findings.correct, findings.undecided, strict=True
            )
        ],
        "planned_nodes": findings.planned_nodes,
        "nodes": [
            _describe_node(question, reading, outcome, tokenizer, findings.completions)
            for reading, outcome in zip(findings.readings, findings.outcomes, strict=True)
        ],
        "spent": dataclasses.asdict(findings.cost),
    }


def _describe_node(
    question: Question, reading: NodeReading, outcome: Outcome, tokenizer: Tokenizer, completions: int
) -> dict[str, Any]:
    node = reading.node
    return {
        "rollout": node.rollout,
        "position": node.position,
        "sampled": node.candidates.index(question.rollouts[node.rollout].token_ids[node.position]),
        "candidates": list(node.candidates),
        "texts": [tokenizer.token_text(token) for token in node.candidates],
        # null is log 0, for which JSON has no number
        "logprob": {
            name: [value if math.isfinite(value) else None for value in values]
            for name, values in reading.logprob.items()
        },
        "completions": completions,
        "successes": [list(half) for half in outcome.successes],
        "truncated": list(outcome.truncated),
        "undecided": outcome.undecided,
    }


def make_node_rows(row: Row, losses: Sequence[LossName], beta: float, alpha: float) -> list[dict[str, Any]]:
    """Return the lines of nodes.jsonl of one line of questions.jsonl.

    The first reader of the line is the student, the others count as teachers. beta, alpha: see `weighted_terms`.
    """
    return [_make_node_row(row, node, losses, beta, alpha) for node in row["nodes"]]


def _make_node_row(row: Row, node: Row, losses: Sequence[LossName], beta: float, alpha: float) -> dict[str, Any]:
    (_, log_p), *teachers = (
        (name, np.array([-math.inf if value is None else value for value in values]))
        for name, values in node["logprob"].items()
    )
    mass = float(np.exp(log_p).sum())
    log_p_C = renormalise(log_p)
    log_q = {name: renormalise(values) for name, values in teachers}
    rollout = row["rollouts"][node["rollout"]]
    return {
        "index": row["index"],
        "rollout": node["rollout"],
        "position": node["position"],
        "window": find_window(node["position"]),
        "correct": rollout["correct"],
        "solved": sum(other["correct"] for other in row["rollouts"]) / len(row["rollouts"]),
        "text": rollout["pieces"][node["position"]],
        "candidates": node["candidates"],
        "texts": node["texts"],
        "sampled": node["sampled"],
        "mass": mass,
        "p": np.exp(log_p_C).tolist(),
        "q": {name: np.exp(values).tolist() for name, values in log_q.items()},
        **_measure_node(log_p_C, log_q, node, losses, beta, alpha),
    }


def _measure_node(
    log_p_C: Floats, log_q: Mapping[str, Floats], node: Row, losses: Sequence[LossName], beta: float, alpha: float
) -> dict[str, Any]:
    """Return the fields that follow from the completions.

    With one candidate there are no completions: gradient, variance, agreement and advantage are 0 then.
    """
    count = len(log_p_C)
    if count == 1:
        alignment = {name: dict.fromkeys(losses, "forced") for name in log_q}
        constants = {"success": None, "value": None, "ideal": [0.0], "variance": [0.0], "agreement": 0.0}
        return {**constants, "truncated": 0.0, "advantage": dict.fromkeys(log_q, 0.0), "alignment": alignment}
    half = node["completions"] // 2
    first_C, second_C = (np.array(successes, dtype=np.float64) / half for successes in node["successes"])
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
                loss: measure_alignment(
                    loss, log_p_C, values, success_C, sampled_index=node["sampled"], beta=beta, alpha=alpha
                )
                for loss in losses
            }
            for name, values in log_q.items()
        },
    }
