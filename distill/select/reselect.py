"""`genssd reselect`: another criterion over the decisions of a finished search, without generating anything.

OUTPUT_DIR/reselected.jsonl   one line per round: what was kept, and what the criterion would have kept
OUTPUT_DIR/pairs.jsonl        siblings as preference pairs: prompt, chosen, rejected (what DPO trainers read)
OUTPUT_DIR/steps.jsonl        prompt, completions and a label for each: stepwise supervision
OUTPUT_DIR/summary.json

What the teacher would have written after another choice is not known: a round's result holds for that round alone,
after the path that was taken.
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

from genssd.distill.runs.engine_options import EngineOptions
from genssd.distill.runs.journal import read_json, write_jsonl
from genssd.distill.runs.run import Run
from genssd.distill.runs.settings import FileName, ModelPath, Operational
from genssd.distill.select.decisions import Decisions, LoggedCandidate, read_decisions
from genssd.engine.candidate import AnyCriterion, PoolCriterion, evaluate_distinct, needs_answer
from genssd.engine.checkpoint import locate
from genssd.engine.criterion_names import resolve
from genssd.engine.engine import Engine
from genssd.engine.errors import InputError
from genssd.engine.text import Tokenizer

FIXED_VERDICTS = ("duplicate", "loop")
"""Verdicts that no criterion changes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReselectConfig(EngineOptions):
    """Judge the candidates of a finished `genssd select` again, and export them."""

    run: FileName[str]
    """Output directory of the finished `genssd select`."""
    criterion: str = "ppl"
    """Name of the criterion that judges the candidates now."""
    student: ModelPath[str | None] = None
    """Hub id or local directory of the run's student. None: as the run recorded it."""
    output_dir: Operational[FileName[str]] = "runs/reselect"
    """Directory that the results are written to; earlier results there are replaced."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReselectSummary:
    """How the criterion's choices compare with those of the run."""

    output_dir: Path
    prompts: int
    rounds: int
    contested: int
    """Number of rounds with more acceptable candidates than places."""
    differing: int
    """Number of rounds in which another set of candidates wins."""
    prompts_differing: int
    largest_change: float
    """Largest difference of a candidate's value from the logged one, where the criterion is the run's own; else NaN."""
    pairs: int


def run_reselect(config: ReselectConfig) -> ReselectSummary:
    """Judge the logged candidates again and export them. Raises GenssdError on bad input."""
    criterion = resolve(config.criterion)
    if isinstance(criterion, PoolCriterion) and criterion.pool == "data":
        raise InputError(f"{config.criterion} is fitted over all of the data; a round has only its candidates")
    selection_run = Path(config.run)
    recorded = read_json(selection_run / "run.json")
    if recorded.get("command") != "select":
        raise InputError(f"{selection_run} is no output directory of `genssd select`")
    if "shortest" not in recorded["config"]["chunk"]:
        raise InputError(
            f"{selection_run} was written by another version of genssd: its run.json has no chunk.shortest"
        )
    student = config.student or recorded["config"]["student"]
    shortest = recorded["config"]["chunk"]["shortest"]

    tokenizer = Tokenizer(locate(student))
    results = _Results()
    with Run.open(config, "reselect") as run:

        @cache
        def engine() -> Engine:
            return run.use(config.load(student=student))

        def local_logprob(*arguments: Any) -> list[Tensor]:  # few criteria run the model: it is loaded when one does
            return engine().local_logprob(*arguments)

        for decisions in read_decisions(selection_run, tokenizer, local_logprob):
            results.add(decisions, config.criterion, criterion, shortest, tokenizer)
        own = recorded["config"]["criterion"] == config.criterion
        run.record()
        write_jsonl(run.path("reselected.jsonl"), results.rows)
        write_jsonl(run.path("pairs.jsonl"), results.pairs)
        write_jsonl(run.path("steps.jsonl"), results.steps)
        summary = results.summary(run.output_dir, own)
        described = {**dataclasses.asdict(summary), "run": config.run, "criterion": config.criterion}
        described["largest_change"] = summary.largest_change if own else None
        run.write_summary({**described, "output_dir": config.output_dir})
    return summary


class _Results:
    """What is written of all rounds: comparisons, preference pairs, stepwise rows."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.pairs: list[dict[str, Any]] = []
        self.steps: list[dict[str, Any]] = []
        self._changes: list[float] = []

    def add(
        self, decisions: Decisions, name: str, criterion: AnyCriterion, shortest: int, tokenizer: Tokenizer
    ) -> None:
        """Judge the rounds of one prompt. Raises InputError when the criterion reads an answer that is not known."""
        if needs_answer(criterion) and decisions.selection["answer"] is None:
            source = decisions.selection["source"]
            raise InputError(
                f"{source['file']}, line {source['line']}: no reference answer, which the criterion {name} reads"
            )
        for number, decided in enumerate(decisions.rounds):
            scores = evaluate_distinct(criterion, [d.candidate.lengthened(shortest) for d in decided])
            self.rows.append(_round_row(decisions, number, decided, scores, criterion))
            self._changes += [abs(d.score - s) for d, s in zip(decided, scores, strict=True) if d.score is not None]
            self.pairs += _pairs(decisions, decided, tokenizer)
        self.steps += _steps(decisions, tokenizer)

    def summary(self, output_dir: Path, own: bool) -> ReselectSummary:
        """Return the counts. own: whether the criterion is the run's own."""
        return ReselectSummary(
            output_dir=output_dir,
            prompts=len({row["index"] for row in self.rows}),
            rounds=len(self.rows),
            contested=sum(row["contested"] for row in self.rows),
            differing=sum(not row["agrees"] for row in self.rows),
            prompts_differing=len({row["index"] for row in self.rows if not row["agrees"]}),
            largest_change=max(self._changes, default=0.0) if own else math.nan,
            pairs=len(self.pairs),
        )


def _round_row(
    decisions: Decisions,
    number: int,
    decided: Sequence[LoggedCandidate],
    scores: Sequence[float],
    criterion: AnyCriterion,
) -> dict[str, Any]:
    """Return how the criterion judges one round, with as many candidates kept as in the run."""
    sign = -1.0 if criterion.higher_is_better() else 1.0
    eligible = [i for i, d in enumerate(decided) if d.verdict not in FIXED_VERDICTS]
    kept = [i for i, d in enumerate(decided) if d.verdict == "kept"]
    reselected = sorted(eligible, key=lambda i: sign * scores[i])[: len(kept)]
    return {
        "index": decisions.selection["index"],
        "round": number,
        "kept": [list(decided[i].trace) for i in kept],
        "reselected": [list(decided[i].trace) for i in reselected],
        "agrees": set(kept) == set(reselected),
        "contested": len(eligible) > len(kept),
        "scores": [{"trace": list(d.trace), "score": _json(s)} for d, s in zip(decided, scores, strict=True)],
    }


def _json(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def _pairs(decisions: Decisions, decided: Sequence[LoggedCandidate], tokenizer: Tokenizer) -> Iterator[dict[str, Any]]:
    """Yield pairs of a branch's kept candidate and the sibling that the run ranked last."""
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
    """Yield every chain of chunks that ends with a kept final chunk or with a beaten one, with a label for each chunk:
    True for kept chunks, False for a beaten last one."""
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
    """Return the text before a candidate: the prompt as the student reads it, and the response so far."""
    prompt = str(tokenizer.hf.decode(list(selection["student_prompt_ids"])))
    return prompt + tokenizer.decode(d.candidate.history_ids)
