"""`genssd score`: criteria over finished traces; the best response of every prompt; a ranking of their teachers.

OUTPUT_DIR/features.jsonl   journal: one line per trace with what the criteria are computed from
OUTPUT_DIR/scores.jsonl     the same with one column per criterion
OUTPUT_DIR/selected.jsonl   the best responses of every prompt under --pick.by: what training reads
OUTPUT_DIR/teachers.json    per criterion, the teachers ranked for this student, with bootstrap intervals
OUTPUT_DIR/report.html      what the criteria pick, how they relate: tables and plots
OUTPUT_DIR/bad_rows.txt     what could not be scored, by file and line
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

from genssd.distill.data.traces import Trace, journalled, source_of, training_row, usable_traces
from genssd.distill.evaluating import is_correct
from genssd.distill.runs.directory import claim, record_run
from genssd.distill.runs.engine_options import EngineOptions
from genssd.distill.runs.journal import Journal, complete_rows, is_begun, truncate, write_json, write_jsonl
from genssd.distill.score.comparison import compare
from genssd.distill.score.page import render
from genssd.distill.score.picking import Pick, lark_weights, pick
from genssd.distill.score.ranking import TeacherRank, by_prompt, column_of, rank_teachers
from genssd.engine.candidate import AnyCriterion, Candidate, PoolCriterion, RatioCriterion, needs_answer
from genssd.engine.criteria.learning_gain import Lark
from genssd.engine.criterion_names import resolve
from genssd.engine.engine import Engine
from genssd.engine.errors import InputError
from genssd.engine.loops import LoopGuard
from genssd.engine.resources import ANSWER_ROOM
from genssd.engine.steps import step_spans

BATCH_TOKENS = 16384  # of prompts and responses given to the engine at once


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreConfig(EngineOptions):
    """Score finished traces as a student sees them; pick responses and teachers by it."""

    student: str
    """Hub id or local directory of the model that scores."""
    data: tuple[str, ...]
    """JSONL files of traces: selections, generations, messages, or prompt and completion."""
    criteria: tuple[str, ...] = ("ppl",)
    """Names, with options: ppl rsr "ppl(norm='byte')" lalp lark package.module:Name "0.5*rsr+0.5*lalp"."""
    output_dir: str = "runs/score"
    resume: bool = False
    """Go on with an interrupted run."""
    limit: int | None = None
    """Take only the first rows of each file."""
    verify: bool = True
    """Check answers by math-verify where a reference answer is known and the row has no verdict."""
    pick: Pick = field(default_factory=Pick)
    """Which responses go to selected.jsonl."""

    def __post_init__(self) -> None:
        if not self.data or not self.criteria:
            raise InputError("score needs at least one data file and one criterion")
        if len(set(self.criteria)) < len(self.criteria):
            raise InputError(f"a criterion is listed twice: {', '.join(self.criteria)}")
        if self.pick.by is not None and self.pick.by not in self.criteria:
            raise InputError(f"pick.by {self.pick.by!r} is not among the criteria: {', '.join(self.criteria)}")
        if self.pick.weigh and not isinstance(resolve(self.pick.by or self.criteria[0]), Lark):
            raise InputError("pick.weigh gives the weights of lark: list it first among the criteria, or pick by it")
        judge = resolve(self.pick.by or self.criteria[0])
        relative = isinstance(judge, PoolCriterion) and judge.pool == "prompt"
        if relative and (self.pick.threshold is not None or self.pick.best_share < 1.0):
            raise InputError(
                "pick.threshold and pick.best_share compare values of different prompts, and this criterion judges "
                "the responses to one prompt against each other"
            )
        if self.limit is not None and self.limit < 1:
            raise InputError(f"limit must be at least 1, not {self.limit}")


SETTINGS_OF_THE_RESULT = ("student", "data", "criteria", "limit", "verify", "dtype")
"""What must not change between the parts of one run; picking may."""

PICKED_ALIKE = ("keep", "correct", "finished", "loops", "min_steps", "max_steps")
"""Of the options of picking, those that the report applies to every criterion."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreSummary:
    """What a run left behind."""

    output_dir: Path
    traces: int
    prompts: int
    selected: int
    bad_rows: tuple[str, ...]
    teachers: Mapping[str, tuple[TeacherRank, ...]]
    """Per criterion, best first. Empty with fewer than two teachers."""
    incomplete: int
    """Prompts left out of the ranking because a teacher has no response to them."""


