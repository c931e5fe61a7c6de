"""`genssd reselect`: another criterion over the decisions of a finished search, without generating anything.

OUTPUT_DIR/reselected.jsonl   one line per round: what was kept, and what the criterion would have kept
OUTPUT_DIR/pairs.jsonl        siblings as preference pairs: prompt, chosen, rejected (what DPO trainers read)
OUTPUT_DIR/steps.jsonl        prompt, completions and a label for each: stepwise supervision
OUTPUT_DIR/summary.json

What the teacher would have written after another choice is not known: a round's answer holds for that round, behind
the path that was taken.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor

from genssd.distill.runs.directory import claim
from genssd.distill.runs.engine_options import EngineOptions
from genssd.distill.runs.journal import read_json, write_json, write_jsonl
from genssd.distill.select.decisions import Decisions, LoggedCandidate, read_decisions
from genssd.engine.candidate import AnyCriterion, PoolCriterion, evaluate_distinct, needs_answer
from genssd.engine.checkpoint import locate
from genssd.engine.criterion_names import resolve
from genssd.engine.engine import Engine
from genssd.engine.errors import InputError
from genssd.engine.text import Tokenizer

NEVER = ("duplicate", "loop")
"""Verdicts that no criterion changes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReselectConfig(EngineOptions):
    """Judge the candidates of a finished `genssd select` again, and export them."""

    run: str
    """The output directory of `genssd select`."""
    criterion: str = "ppl"
    """The criterion that judges now."""
    student: str | None = None
    """Hub id or directory of the run's student; None: as the run recorded it."""
    output_dir: str = "runs/reselect"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReselectSummary:
    """How the criterion's choices compare with those of the run. differing: rounds in which another set wins."""

    output_dir: Path
    prompts: int
    rounds: int
    contested: int
    """Rounds with more acceptable candidates than places."""
    differing: int
    prompts_differing: int
    largest_change: float
    """Of a candidate's value against the logged one, where the criterion is the run's own; else NaN."""
    pairs: int


def run_reselect(config: ReselectConfig) -> ReselectSummary:
    """Judge again and export. Raises GenssdError on bad input."""
    criterion = resolve(config.criterion)
    if isinstance(criterion, PoolCriterion) and criterion.pool == "data":
        raise InputError(f"{config.criterion} is fitted over all of the data; a round has only its candidates")
    run = Path(config.run)
    recorded = read_json(run / "run.json")
    if recorded.get("command") != "select":
        raise InputError(f"{run} is no output directory of `genssd select`")
    student = config.student or recorded["config"]["student"]
    if "shortest" not in recorded["config"]["chunk"]:
        raise InputError(f"{run} was written by another version of genssd: its run.json has no chunk.shortest")
    shortest = recorded["config"]["chunk"]["shortest"]

    @cache
    def engine() -> Engine:
        return config.load(student=student)

    def local_logprob(*arguments: Any) -> list[Tensor]:  # few criteria run the model: it is loaded when one does
        return engine().local_logprob(*arguments)

    tokenizer = Tokenizer(locate(student))
    rows: list[dict[str, Any]] = []
    pairs: list[dict[str, Any]] = []
    steps: list[dict[str, Any]] = []
    changes: list[float] = []
    with claim(Path(config.output_dir), "reselect"):
        for decisions in read_decisions(run, tokenizer, local_logprob):
            if needs_answer(criterion) and decisions.selection["answer"] is None:
                source = decisions.selection["source"]
                where = f"{source['file']}, line {source['line']}"
                raise InputError(f"{where}: no reference answer, which the criterion {config.criterion} reads")
            for number, decided in enumerate(decisions.rounds):
                scores = evaluate_distinct(criterion, [d.candidate.lengthened(shortest) for d in decided])
                rows.append(_round_row(decisions, number, decided, scores, criterion))
                changes += [abs(d.score - s) for d, s in zip(decided, scores, strict=True) if d.score is not None]
                pairs += _pairs(decisions, decided, tokenizer)
            steps += _steps(decisions, tokenizer)
        own = recorded["config"]["criterion"] == config.criterion
        summary = ReselectSummary(
            output_dir=Path(config.output_dir),
            prompts=len({row["index"] for row in rows}),
            rounds=len(rows),
            contested=sum(row["contested"] for row in rows),
            differing=sum(not row["agrees"] for row in rows),
            prompts_differing=len({row["index"] for row in rows if not row["agrees"]}),
            largest_change=max(changes, default=0.0) if own else math.nan,
            pairs=len(pairs),
        )
        write_jsonl(summary.output_dir / "reselected.jsonl", rows)
        write_jsonl(summary.output_dir / "pairs.jsonl", pairs)
        write_jsonl(summary.output_dir / "steps.jsonl", steps)
        described = {**dataclasses.asdict(summary), "run": config.run, "criterion": config.criterion}
        described["largest_change"] = max(changes, default=0.0) if own else None
        write_json(summary.output_dir / "summary.json", {**described, "output_dir": config.output_dir})
    return summary


