"""`genssd prefix`: the shortest prefix of a trace that the student can continue by itself (P-ALIGN, 2601.10064).

OUTPUT_DIR/prefixes.jsonl   journal: one line per trace with the steps kept, the student's continuation, its correctness
                            and the judge's replies
OUTPUT_DIR/aligned.jsonl    those that end by themselves and are not known to be wrong: what training reads
OUTPUT_DIR/bad_rows.txt     what could not be used, by file and line
OUTPUT_DIR/summary.json     counts of traces, and how much of them was kept

The prefix is found by bisection over the trace's steps, all traces of a batch at once. If a judge accepts a prefix and
refuses a longer one, bisection can miss the shortest prefix; the one that it returns was judged sufficient all the
same, or is the whole trace.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from genssd.distill.answers.forms import Verdict
from genssd.distill.answers.judge import AnswerJudge
from genssd.distill.data.traces import (
    Trace,
    describe_reading,
    find_traces,
    make_training_row,
    read_usable_traces,
    sort_by_trace,
)
from genssd.distill.pool.pool import Lost, Pool, Stopped
from genssd.distill.runs.clusters import on_cluster
from genssd.distill.runs.journal import write_jsonl
from genssd.distill.runs.model_sampling import choose_sampling
from genssd.distill.runs.output_files import JOURNALS
from genssd.distill.runs.pools import open_pool
from genssd.distill.runs.progress import SILENT, Progress
from genssd.distill.runs.run import Run
from genssd.distill.score.prefix_config import PrefixConfig
from genssd.distill.score.prefix_judges import (
    PrefixJudge,
    ReplyCounts,
    continue_prefixes,
    count_replies,
    make_asking_judge,
    make_solving_judge,
    warn_of_unmarked,
)
from genssd.engine.common.amounts import format_count
from genssd.engine.common.errors import WorkerError
from genssd.engine.decoding.feed import Feed
from genssd.engine.engine import Engine
from genssd.engine.search.budget import Budget
from genssd.engine.setup.model_facts import ModelFacts
from genssd.engine.texts.steps import step_spans


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixSummary:
    """What a finished run has written. Fractions and means are over all traces of the journal."""

    output_dir: Path
    traces: int
    kept: int
    """Number of rows in aligned.jsonl."""
    whole: int
    """Number of traces of which no proper prefix was found to be sufficient."""
    replies: ReplyCounts
    """Counts of the judge's replies, and of those without a verdict."""
    undecided: int
    """Number of responses that could not be judged; they do not count as correct."""
    mean_fraction: float
    """Mean fraction of a trace's steps that was kept."""
    bad_rows: tuple[str, ...]


@on_cluster
def run_prefix(config: PrefixConfig, engine: Engine | None = None, report: Progress = SILENT) -> PrefixSummary:
    """Shorten and continue traces. engine: a loaded engine to use instead of loading the student.

    Raises GenssdError on bad input; traces that were finished before are in the journal.
    """
    config = choose_sampling(config, config.student, "student", engine)
    fingerprints = None if engine is None else engine.fingerprints
    with (
        Run.open(config, "prefix", journal=JOURNALS["prefix"], fingerprints=fingerprints) as run,
        open_pool(config, engine, run.chat_options, student=config.student, report=report) as pool,
    ):
        models = run.use(pool.models)
        report.begin("reading the traces")
        traces, bad_rows = _read_traces(config, models)
        report.note(describe_reading(traces, bad_rows))
        lost = _align_all(run, config, pool, traces, report)
        bad_rows += [f"{traces[place].where}: {reason}" for place, reason in sorted(lost.items())]
        traces = [trace for place, trace in enumerate(traces) if place not in lost]
        run.write_bad_rows(bad_rows)
        if not traces:
            raise WorkerError(f"no trace could be shortened; {run.path('bad_rows.txt')} says why")
        return _summarise(run, traces, bad_rows)


