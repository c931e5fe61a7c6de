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
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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
from genssd.distill.runs.journal import write_jsonl
from genssd.distill.runs.progress import SILENT, Progress
from genssd.distill.runs.run import Run
from genssd.distill.score.leaf_config import LeafConfig
from genssd.distill.score.words import group_words
from genssd.distill.train.models import load_teacher, match_teacher
from genssd.engine.checkpoint import locate
from genssd.engine.config import load_config
from genssd.engine.errors import NumericsError
from genssd.engine.memory import choose_device, choose_dtype
from genssd.engine.parameters import count_stored_parameters
from genssd.engine.text import Tokenizer
from genssd.engine.threads import announce, choose_training_threads
from genssd.engine.transformers_loading import load_model, logits_softcap, scale_states
from genssd.kernels.cross_entropy import linear_cross_entropy
from genssd.kernels.threads import torch_threads


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
    with Run.open(config, "leaf", journal="journal.jsonl") as run, ExitStack() as stack:
        source = locate(config.student)
        tokenizer = Tokenizer(source).with_chat(run.chat_options)
        longest = min(config.max_length, load_config(source).max_position_embeddings)
        report.begin("reading the traces")
        teacher_reads = match_teacher(Tokenizer(locate(config.teacher)), tokenizer)
        traces, bad_rows = read_usable_traces(
            config.data,
            tokenizer,
            max_length=longest,
            limit=config.limit,
            find_fault=lambda trace: teacher_reads.find_fault((*trace.prompt_ids, *trace.response_ids)),
        )
        report.note(describe_reading(traces, bad_rows))
        done = set(find_traces(run.done(), traces, run.journal_path))
        missing = [trace for i, trace in enumerate(traces) if i not in done]
        threads = run.fix_threads(
            choose_training_threads(config.threads, count_stored_parameters(locate(config.teacher)))
        )
        if missing:
            stack.enter_context(torch_threads(threads.count))
            report.begin(f"loading student {config.student} and teacher {config.teacher}")
            started = time.monotonic()
            student, teacher = _load_models(config, tokenizer)
            announce(threads)
            report.note(f"the models loaded in {time.monotonic() - started:.1f} s")
            report.begin("", unit="traces", total=len(traces), done=len(done))
            for finished, trace in enumerate(missing, start=len(done) + 1):
                places = question_places(trace, tokenizer)
                student_norms, teacher_norms = (gradient_norms(model, trace)[places] for model in (student, teacher))
                words = words_of_places(trace, places, tokenizer)
                spans = distracting_spans(student_norms, teacher_norms, words, config.share)
                run.journal.append(
                    {"source": describe_source(trace), "runs": [[places[i] for i in span] for span in spans]}
                )
                report(finished, len(traces))
        rows = list(_rows(traces, sort_by_trace(run.done(), traces, run.journal_path), tokenizer))
        run.write_bad_rows(bad_rows)
        write_jsonl(run.path("counterfactuals.jsonl"), rows)
        counts = {"traces": len(traces), "counterfactuals": len(rows) - len(traces)}
        run.write_summary({**counts, "bad_rows": len(bad_rows)})
    return LeafSummary(output_dir=run.output_dir, **counts, bad_rows=tuple(bad_rows))


def _load_models(config: LeafConfig, tokenizer: Tokenizer) -> tuple[Any, Any]:
    """Return student and teacher as transformers' models, in the types of their checkpoints."""
    device = choose_device(config.device)
    sources = locate(config.student), locate(config.teacher)
    student = load_model(sources[0], tokenizer, device, dtype=choose_dtype(sources[0], "auto", device)).eval()
    teacher = load_teacher(sources[1], tokenizer, device, choose_dtype(sources[1], "auto", device))
    return student, teacher.model


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


def question_places(trace: Trace, tokenizer: Tokenizer) -> list[int]:
    """Return the indices of the question's tokens in the prompt, without special tokens.

    Where the text of the question does not occur in the prompt, these are all tokens of the prompt.
    """
    pieces = tokenizer.pieces(trace.prompt_ids)
    offsets = [0, *accumulate(map(len, pieces))]
    start = "".join(pieces).rfind(trace.question)
    special = set(tokenizer.hf.all_special_ids)
    places = [i for i, token in enumerate(trace.prompt_ids) if token not in special]
    if start < 0:
        return places
    end = start + len(trace.question)
    return [
        i
        for i in places
        if offsets[i] < end
        and offsets[i + 1] > start
        # a token that joins the question and the template's text is part of the template
        and not (pieces[i][: max(start - offsets[i], 0)] + pieces[i][end - offsets[i] :]).strip()
    ]


def words_of_places(trace: Trace, places: Sequence[int], tokenizer: Tokenizer) -> list[int | None]:
    """Return the number of the word that each of some prompt tokens belongs to; None for white space."""
    inside = set(places)
    pieces = tokenizer.pieces(trace.prompt_ids)
    words = group_words([piece if i in inside else " " for i, piece in enumerate(pieces)])
    return [words[i] for i in places]


def gradient_norms(model: Any, trace: Trace) -> Tensor:
    """Return |d loss / d embedding| of every prompt token, float32 [prompt tokens]; loss is the completion's
    cross-entropy.

    Raises NumericsError naming the trace when a gradient is not finite.
    """
    device = model.get_input_embeddings().weight.device
    ids = torch.tensor([[*trace.prompt_ids, *trace.response_ids]], device=device)
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    hidden = model.base_model(inputs_embeds=embedded, use_cache=False).last_hidden_state[0]
    first = len(trace.prompt_ids)
    head = model.get_output_embeddings().weight.detach()
    loss = linear_cross_entropy(
        scale_states(model, hidden[first - 1 : -1]), head, ids[0, first:], softcap=logits_softcap(model)
    ).total
    (gradient,) = torch.autograd.grad(loss, [embedded])
    norms: Tensor = gradient[0, :first].float().norm(dim=1).cpu()
    if not bool(torch.isfinite(norms).all()):
        raise NumericsError(f"{trace.where}: the gradient of {model.config.model_type} is not finite")
    return norms


def distracting_spans(
    student_norms: Tensor, teacher_norms: Tensor, words: Sequence[int | None], fraction: float
) -> list[list[int]]:
    """Return the spans of tokens that influence the student and not the teacher, as lists of indices.

    student_norms, teacher_norms: gradient norms, float32 [tokens]. words: the number of each token's word; white space
    (None) is never chosen. fraction: how many of the tokens are chosen, rounded up; words are taken as a whole, in the
    order of their token with the least difference, until there are so many.
    """
    delta = scaled(scaled(teacher_norms) - scaled(student_norms)).tolist()
    visible = [i for i, word in enumerate(words) if word is not None]
    count = math.ceil(fraction * len(words) - 1e-9)
    chosen_words = set[int | None]()
    chosen: list[int] = []
    for i in sorted(visible, key=lambda i: delta[i]):
        if len(chosen) >= count:
            break
        if words[i] not in chosen_words:
            chosen_words.add(words[i])
            chosen += [j for j in visible if words[j] == words[i]]
    spans: list[list[int]] = []
    for i in sorted(chosen):
        if spans and i == spans[-1][-1] + 1:
            spans[-1].append(i)
        else:
            spans.append([i])
    # without the whole question there would be nothing to answer
    return [span for span in spans if len(span) < len(visible)]


def scaled(values: Tensor) -> Tensor:
    """Return the values scaled linearly to [0, 1]; all 0 where they are all equal."""
    if not len(values):
        return values
    spread = values.max() - values.min()
    return (values - values.min()) / spread if float(spread) > 0.0 else torch.zeros_like(values)