def _round_row(
    decisions: Decisions,
    number: int,
    decided: Sequence[LoggedCandidate],
    scores: Sequence[float],
    criterion: AnyCriterion,
) -> dict[str, Any]:
    """Of the candidates that may compete, as many as were kept; of equal ones the first."""
    sign = -1.0 if criterion.higher_is_better() else 1.0
    able = [i for i, d in enumerate(decided) if d.verdict not in NEVER]
    kept = [i for i, d in enumerate(decided) if d.verdict == "kept"]
    again = sorted(able, key=lambda i: sign * scores[i])[: len(kept)]
    return {
        "index": decisions.selection["index"],
        "round": number,
        "kept": [list(decided[i].trace) for i in kept],
        "reselected": [list(decided[i].trace) for i in again],
        "agrees": set(kept) == set(again),
        "contested": len(able) > len(kept),
        "scores": [{"trace": list(d.trace), "score": _json(s)} for d, s in zip(decided, scores, strict=True)],
    }


def _json(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def _pairs(decisions: Decisions, decided: Sequence[LoggedCandidate], tokenizer: Tokenizer) -> Iterator[dict[str, Any]]:
    """The kept candidate of a branch against the one of its siblings that the run ranked last."""
    for d in decided:
        if d.verdict != "kept" or d.score is None:
            continue
        siblings = [
            o for o in decided if o.trace[:-1] == d.trace[:-1] and o.verdict == "beaten" and o.score is not None
        ]
        if siblings:
            last = max(siblings, key=lambda o: abs(float(o.score or 0.0) - float(d.score or 0.0)))
            yield {
                "prompt": _before(decisions.selection, d, tokenizer),
                "chosen": tokenizer.decode(d.candidate.token_ids),
                "rejected": tokenizer.decode(last.candidate.token_ids),
                "student_prompt_ids": [*decisions.selection["student_prompt_ids"], *d.candidate.history_ids],
                "teacher_prompt_ids": [*decisions.selection["prompt_ids"], *d.candidate.history_ids],
                "chosen_token_ids": list(d.candidate.token_ids),
                "rejected_token_ids": list(last.candidate.token_ids),
                "tokenizer": decisions.selection["tokenizer"],
                "chosen_score": d.score,
                "rejected_score": last.score,
                "index": decisions.selection["index"],
                "round": len(d.trace) - 1,
            }


def _steps(decisions: Decisions, tokenizer: Tokenizer) -> Iterator[dict[str, Any]]:
    """Every chain of kept chunks up to a dropped one: the chunks are right, the last one of a dropped chain is not."""
    by_trace = {d.trace: d for decided in decisions.rounds for d in decided}
    prompt = str(tokenizer.hf.decode(list(decisions.selection["student_prompt_ids"])))
    for trace, d in by_trace.items():
        ended = d.verdict == "kept" and d.candidate.final
        if ended or d.verdict == "beaten":
            chain = [by_trace[trace[:depth]] for depth in range(1, len(trace) + 1)]
            yield {
                "prompt": prompt,
                "completions": [tokenizer.decode(link.candidate.token_ids) for link in chain],
                "labels": [link.verdict == "kept" for link in chain],
                "index": decisions.selection["index"],
            }


def _before(selection: Mapping[str, Any], d: LoggedCandidate, tokenizer: Tokenizer) -> str:
    """The text in front of a candidate: the prompt as the student reads it, and the response so far."""
    prompt = str(tokenizer.hf.decode(list(selection["student_prompt_ids"])))
    return prompt + tokenizer.decode(d.candidate.history_ids)