def run_score(
    config: ScoreConfig, engine: Engine | None = None, report: Callable[[int, int], None] = lambda done, total: None
) -> ScoreSummary:
    """Score, pick and rank. Raises GenssdError on bad input; traces that were scored before are in the journal."""
    criteria = {name: resolve(name) for name in config.criteria}
    with claim(Path(config.output_dir), "score"):
        return _run(config, criteria, engine, report)


def _run(
    config: ScoreConfig,
    criteria: Mapping[str, AnyCriterion],
    engine: Engine | None,
    report: Callable[[int, int], None],
) -> ScoreSummary:
    output_dir = Path(config.output_dir)
    journal = output_dir / "features.jsonl"
    begun = is_begun(journal, resume=config.resume)
    engine = engine or config.load(student=config.student)
    tokenizer = engine.tokenizer("student")
    traces, bad_rows = _read(config, criteria, engine)
    settings = dataclasses.asdict(config)
    record_run(output_dir, "score", settings, SETTINGS_OF_THE_RESULT, engine.fingerprints, resumed=begun)
    ends = journalled(journal, traces)
    done = len(ends) - 1
    truncate(journal, ends[done])
    with Journal(journal) as log:
        for batch in _batches(traces[done:]):
            for row in _score_batch(engine, criteria, batch, config):
                log.append(row)
                done += 1
            report(done, len(traces))
    rows = [row for row, _ in complete_rows(journal)]
    columns = {name: column_of(criterion, name, rows) for name, criterion in criteria.items()}
    write_jsonl(output_dir / "scores.jsonl", _score_rows(rows, columns))
    name = config.pick.by or config.criteria[0]
    better = {name: criterion.higher_is_better() for name, criterion in criteria.items()}
    alike = Pick(**{name: getattr(config.pick, name) for name in PICKED_ALIKE})
    picks = {other: pick(rows, column, better[other], alike) for other, column in columns.items()}
    chosen = pick(rows, columns[name], better[name], config.pick, lambda i: tokenizer.decode(traces[i].response_ids))
    weights = lark_weights(rows, columns[name], config.pick) if config.pick.weigh else dict.fromkeys(chosen, 1.0)
    picked = (_training_row(engine, traces[i], name, columns[name][i], weights[i]) for i in chosen)
    write_jsonl(output_dir / "selected.jsonl", picked)
    ranks, incomplete = rank_teachers(rows, criteria, columns)
    write_json(
        output_dir / "teachers.json",
        {"incomplete_prompts": incomplete, **{n: [dataclasses.asdict(r) for r in of] for n, of in ranks.items()}},
    )
    contested = [
        p for p, members in by_prompt(rows).items() if sum(map(config.pick.eligible, (rows[i] for i in members))) > 1
    ]
    page = render(compare(rows, columns, better, picks, contested, chosen), rows, picks, ranks, config.student)
    (output_dir / "report.html").write_text(page, encoding="utf-8")
    (output_dir / "bad_rows.txt").write_text("".join(f"{message}\n" for message in bad_rows))
    return ScoreSummary(
        output_dir=output_dir,
        traces=len(rows),
        prompts=len({row["prompt"] for row in rows}),
        selected=len(chosen),
        bad_rows=tuple(bad_rows),
        teachers=ranks,
        incomplete=incomplete,
    )


