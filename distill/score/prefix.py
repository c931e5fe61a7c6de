"""`genssd prefix`: the shortest beginning of a trace from which the student can go on by itself (P-ALIGN, 2601.10064).

OUTPUT_DIR/prefixes.jsonl   journal: one line per trace with the steps kept, the student's continuation, its correctness
OUTPUT_DIR/aligned.jsonl    those that end by themselves and are not known to be wrong: what training reads
OUTPUT_DIR/bad_rows.txt     what could not be used, by file and line

The prefix is found by bisection over the trace's steps, all traces of a batch at once. A judge that says no to a
longer prefix than it said yes to before makes bisection miss the shortest; the prefix it ends with was judged enough
all the same, or is the whole trace.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from genssd.distill.data.traces import Trace, journalled, training_row, usable_traces
from genssd.distill.evaluating import is_correct
from genssd.distill.runs.directory import claim, record_run
from genssd.distill.runs.engine_options import EngineOptions
from genssd.distill.runs.journal import Journal, complete_rows, is_begun, truncate, write_jsonl
from genssd.engine.engine import Engine
from genssd.engine.errors import InputError
from genssd.engine.generation import Completion
from genssd.engine.sampling import Sampling
from genssd.engine.steps import step_spans

QUESTION = """Here is a problem and the beginning of a solution.

Problem:
{problem}

Beginning of the solution:
{prefix}

Could you finish the solution correctly from here, without further help? Answer [ENOUGH] if the beginning suffices, \
else [NOT_ENOUGH]."""

Judge = Callable[[Sequence[tuple[Trace, tuple[int, ...]]]], Sequence[bool]]
"""Whether each of some prefixes of traces suffices."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixConfig(EngineOptions):
    """Keep as much of every trace as the student needs, and let it write the rest."""

    student: str
    """Hub id or local directory of the model that judges and continues."""
    data: tuple[str, ...]
    """JSONL files of traces, as for score."""
    output_dir: str = "runs/prefix"
    resume: bool = False
    """Go on with an interrupted run."""
    limit: int | None = None
    """Take only the first rows of each file."""
    judge: Literal["says", "solves"] = "says"
    """says: the student is asked whether the prefix is enough (the paper). solves: it is if the student's greedy
    continuation is right (ours; needs answers, and no model that follows instructions)."""
    judge_tokens: int = 256
    """Of the student's reply when it is asked."""
    max_tokens: int = 4096
    """Of a continuation."""
    sampling: Sampling = field(default_factory=lambda: Sampling(temperature=0.6, top_p=0.9))
    """How the student continues. The paper adds a repetition penalty of 1.05, which is not built."""
    batch: int = 64
    """Traces worked on at once; each batch is on disk when it is finished."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("judge_tokens", "max_tokens", "batch"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.limit is not None and self.limit < 1:
            raise InputError(f"limit must be at least 1, not {self.limit}")
        if not self.data:
            raise InputError("prefix needs at least one data file")


SETTINGS_OF_THE_RESULT = ("data", "limit", "judge", "judge_tokens", "max_tokens", "sampling", "batch", "seed", "dtype")
"""What must not change between the parts of one run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixSummary:
    """What a run left behind. Shares and means are over all traces of the journal."""

    output_dir: Path
    traces: int
    kept: int
    whole: int
    """Traces of which no proper prefix was found to be enough."""
    mean_share: float
    """Of a trace's steps that were kept."""
    bad_rows: tuple[str, ...]


def run_prefix(
    config: PrefixConfig, engine: Engine | None = None, report: Callable[[int, int], None] = lambda done, total: None
) -> PrefixSummary:
    """Shorten and continue. Raises GenssdError on bad input; finished traces are in the journal."""
    with claim(Path(config.output_dir), "prefix"):
        return _run(config, engine, report)


def _run(config: PrefixConfig, engine: Engine | None, report: Callable[[int, int], None]) -> PrefixSummary:
    output_dir = Path(config.output_dir)
    journal = output_dir / "prefixes.jsonl"
    begun = is_begun(journal, resume=config.resume)
    engine = engine or config.load(student=config.student)
    traces, bad_rows = _read(config, engine)
    settings = dataclasses.asdict(config)
    record_run(output_dir, "prefix", settings, SETTINGS_OF_THE_RESULT, engine.fingerprints, resumed=begun)
    done = _resume(journal, traces, config.batch)
    judge = _says(engine, config) if config.judge == "says" else _solves(engine, config)
    with Journal(journal) as log:
        while done < len(traces):
            part = traces[done : done + config.batch]
            for row in _align(engine, config, part, judge):
                log.append(row)
            done += len(part)
            report(done, len(traces))
    rows = [row for row, _ in complete_rows(journal)]
    kept = [row for row in rows if row["status"] == "finished" and row["correct"] is not False]
    write_jsonl(output_dir / "aligned.jsonl", kept)
    (output_dir / "bad_rows.txt").write_text("".join(f"{message}\n" for message in bad_rows))
    return PrefixSummary(
        output_dir=output_dir,
        traces=len(rows),
        kept=len(kept),
        whole=sum(row["kept_steps"] == row["steps"] for row in rows),
        mean_share=sum(row["kept_steps"] / row["steps"] for row in rows) / len(rows),
        bad_rows=tuple(bad_rows),
    )