def _align_all(run: Run, config: PrefixConfig, pool: Pool, traces: Sequence[Trace], report: Progress) -> dict[int, str]:
    """Journal the batches that are not in the journal yet; return why the traces of others could not be done."""
    done = _keep_whole_batches(run, traces, config.batch)
    count, is_warned = len(done), False
    report.begin("", unit="traces", total=len(traces), done=count, engine=pool.models)
    starts = [start for start in range(0, len(traces), config.batch) if start not in done]
    work = PrefixWork(traces=traces, items=starts, config=config)
    if pool.is_own_process:
        work = dataclasses.replace(work, report=lambda detail: report(count, len(traces), detail))
    lost: dict[int, str] = {}
    for start, outcome in pool.run(work):
        assert not isinstance(outcome, Stopped), "nothing limits the run"
        batch = range(start, min(start + config.batch, len(traces)))
        count += len(batch)
        if isinstance(outcome, Lost):
            lost |= dict.fromkeys(batch, outcome.reason)
            continue
        for row in outcome:
            run.journal.append(row)
        report(count, len(traces))
        warning = warn_of_unmarked(count_replies(outcome))
        if warning is not None and not is_warned and count < len(traces):
            is_warned = True  # now, and not at the end alone: there is more work to come, perhaps in vain
            report.note(warning)
    return lost


