"""The verdict of a diagnosis in sentences: which teacher, loss and context suit which questions, how certainly."""

from __future__ import annotations

import math

from genssd.distill.diagnose.diagnosis import Cell, Diagnosis, Group
from genssd.engine.common.amounts import format_count

MIN_QUESTIONS = 10
"""Number of questions that a verdict needs: a percentile bootstrap over fewer is too narrow to rely on."""
WINNING_FRACTION = 0.95
"""Fraction of the bootstrap's draws in which a pair must be ahead to be called the best."""


def write_verdict(diagnosis: Diagnosis) -> list[str]:
    """Return the verdict's sentences, the most important first."""
    sentences = [_describe_coverage(diagnosis)]
    sentences += [_judge_group(group) for group in diagnosis.distinct_groups]
    harm = _describe_harm(diagnosis.groups[0], diagnosis)
    if harm:
        sentences.append(harm)
    return [*sentences, *_list_cautions(diagnosis)]


def _describe_coverage(d: Diagnosis) -> str:
    group = d.groups[0]
    informative = group.nodes - group.forced - group.flat
    right = _format_fraction(d.correct_rollouts, d.rollouts)
    text = (
        f"The student gets {right} of its rollouts right. At {informative} of "
        f"{format_count(group.nodes, 'node')} the choice of a token was seen to change what comes of it. "
        f"At {group.forced} there is only one token "
        f"to choose, at {group.flat} all tokens succeed equally often: no alignment is defined there."
    )
    return text if informative else f"{text} Nothing can be said about any teacher or loss."


def _judge_group(group: Group) -> str:
    """Return the sentence on one group: its best pair, and how certainly that beats the next ones."""
    name = group.name[0].upper() + group.name[1:]
    lead = group.lead
    if lead is None:
        return f"{name}: no verdict. None of {format_count(group.nodes, 'node')} has an alignment."
    best = lead.best
    if group.questions < MIN_QUESTIONS:
        return (
            f"{name}: no verdict on {format_count(best.nodes, 'node')} of "
            f"{format_count(group.questions, 'question')}, fewer than "
            f"{MIN_QUESTIONS}; {_name_pair(best)} has the largest mean, {best.alignment.value:+.2f}."
        )
    text = f"{name}: {_name_pair(best)}, alignment {best.alignment}: {_describe_effect(best)}"
    if math.isfinite(best.corrected.value):
        text += f" (without the sampling noise {best.corrected})"
    text += f". It is in front in {best.ahead:.0%} of the bootstrap's draws"
    if lead.other is None or lead.difference is None:
        text += "; there is no other teacher to compare it with"
    elif lead.difference.low > 0.0:
        text += f", ahead of {_name_pair(lead.other)} by {lead.difference}"
    else:
        text += f", not told apart from {_name_pair(lead.other)} (difference {lead.difference})"
    if lead.other_loss is not None and lead.loss_difference is not None:
        comparison = "does worse by" if lead.loss_difference.low > 0.0 else "cannot be told apart: difference"
        text += f"; its next loss, {lead.other_loss.loss}, {comparison} {lead.loss_difference}"
    return f"{text}. {format_count(best.nodes, 'node')} of {format_count(group.questions, 'question')}."


def _describe_effect(cell: Cell) -> str:
    if cell.alignment.low > 0.0:
        return "its step points towards success"
    if cell.alignment.high < 0.0:
        return "even this one, the best, points away from success"
    return "no effect that can be told from none"


def _describe_harm(group: Group, d: Diagnosis) -> str | None:
    """Return the sentence on the pairs that point away from success in a group; None without such a pair."""
    if group.questions < MIN_QUESTIONS:
        return None
    harmful = []
    for teacher in d.teachers:
        cells = [cell for cell in group.cells if cell.teacher == teacher and cell.alignment.high < 0.0]
        if cells:
            losses = "any loss" if len(cells) == len(d.losses) else ", ".join(cell.loss for cell in cells)
            harmful.append(f"{teacher} with {losses} (worst {cells[-1].loss}, {cells[-1].alignment})")
    return f"Pulls away from success over all nodes: {'; '.join(harmful)}." if harmful else None


def _list_cautions(d: Diagnosis) -> list[str]:
    """Return the sentences on noise, cut-off responses, the budget, and nodes without an alignment."""
    cautions = []
    group, costs = d.groups[0], d.costs
    if group.lead is not None and group.questions >= MIN_QUESTIONS and group.lead.best.ahead < WINNING_FRACTION:
        cautions.append(
            f"The best of {format_count(len(group.cells), 'pair')} looks better than it is, being picked for its "
            "value; below "
            f"{WINNING_FRACTION:.0%} of the draws take it as a candidate, not as a winner."
        )
    is_noisy = group.reliability < 0.5
    if math.isfinite(group.reliability):
        cautions.append(
            f"Gradients from the two halves of the completions agree by {group.reliability:+.2f} (cosine). "
            + ("Single nodes say little then, only means do; more completions sharpen them." if is_noisy else "")
        )
    if costs.truncated or d.truncated_rollouts:
        completions = _format_fraction(costs.truncated, costs.completions)
        rollouts = _format_fraction(d.truncated_rollouts, d.rollouts)
        cautions.append(
            f"Cut off at max_tokens, and counted as failed: {completions} of the completions, {rollouts} of the "
            "rollouts."
        )
    if costs.nodes < costs.planned_nodes:
        cautions.append(f"The budget held {costs.nodes} of {format_count(costs.planned_nodes, 'planned node')}.")
    for teacher, reasons in group.undefined.items():
        for reason, count in reasons.items():
            predicate = "says what the student says" if reason == "same" else "gives a candidate no probability"
            cautions.append(f"{teacher} {predicate} at {format_count(count, 'node')} that could say more.")
    return [text.strip() for text in cautions]


def _name_pair(cell: Cell) -> str:
    return f"{cell.teacher} with {cell.loss}"


def _format_fraction(part: int, total: int) -> str:
    """Return part / total in percent, with a decimal close to 0 and 1; "none" if total is 0."""
    if not total:
        return "none"
    fraction = part / total
    if 0.0 < fraction < 0.001:
        return "less than 0.1%"
    return f"{fraction:.0%}" if 0.01 <= fraction <= 0.99 or part in (0, total) else f"{fraction:.1%}"
