"""What the tables of a diagnosis say, in sentences: which teacher, loss and context for which questions, how surely."""

from __future__ import annotations

import math

from genssd.distill.diagnose.tables import Cell, Diagnosis, Group

FEW_QUESTIONS = 10
"""A percentile bootstrap over fewer questions is too narrow to rely on."""
SURE = 0.95
"""Share of the bootstrap's draws from which on a pair is called best."""


def verdict(diagnosis: Diagnosis) -> list[str]:
    """Sentences in the order in which they matter."""
    said = [_coverage(diagnosis)]
    said += [_group(group) for group in diagnosis.distinct_groups]
    hurting = _hurting(diagnosis.groups[0], diagnosis)
    if hurting:
        said.append(hurting)
    return [*said, *_cautions(diagnosis)]


def _coverage(d: Diagnosis) -> str:
    group = d.groups[0]
    told = group.nodes - group.forced - group.flat
    text = (
        f"The student gets {_share(d.correct_rollouts, d.rollouts)} of its rollouts right. At {told} of {group.nodes} "
        f"nodes the choice of a token was seen to change what comes of it. At {group.forced} there is only one token "
        f"to choose, at {group.flat} all tokens succeed equally often: no alignment is defined there."
    )
    return text if told else f"{text} Nothing can be said about any teacher or loss."


def _group(group: Group) -> str:
    name = group.name[0].upper() + group.name[1:]
    lead = group.lead
    if lead is None:
        return f"{name}: no verdict. None of {group.nodes} nodes has an alignment."
    best = lead.best
    if group.questions < FEW_QUESTIONS:
        return (
            f"{name}: no verdict on {best.nodes} nodes of {_count(group.questions, 'question')}, fewer than "
            f"{FEW_QUESTIONS}; {_name(best)} has the largest mean, {best.alignment.value:+.2f}."
        )
    text = f"{name}: {_name(best)}, alignment {best.alignment}: {_effect(best)}"
    if math.isfinite(best.corrected.value):
        text += f" (without the sampling noise {best.corrected})"
    text += f". It is in front in {best.ahead:.0%} of the bootstrap's draws"
    if lead.other is None or lead.difference is None:
        text += "; there is no other teacher to compare it with"
    elif lead.difference.low > 0.0:
        text += f", ahead of {_name(lead.other)} by {lead.difference}"
    else:
        text += f", not told apart from {_name(lead.other)} (difference {lead.difference})"
    if lead.other_loss is not None and lead.loss_difference is not None:
        apart = "does worse by" if lead.loss_difference.low > 0.0 else "cannot be told apart: difference"
        text += f"; its next loss, {lead.other_loss.loss}, {apart} {lead.loss_difference}"
    return f"{text}. {best.nodes} nodes of {group.questions} questions."


def _effect(cell: Cell) -> str:
    if cell.alignment.low > 0.0:
        return "its step points towards success"
    if cell.alignment.high < 0.0:
        return "even this one, the best, points away from success"
    return "no effect that can be told from none"


def _hurting(group: Group, d: Diagnosis) -> str | None:
    """What lowers success over all nodes, teacher by teacher."""
    if group.questions < FEW_QUESTIONS:
        return None
    said = []
    for teacher in d.teachers:
        cells = [cell for cell in group.cells if cell.teacher == teacher and cell.alignment.high < 0.0]
        if cells:
            losses = "any loss" if len(cells) == len(d.losses) else ", ".join(cell.loss for cell in cells)
            said.append(f"{teacher} with {losses} (worst {cells[-1].loss}, {cells[-1].alignment})")
    return f"Pulls away from success over all nodes: {'; '.join(said)}." if said else None


def _cautions(d: Diagnosis) -> list[str]:
    said = []
    group, costs = d.groups[0], d.costs
    if group.lead is not None and group.questions >= FEW_QUESTIONS and group.lead.best.ahead < SURE:
        said.append(
            f"The best of {len(group.cells)} pairs looks better than it is, being picked for its value; below "
            f"{SURE:.0%} of the draws take it as a candidate, not as a winner."
        )
    noisy = group.reliability < 0.5
    if math.isfinite(group.reliability):
        said.append(
            f"Gradients from the two halves of the completions agree by {group.reliability:+.2f} (cosine). "
            + ("Single nodes say little then, only means do; more completions sharpen them." if noisy else "")
        )
    if costs.truncated or d.truncated_rollouts:
        said.append(
            f"Cut off at max_tokens, and counted as failed: {_share(costs.truncated, costs.completions)} of the "
            f"completions, {_share(d.truncated_rollouts, d.rollouts)} of the rollouts."
        )
    if costs.nodes < costs.planned_nodes:
        said.append(f"The budget held {costs.nodes} of {costs.planned_nodes} planned nodes.")
    for teacher, reasons in group.undefined.items():
        for reason, count in reasons.items():
            what = "says what the student says" if reason == "same" else "gives a candidate no probability"
            said.append(f"{teacher} {what} at {_count(count, 'node')} that could say more.")
    return [text.strip() for text in said]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _name(cell: Cell) -> str:
    return f"{cell.teacher} with {cell.loss}"


def _share(part: int, whole: int) -> str:
    if not whole:
        return "none"
    share = part / whole
    if 0.0 < share < 0.001:
        return "less than 0.1%"
    return f"{share:.0%}" if 0.01 <= share <= 0.99 or part in (0, whole) else f"{share:.1%}"
