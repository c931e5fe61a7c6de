"""`genssd reselect`: another criterion over the decisions of a finished search, without generating anything.

OUTPUT_DIR/reselected.jsonl   one line per round: what was kept, and what the criterion would have kept
OUTPUT_DIR/pairs.jsonl        siblings as preference pairs: prompt, chosen, rejected (what DPO trainers read)
OUTPUT_DIR/steps.jsonl        prompt, completions and a label for each: stepwise supervision
OUTPUT_DIR/summary.json

All of them hold the choices of the criterion that is asked for, at every recorded round, given the recorded text before
it. What the teacher would have written after another choice is not known. A row is `exact` where every earlier round of
its prompt comes out as in the run: a search by the criterion would have had these candidates. Other rows are
conditional: they hold given their text, to which a search by the criterion would not have come.

A round that the run sampled again has a line for every attempt. Whether a search by another criterion would have made
the attempt, and what it would have drawn in other ones, is not known: after a candidate that misses the run's threshold
no row of the prompt is exact. Where the run drew its choice (selection_temperature), the choices are the criterion's
best candidates, not what it might have drawn.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor

from genssd.distill.runs.engines import load_engine
from genssd.distill.runs.journal import read_json, write_jsonl
from genssd.distill.runs.record import read_record
from genssd.distill.runs.run import Run
from genssd.distill.select.decisions import Decisions, read_decisions
from genssd.distill.select.exports import make_pairs, make_steps
from genssd.distill.select.judging import JudgedRound, Judgement, judge_rounds
from genssd.distill.select.reselect_config import ReselectConfig
from genssd.engine.checkpoints.checkpoint import locate
from genssd.engine.common.errors import InputError
from genssd.engine.criteria.candidate import ActivationMeans
from genssd.engine.criteria.criterion import AnyCriterion, needs_answer, not_in_search
from genssd.engine.criteria.criterion_names import resolve
from genssd.engine.engine import Engine
from genssd.engine.texts.text import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class ReselectSummary:
    """How the criterion's choices compare with those of the run."""

    output_dir: Path
    criterion: str
    """Name of the criterion that judged."""
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
    exact_pairs: int
    """Number of pairs whose text a search by the criterion would have come to."""
    steps: int
    """Number of rows of stepwise supervision."""


def run_reselect(config: ReselectConfig) -> ReselectSummary:
    """Judge the logged candidates again and export them. Raises GenssdError on bad input."""
    selection_run = Path(config.run)
    recorded = read_selection_config(selection_run)
    run_criterion: str = recorded["criterion"]
    name = config.criterion or run_criterion
    criterion = resolve(name)
    reason = not_in_search(criterion)
    if reason is not None:
        raise InputError(f"{name} cannot judge chunks: {reason}")
    student = config.student or recorded["student"]

    tokenizer = Tokenizer(locate(student))
    results = _Results(name, criterion, recorded["chunk"]["shortest"], is_own=name == run_criterion)
    with Run.open(config, "reselect", parts="summary.json") as run:

        @cache
        def engine() -> Engine:
            return run.use(load_engine(config, student=student))

        def local_logprob(*arguments: Any) -> list[Tensor]:  # few criteria run the model: it is loaded when one does
            return engine().local_logprob(*arguments)

        def activations(*arguments: Any) -> ActivationMeans:
            return engine().mean_activations(*arguments)

        for decisions in read_decisions(selection_run, tokenizer, local_logprob, activations):
            results.add(decisions, tokenizer)
        run.record()
        write_jsonl(run.path("reselected.jsonl"), results.rows)
        write_jsonl(run.path("pairs.jsonl"), results.pairs)
        write_jsonl(run.path("steps.jsonl"), results.steps)
        summary = results.summary(run.output_dir)
        described = {**dataclasses.asdict(summary), "run": config.run, "run_criterion": run_criterion}
        described["largest_change"] = summary.largest_change if math.isfinite(summary.largest_change) else None
        run.write_summary({**described, "output_dir": config.output_dir})
    return summary


