"""`genssd leaf`: training rows without the words that distract the student (LeaF, 2506.07851).

    g_i = |d loss / d embedding_i| of every token of the question, for student and teacher, each scaled to [0, 1]
    delta = g_teacher - g_student, scaled to [0, 1]

The tokens with the smallest delta influence the student and not the teacher. They are taken with the whole words that
they belong to (see words.py), and each span of them is removed from the prompt by itself: the same completion after a
shorter question is one more row to distil on.

OUTPUT_DIR/journal.jsonl           one line per trace: the spans that distract the student
OUTPUT_DIR/counterfactuals.jsonl   every trace, and its counterfactuals: what training reads
OUTPUT_DIR/bad_rows.txt            what could not be used, by file and line
OUTPUT_DIR/summary.json            counts of traces and counterfactuals
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from genssd.distill.data.traces import (
    Trace,
    describe_reading,
    describe_source,
    find_traces,
    make_training_row,
    read_usable_traces,
    sort_by_trace,
)
from genssd.distill.data.written_rows import TextPrompt
from genssd.distill.pool.placing import Place
from genssd.distill.pool.pool import Lost, Stopped
from genssd.distill.pool.processes import ProcessPool
from genssd.distill.pool.remote_models import RemoteModels
from genssd.distill.runs.journal import write_jsonl
from genssd.distill.runs.output_files import JOURNALS
from genssd.distill.runs.pools import choose_places
from genssd.distill.runs.progress import SILENT, Progress
from genssd.distill.runs.run import Run
from genssd.distill.score.leaf_config import LeafConfig
from genssd.distill.score.leaf_work import GradientModels, GradientRecipe, LeafWork, question_places
from genssd.distill.train.models import match_teacher
from genssd.engine.checkpoints.checkpoint import locate
from genssd.engine.checkpoints.config import load_config
from genssd.engine.checkpoints.parameters import count_stored_parameters
from genssd.engine.common.amounts import format_count
from genssd.engine.common.errors import WorkerError
from genssd.engine.host.threads import ThreadChoice, announce, choose_engine_threads, choose_training_threads
from genssd.engine.search.budget import Budget
from genssd.engine.texts.text import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class LeafSummary:
    """What a finished run has written."""

    output_dir: Path
    traces: int
    counterfactuals: int
    """Number of rows without some words of the question."""
    bad_rows: tuple[str, ...]


def run_leaf(config: LeafConfig, report: Progress = SILENT) -> LeafSummary:
    """Find distracting words and write rows without them.

    Raises GenssdError on bad input; traces that were finished before are in the journal.
    """
    choose_places(config, config.device, choose_engine_threads(config.threads).count, None)  # refused early
    with Run.open(config, "leaf", journal=JOURNALS["leaf"]) as run:
        tokenizer = Tokenizer(locate(config.student)).with_chat(run.chat_options)
        report.begin("reading the traces")
        traces, bad_rows = _read_traces(config, tokenizer)
        report.note(describe_reading(traces, bad_rows))
        lost = _find_all(run, config, traces, report)
        bad_rows += [f"{traces[place].where}: {reason}" for place, reason in sorted(lost.items())]
        traces = [trace for place, trace in enumerate(traces) if place not in lost]
        run.write_bad_rows(bad_rows)
        if not traces:
            raise WorkerError(f"no trace could be read; {run.path('bad_rows.txt')} says why")
        rows = list(_rows(traces, sort_by_trace(run.done(), traces, run.journal_path), tokenizer))
        write_jsonl(run.path("counterfactuals.jsonl"), rows)
        counts = {"traces": len(traces), "counterfactuals": len(rows) - len(traces)}
        run.write_summary({**counts, "bad_rows": len(bad_rows)})
    return LeafSummary(output_dir=run.output_dir, **counts, bad_rows=tuple(bad_rows))


def _read_traces(config: LeafConfig, tokenizer: Tokenizer) -> tuple[list[Trace], list[str]]:
    """Return the traces that both models can read, and why others cannot be used."""
    teacher_reads = match_teacher(Tokenizer(locate(config.teacher)), tokenizer)
    longest = load_config(locate(config.student)).max_position_embeddings
    return read_usable_traces(
        config.data,
        tokenizer,
        max_length=min(config.max_length, longest),
        limit=config.limit,
        find_fault=lambda trace: teacher_reads.find_fault((*trace.prompt_ids, *trace.response_ids)),
    )


def _find_all(run: Run, config: LeafConfig, traces: Sequence[Trace], report: Progress) -> dict[int, str]:
    """Journal the spans of every trace that is not in the journal yet; return why others could not be read."""
    done = set(find_traces(run.done(), traces, run.journal_path))
    missing = {place: trace for place, trace in enumerate(traces) if place not in done}
    given = choose_engine_threads(config.threads).count
    places = choose_places(config, config.device, given, len(missing))
    if places:  # the longest ones first, so that all processes end about together
        missing = dict(sorted(missing.items(), key=lambda item: -item[1].num_tokens))
    threads = run.fix_threads(_choose_threads(config, given // max(1, len(places))))
    if not missing:
        return {}
    work = LeafWork(traces=missing, share=config.share)
    lost: dict[int, str] = {}
    with _open(run, config, work, places, threads, report) as outcomes:
        report.begin("", unit="traces", total=len(traces), done=len(done))
        for finished, (place, outcome) in enumerate(outcomes, start=len(done) + 1):
            assert not isinstance(outcome, Stopped), "nothing limits the run"
            if isinstance(outcome, Lost):
                lost[place] = outcome.reason
            else:
                run.journal.append({"source": describe_source(traces[place]), "runs": outcome})
            report(finished, len(traces))
    return lost


def _choose_threads(config: LeafConfig, most: int) -> ThreadChoice:
    """Return the number of threads of each process. most: its part of those that are given."""
    choice = choose_training_threads(config.threads, count_stored_parameters(locate(config.teacher)))
    return choice if choice.count <= most else ThreadChoice(count=max(1, most), reason="in each process")


@contextmanager
def _open(
    run: Run, config: LeafConfig, work: LeafWork, places: Sequence[Place], threads: ThreadChoice, report: Progress
) -> Iterator[Iterable[tuple[int, list[list[int]] | Stopped | Lost]]]:
    """Load the models, here or in a process for each place, and yield the outcomes of the work, as they come."""
    count = f" in {format_count(len(places), 'process')}" if places else ""
    report.begin(f"loading student {config.student} and teacher {config.teacher}{count}")
    started = time.monotonic()
    names: dict[str, Any] = {"student": config.student, "teacher": config.teacher, "chat": run.chat_options}
    with ExitStack() as stack:
        outcomes: Iterable[tuple[int, list[list[int]] | Stopped | Lost]]
        if places:
            recipes = [
                GradientRecipe(
                    **names, device=place.device, threads=threads.count, visible_device=place.visible_device,
                    memory=place.memory,
                )
                for place in places
            ]  # fmt: skip
            pool = stack.enter_context(ProcessPool(RemoteModels([]), recipes))
            pool.open()
            outcomes = pool.run(work)
        else:
            outcomes = work.run(
                GradientModels.load(**names, device=config.device, threads=threads.count), None, Budget()
            )
        announce(threads)
        report.note(f"the models loaded{count} in {time.monotonic() - started:.1f} s")
        yield outcomes


def _rows(traces: Sequence[Trace], journal: Sequence[dict[str, Any]], tokenizer: Tokenizer) -> Iterator[dict[str, Any]]:
    """Yield every trace as a training row, followed by one row per span with that span removed from the question."""
    for trace, row in zip(traces, journal, strict=True):
        yield {**make_training_row(trace, trace.response_ids, tokenizer), "left_out": None}
        for span in row["runs"]:
            prompt = tuple(token for i, token in enumerate(trace.prompt_ids) if i not in span)
            shorter = dataclasses.replace(trace, prompt_ids=prompt, prompt=_shorten_prompt(trace, span, tokenizer))
            left_out = tokenizer.decode([trace.prompt_ids[i] for i in span])
            yield {**make_training_row(shorter, trace.response_ids, tokenizer), "left_out": left_out}


def _shorten_prompt(trace: Trace, span: Sequence[int], tokenizer: Tokenizer) -> TextPrompt | None:
    """Return the prompt without a span of the question's tokens; None where the row has no text, or another one."""
    if trace.prompt is None:
        return None
    places = question_places(trace, tokenizer)
    pieces = tokenizer.pieces(trace.prompt_ids)
    whole, shorter = (
        "".join(pieces[i] for i in range(places[0], places[-1] + 1) if i not in left_out) for left_out in ((), span)
    )
    text = trace.prompt.text
    last = text if isinstance(text, str) else str(text[-1]["content"])
    if last.strip() not in whole:
        return None
    # the first and the last token of the question may hold characters of the template as well
    before, after = whole.split(last.strip(), 1)
    shortened = shorter.removeprefix(before).removesuffix(after)
    changed = shortened if isinstance(text, str) else [*text[:-1], {**text[-1], "content": shortened}]
    return dataclasses.replace(trace.prompt, text=changed)