def _read(config: PrefixConfig, engine: Engine) -> tuple[list[Trace], list[str]]:
    def unfit(trace: Trace) -> str | None:
        if config.judge == "solves" and trace.answer is None:
            return "no reference answer, which judge=solves needs"
        return "the response is empty" if len(trace.response_ids) == trace.finished else None

    longest = engine.max_sequence_length("student")
    return usable_traces(config.data, engine.tokenizer("student"), max_length=longest, limit=config.limit, unfit=unfit)


def _resume(journal: Path, traces: Sequence[Trace], batch: int) -> int:
    """How many of the first traces are in the journal, which is cut to whole batches: equal prompts of one batch draw
    different continuations, so a batch is done again as a whole."""
    ends = journalled(journal, traces)
    done = len(ends) - 1
    done -= 0 if done == len(traces) else done % batch
    truncate(journal, ends[done])
    return done


def shortest_prefixes(
    counts: Sequence[int], enough: Callable[[Sequence[tuple[int, int]]], Sequence[bool]]
) -> list[int]:
    """For things of 1..counts[i] steps the least number that is enough, if every longer one is, too.

    enough: judges some (thing, number of steps) at once; at most floor(log2(counts[i])) + 1 times each. The whole is
    taken to be enough without asking.
    """
    low, high = [1] * len(counts), list(counts)
    while asked := [(i, (low[i] + high[i]) // 2) for i in range(len(counts)) if low[i] < high[i]]:
        for (i, middle), yes in zip(asked, enough(asked), strict=True):
            if yes:
                high[i] = middle
            else:
                low[i] = middle + 1
    return high


def _align(engine: Engine, config: PrefixConfig, traces: Sequence[Trace], judge: Judge) -> list[dict[str, Any]]:
    tokenizer = engine.tokenizer("student")
    contents = [trace.response_ids[: len(trace.response_ids) - trace.finished] for trace in traces]
    spans = [step_spans(tokenizer.pieces(content)) for content in contents]

    def prefix(i: int, steps: int) -> tuple[int, ...]:
        return contents[i][: spans[i][steps - 1][1]]

    kept = shortest_prefixes(
        [len(steps) for steps in spans], lambda asked: judge([(traces[i], prefix(i, steps)) for i, steps in asked])
    )
    going_on = [i for i in range(len(traces)) if kept[i] < len(spans[i])]
    continued = _continue(engine, config, [(traces[i], prefix(i, kept[i])) for i in going_on], sampling=config.sampling)
    written = dict(zip(going_on, continued, strict=True))
    rows = []
    for i, trace in enumerate(traces):
        ids, finished = trace.response_ids, trace.finished
        if i in written:
            ids, finished = (*prefix(i, kept[i]), *written[i].token_ids), written[i].status == "finished"
        fields = training_row(trace, ids, tokenizer)
        correct = trace.correct if i not in written else None
        if trace.answer is not None:
            correct = is_correct(fields["completion"], trace.answer)
        rows.append(
            {
                **fields,
                "status": "finished" if finished else "length",
                "correct": correct,
                "steps": len(spans[i]),
                "kept_steps": kept[i],
                "prefix_tokens": len(prefix(i, kept[i])),
            }
        )
    return rows


def _continue(
    engine: Engine, config: PrefixConfig, prefixes: Sequence[tuple[Trace, tuple[int, ...]]], *, sampling: Sampling
) -> list[Completion]:
    """What the student writes behind prompt and prefix."""
    continued = engine.iter_generate(
        [(*trace.prompt_ids, *ids) for trace, ids in prefixes],
        model="student",
        sampling=sampling,
        max_tokens=config.max_tokens,
        seed=config.seed,
        labels=[trace.where for trace, _ in prefixes],
    )
    written = {index: completion for index, (completion,) in continued}
    return [written[i] for i in range(len(prefixes))]


def _says(engine: Engine, config: PrefixConfig) -> Judge:
    """Ask the student, greedily. What is too long to ask about is not enough."""
    tokenizer = engine.tokenizer("student")

    def judge(prefixes: Sequence[tuple[Trace, tuple[int, ...]]]) -> list[bool]:
        prompts = []
        for trace, ids in prefixes:
            text = QUESTION.format(problem=trace.question.strip(), prefix=tokenizer.decode(ids).strip())
            prompt = [{"role": "user", "content": text}] if tokenizer.hf.chat_template else f"{text}\n"
            prompts.append(tokenizer.encode_prompt(prompt))
        longest = engine.max_sequence_length("student") - config.judge_tokens
        short = [i for i, ids in enumerate(prompts) if len(ids) <= longest]
        replies = engine.iter_generate(
            [prompts[i] for i in short],
            model="student",
            sampling=Sampling(temperature=0.0),
            max_tokens=config.judge_tokens,
            labels=[prefixes[i][0].where for i in short],
        )
        # "[NOT_ENOUGH]" does not contain "[ENOUGH]"
        yes = {short[index] for index, (reply,) in replies if "[ENOUGH]" in reply.text}
        return [i in yes for i in range(len(prompts))]

    return judge


def _solves(engine: Engine, config: PrefixConfig) -> Judge:
    """Let the student go on, greedily, and check the answer."""
    tokenizer = engine.tokenizer("student")

    def judge(prefixes: Sequence[tuple[Trace, tuple[int, ...]]]) -> list[bool]:
        continued = _continue(engine, config, prefixes, sampling=Sampling(temperature=0.0))
        return [
            is_correct(tokenizer.decode((*ids, *reply.token_ids)), trace.answer)
            for (trace, ids), reply in zip(prefixes, continued, strict=True)
        ]

    return judge