def read_selection_config(run: Path) -> dict[str, Any]:
    """Return the config of a `genssd select` run, by its output directory. Raises InputError if it is incomplete."""
    path = run / "run.json"
    if read_json(path).get("command") != "select":
        raise InputError(f"{run} is no output directory of `genssd select`")
    config: dict[str, Any] = read_record(path)["config"]
    for name, kind in (("criterion", str), ("student", str), ("chunk", dict)):
        if not isinstance(config.get(name), kind):
            raise InputError(f"{path} is damaged: its config has no {name}; restore the file")
    if not isinstance(config["chunk"].get("shortest"), int):
        raise InputError(f"{run} was written by another version of genssd: its run.json has no chunk.shortest")
    return config


class _Results:
    """What is written of all rounds: comparisons, preference pairs, stepwise rows.

    shortest: number of tokens of the shortest chunk that is judged by itself. is_own: whether the criterion is that of
    the run.
    """

    def __init__(self, name: str, criterion: AnyCriterion, shortest: int, *, is_own: bool) -> None:
        self.rows: list[dict[str, Any]] = []
        self.pairs: list[dict[str, Any]] = []
        self.steps: list[dict[str, Any]] = []
        self._name = name
        self._criterion = criterion
        self._shortest = shortest
        self._is_own = is_own
        self._changes: list[float] = []

    def add(self, decisions: Decisions, tokenizer: Tokenizer) -> None:
        """Judge the rounds of one prompt. Raises InputError when the criterion reads an answer that is not known."""
        if needs_answer(self._criterion) and decisions.selection["answer"] is None:
            source = decisions.selection["source"]
            raise InputError(
                f"{source['file']}, line {source['line']}: no reference answer, which the criterion {self._name} reads"
            )
        rounds: list[JudgedRound] = []
        for judgement in judge_rounds(decisions, self._criterion, shortest=self._shortest, is_own=self._is_own):
            decided = judgement.judged.decided
            pairs = zip(decided, judgement.values, strict=True)
            self._changes += [abs(d.score - value) for d, value in pairs if d.score is not None]
            self.rows.append(_describe(decisions, judgement))
            rounds.append(judgement.judged)
        labels = {"index": decisions.selection["index"], "criterion": self._name}
        self.pairs += make_pairs(decisions.selection, rounds, labels, tokenizer)
        self.steps += make_steps(decisions.selection, rounds, labels, tokenizer)

    def summary(self, output_dir: Path) -> ReselectSummary:
        """Return the counts."""
        return ReselectSummary(
            output_dir=output_dir,
            criterion=self._name,
            prompts=len({row["index"] for row in self.rows}),
            rounds=len(self.rows),
            contested=sum(row["contested"] for row in self.rows),
            differing=sum(not row["agrees"] for row in self.rows),
            prompts_differing=len({row["index"] for row in self.rows if not row["agrees"]}),
            largest_change=max(self._changes, default=0.0) if self._is_own else math.nan,
            pairs=len(self.pairs),
            exact_pairs=sum(pair["exact"] for pair in self.pairs),
            steps=len(self.steps),
        )


def _describe(decisions: Decisions, judgement: Judgement) -> dict[str, Any]:
    """Return how the criterion judges one attempt at a round, with as many candidates kept as in the run."""
    judged = judgement.judged
    record = judged.logged.record
    return {
        "index": decisions.selection["index"],
        "round": record.round,
        "attempt": record.attempt,
        "decision": record.decision,
        "kept": [list(trace) for trace in judgement.kept],
        "reselected": [list(trace) for trace in judgement.preferred],
        "agrees": judgement.agrees,
        "contested": judgement.is_contested,
        "exact": judged.is_exact,
        "scores": [
            {"trace": list(d.trace), "score": _json(s)} for d, s in zip(judged.decided, judgement.values, strict=True)
        ],
    }


def _json(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