def _report_nothing(detail: str) -> None:
    """Take what is done at the moment, where nobody shows it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixWork:
    """The sufficient prefixes of traces; a `Work`, whose items are batches, named by the place of their first trace."""

    traces: Sequence[Trace]
    items: Sequence[int]
    config: PrefixConfig
    report: Callable[[str], None] = _report_nothing
    """Receiver of what is done at the moment; one that can be pickled where other processes work."""

    most_tokens: ClassVar[int] = 0

    def run(self, engine: Engine, feed: Feed | None, budget: Budget) -> Iterator[tuple[int, list[dict[str, Any]]]]:
        """Yield the lines of prefixes.jsonl of every batch; see `Work`."""
        judge = _make_judge(self.config, engine)
        starts = iter(self.items) if feed is None else iter(lambda: feed.take(wait=True), None)
        for start in starts:
            batch = self.traces[start : start + self.config.batch]
            yield start, _align(engine, self.config, batch, judge, self.report)


def _make_judge(config: PrefixConfig, engine: Engine) -> PrefixJudge:
    if config.judge == "says":
        return make_asking_judge(engine, config.judge_tokens)
    return make_solving_judge(engine, config.max_tokens, config.seed)


def _read_traces(config: PrefixConfig, models: ModelFacts) -> tuple[list[Trace], list[str]]:
    def unfit(trace: Trace) -> str | None:
        if config.judge == "solves" and trace.answer is None:
            return "no reference answer, which judge=solves needs"
        return "the response is empty" if len(trace.response_ids) == trace.finished else None

    longest = models.max_sequence_length("student")
    return read_usable_traces(
        config.data, models.tokenizer("student"), max_length=longest, limit=config.limit, find_fault=unfit
    )


def _keep_whole_batches(run: Run, traces: Sequence[Trace], batch: int) -> set[int]:
    """Cut the journal to whole batches and return the indices of the traces in it.

    Equal prompts of one batch draw different continuations, so a batch is done again as a whole.
    """
    found = find_traces(run.done(), traces, run.journal_path)
    counts = Counter(index // batch for index in found)
    whole = {number for number, count in counts.items() if count == min(batch, len(traces) - number * batch)}
    kept = [row for row, index in enumerate(found) if index // batch in whole]
    run.keep_rows(kept)
    return {found[row] for row in kept}


def _summarise(run: Run, traces: Sequence[Trace], bad_rows: Sequence[str]) -> PrefixSummary:
    """Write aligned.jsonl and summary.json from the finished journal."""
    rows = sort_by_trace(run.done(), traces, run.journal_path)
    aligned = [
        {name: value for name, value in row.items() if name != "judgements"}
        for row in rows
        if row["status"] == "finished" and row["correct"] is not False
    ]
    write_jsonl(run.path("aligned.jsonl"), aligned)
    summary = PrefixSummary(
        output_dir=run.output_dir,
        traces=len(rows),
        kept=len(aligned),
        whole=sum(row["kept_steps"] == row["steps"] for row in rows),
        replies=count_replies(rows),
        undecided=sum(row.get("undecided") is not None for row in rows),
        mean_fraction=sum(row["kept_steps"] / row["steps"] for row in rows) / len(rows),
        bad_rows=tuple(bad_rows),
    )
    values = {name: value for name, value in dataclasses.asdict(summary).items() if name != "output_dir"}
    run.write_summary({**values, "bad_rows": len(bad_rows)})
    return summary


def shortest_prefixes(
    counts: Sequence[int], is_sufficient: Callable[[Sequence[tuple[int, int]]], Sequence[bool]]
) -> list[int]:
    """Return for every sequence of counts[i] steps the least number of first steps that is sufficient, by bisection.

    The result is exact if every prefix longer than a sufficient one is sufficient. is_sufficient: judges pairs
    (sequence index, number of steps) at once; each sequence at most floor(log2(counts[i])) + 1 times. All steps of a
    sequence are taken to be sufficient without judging.
    """
    low, high = [1] * len(counts), list(counts)
    while queries := [(i, (low[i] + high[i]) // 2) for i in range(len(counts)) if low[i] < high[i]]:
        for (i, middle), sufficient in zip(queries, is_sufficient(queries), strict=True):
            if sufficient:
                high[i] = middle
            else:
                low[i] = middle + 1
    return high


def _align(
    engine: Engine,
    config: PrefixConfig,
    traces: Sequence[Trace],
    judge: PrefixJudge,
    report_work: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Return a batch of traces as journal rows: the sufficient prefix of each, and the student's continuation.

    report_work: takes what is done at the moment.
    """
    tokenizer = engine.tokenizer("student")
    contents = [trace.response_ids[: len(trace.response_ids) - trace.finished] for trace in traces]
    spans = [step_spans(tokenizer.pieces(content)) for content in contents]

    def prefix(i: int, steps: int) -> tuple[int, ...]:
        return contents[i][: spans[i][steps - 1][1]]

    judgements: list[list[dict[str, Any]]] = [[] for _ in traces]

    def is_sufficient(queries: Sequence[tuple[int, int]]) -> list[bool]:
        report_work(f"judging {format_count(len(queries), 'prefix')}")
        judged = judge([(traces[i], prefix(i, steps)) for i, steps in queries])
        for (i, steps), one in zip(queries, judged, strict=True):
            judgements[i].append({"steps": steps, "sufficient": one.is_sufficient, "reply": one.reply})
        return [one.is_sufficient for one in judged]

    kept = shortest_prefixes([len(steps) for steps in spans], is_sufficient)
    shortened = [i for i in range(len(traces)) if kept[i] < len(spans[i])]
    prefixes = [(traces[i], prefix(i, kept[i])) for i in shortened]
    report_work(f"continuing {format_count(len(prefixes), 'prefix')}")
    continuations = continue_prefixes(
        engine, prefixes, sampling=config.sampling, max_tokens=config.max_tokens, seed=config.seed
    )
    written = dict(zip(shortened, continuations, strict=True))
    answer_judge = AnswerJudge(tokenizer)
    rows = []
    for i, trace in enumerate(traces):
        ids, finished = trace.response_ids, trace.finished
        if i in written:
            ids, finished = (*prefix(i, kept[i]), *written[i].token_ids), written[i].status == "finished"
        fields = make_training_row(trace, ids, tokenizer)
        verdict: Verdict | None = None
        if trace.answer is not None:
            verdict = answer_judge.judge(trace.prompt_ids, ids, trace.answer)
        known = trace.correct if i not in written else None
        rows.append(
            {
                **fields,
                "status": "finished" if finished else "length",
                "correct": known if verdict is None else verdict.is_correct,
                "undecided": None if verdict is None else verdict.undecided,
                "steps": len(spans[i]),
                "kept_steps": kept[i],
                "prefix_tokens": len(prefix(i, kept[i])),
                "judgements": judgements[i],
            }
        )
    return rows