def _read(config: ScoreConfig, criteria: Mapping[str, AnyCriterion], engine: Engine) -> tuple[list[Trace], list[str]]:
    """The traces that the criteria can judge, and what is wrong with the others."""
    tokenizer, longest = engine.tokenizer("student"), engine.max_sequence_length("student")
    reading = next((name for name, criterion in criteria.items() if needs_answer(criterion)), None)

    def unfit(trace: Trace) -> str | None:
        if reading is not None and trace.answer is None:
            return f"no reference answer, which {reading} reads"
        if (
            reading is not None
            and trace.num_tokens + len(tokenizer.encode_plain(trace.answer or "")) > longest - ANSWER_ROOM
        ):
            return f"with its reference answer longer than the {longest} tokens that the student takes"
        return None

    return usable_traces(config.data, tokenizer, max_length=longest, limit=config.limit, unfit=unfit)


def candidate_of(trace: Trace, engine: Engine, stats: Any) -> Candidate:
    """A trace as criteria see it: a whole response."""
    return Candidate(
        token_ids=trace.response_ids,
        stats=stats,
        final=True,
        finished=trace.finished,
        stream=int.from_bytes(blake2b(trace.where.encode(), digest_size=8).digest(), "little"),
        pieces_of=engine.tokenizer("student").pieces,
        local_logprob=partial(engine.local_logprob, trace.prompt_ids),
        encode=engine.tokenizer("student").encode_plain,
        answer=trace.answer,
    )


def _batches(traces: Sequence[Trace]) -> Iterator[Sequence[Trace]]:
    start = tokens = 0
    for i, trace in enumerate(traces):
        size = len(trace.prompt_ids) + len(trace.response_ids)
        if i > start and tokens + size > BATCH_TOKENS:
            yield traces[start:i]
            start, tokens = i, 0
        tokens += size
    if start < len(traces):
        yield traces[start:]


def _score_batch(
    engine: Engine, criteria: Mapping[str, AnyCriterion], batch: Sequence[Trace], config: ScoreConfig
) -> Iterator[dict[str, Any]]:
    stats = engine.score([trace.prompt_ids for trace in batch], [trace.response_ids for trace in batch])
    tokenizer, guard = engine.tokenizer("student"), LoopGuard()
    for trace, of_trace in zip(batch, stats, strict=True):
        candidate = candidate_of(trace, engine, of_trace)
        features = {
            name: list(criterion.features(candidate))
            if isinstance(criterion, PoolCriterion)
            else [criterion.score(candidate)]
            for name, criterion in criteria.items()
        }
        for name, values in features.items():
            if any(math.isnan(value) for value in values):
                raise InputError(f"the criterion {name} gave NaN for {trace.where}")
        correct = trace.correct
        if correct is None and config.verify and trace.answer is not None:
            correct = is_correct(tokenizer.decode(trace.response_ids), trace.answer)
        content = trace.response_ids[: len(trace.response_ids) - trace.finished]
        yield {
            "source": source_of(trace),
            "prompt": trace.prompt_key,
            "teacher": trace.teacher,
            "tokens": len(trace.response_ids),
            "steps": len(step_spans(tokenizer.pieces(content))),
            "finished": trace.finished,
            "loop": bool(guard.period(trace.response_ids)),
            "correct": correct,
            "ratios": {
                name: [_jsonable(part) for part in criterion.ratio(candidate)]
                for name, criterion in criteria.items()
                if isinstance(criterion, RatioCriterion)
            },
            "features": {name: [_jsonable(value) for value in values] for name, values in features.items()},
        }


def _jsonable(value: float) -> float | str:
    """JSON has no infinity."""
    return value if math.isfinite(value) else str(value)


def _score_rows(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, Sequence[float]]) -> Iterator[dict[str, Any]]:
    for i, row in enumerate(rows):
        described = {key: value for key, value in row.items() if key not in ("features", "ratios")}
        yield {**described, **{name: _jsonable(column[i]) for name, column in columns.items()}}


def _training_row(engine: Engine, trace: Trace, criterion: str, score: float, weight: float) -> dict[str, Any]:
    fields = training_row(trace, trace.response_ids, engine.tokenizer("student"))
    return {**fields, "criterion": criterion, "score": _jsonable(score), "weight": weight}
