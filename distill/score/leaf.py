"""`genssd leaf`: training rows without the words that distract the student (LeaF, 2506.07851).

    g_i = |d loss / d embedding_i| of every token of the question, for student and teacher, each scaled to [0, 1]
    delta = g_teacher - g_student, scaled to [0, 1]

The tokens of the least delta move the student and not the teacher. Each run of them is taken out of the prompt by
itself: the same completion behind a shorter question is one more row to distil on.

OUTPUT_DIR/journal.jsonl           one line per trace: what was found
OUTPUT_DIR/counterfactuals.jsonl   every trace, and its counterfactuals: what training reads
OUTPUT_DIR/bad_rows.txt            what could not be used, by file and line
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genssd.distill.data.traces import Trace, describe_source, make_training_row, read_journal_ends, read_usable_traces
from genssd.distill.runs.directory import claim, record_run
from genssd.distill.runs.journal import Journal, complete_rows, is_begun, truncate, write_jsonl
from genssd.distill.train.models import load_model, load_teacher
from genssd.engine.checkpoint import fingerprint, locate
from genssd.engine.config import ModelConfig
from genssd.engine.errors import InputError, NumericsError
from genssd.engine.memory import choose_device, choose_dtype
from genssd.engine.runner import Role
from genssd.engine.text import Tokenizer
from genssd.kernels.cross_entropy import linear_cross_entropy


@dataclass(frozen=True, slots=True, kw_only=True)
class LeafConfig:
    """Find what distracts the student in the questions, and leave it out."""

    student: str
    """Hub id or local directory."""
    teacher: str
    """Hub id or local directory; of the same tokenizer. It reads the prompts as the student does."""
    data: tuple[str, ...]
    """JSONL files of traces, as for score."""
    output_dir: str = "runs/leaf"
    resume: bool = False
    """Go on with an interrupted run."""
    limit: int | None = None
    """Take only the first rows of each file."""
    share: float = 0.05
    """Of a question's tokens that are taken out, rounded up; the paper: 0.05 for mathematics, 0.1 for code."""
    max_length: int = 4096
    """Longer traces are left out, and named."""
    device: str | None = None

    def __post_init__(self) -> None:
        if not self.data:
            raise InputError("leaf needs at least one data file")
        if self.limit is not None and self.limit < 1:
            raise InputError(f"limit must be at least 1, not {self.limit}")
        if not 0.0 < self.share <= 0.5:
            raise InputError(f"share must lie in (0, 0.5], not {self.share}")


SETTINGS_OF_THE_RESULT = ("data", "limit", "share", "max_length")
"""What must not change between the parts of one run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LeafSummary:
    """What a run left behind."""

    output_dir: Path
    traces: int
    counterfactuals: int
    bad_rows: tuple[str, ...]


def run_leaf(config: LeafConfig, report: Callable[[int, int], None] = lambda done, total: None) -> LeafSummary:
    """Find and leave out. Raises GenssdError on bad input; finished traces are in the journal."""
    with claim(Path(config.output_dir), "leaf"):
        return _run(config, report)


def _run(config: LeafConfig, report: Callable[[int, int], None]) -> LeafSummary:
    output_dir, source = Path(config.output_dir), locate(config.student)
    journal = output_dir / "journal.jsonl"
    begun = is_begun(journal, resume=config.resume)
    tokenizer = Tokenizer(source)
    longest = min(config.max_length, ModelConfig.load(source).max_position_embeddings)
    traces, bad_rows = read_usable_traces(config.data, tokenizer, max_length=longest, limit=config.limit)
    ends = read_journal_ends(journal, traces)
    done, device = len(ends) - 1, choose_device(config.device)
    teacher_source = locate(config.teacher)
    models: dict[Role, str] = {"student": fingerprint(source), "teacher": fingerprint(teacher_source)}
    settings = dataclasses.asdict(config)
    record_run(output_dir, "leaf", settings, SETTINGS_OF_THE_RESULT, models, resumed=begun)
    truncate(journal, ends[done])
    if done < len(traces):
        student = load_model(source, tokenizer, device, dtype=choose_dtype(source, "auto", device)).eval()
        dtype = choose_dtype(teacher_source, "auto", device)
        teacher = load_teacher(teacher_source, tokenizer, device, dtype)
        with Journal(journal) as log:
            for trace in traces[done:]:
                places = question_places(trace, tokenizer)
                ours, theirs = (gradient_norms(model, trace)[places] for model in (student, teacher))
                texts = [tokenizer.token_text(trace.prompt_ids[i]) for i in places]
                runs = distracting(ours, theirs, texts, config.share)
                log.append({"source": describe_source(trace), "runs": [[places[i] for i in run] for run in runs]})
                done += 1
                report(done, len(traces))
    rows = list(_rows(traces, (row for row, _ in complete_rows(journal)), tokenizer))
    write_jsonl(output_dir / "counterfactuals.jsonl", rows)
    (output_dir / "bad_rows.txt").write_text("".join(f"{message}\n" for message in bad_rows))
    return LeafSummary(
        output_dir=output_dir,
        traces=len(traces),
        counterfactuals=len(rows) - len(traces),
        bad_rows=tuple(bad_rows),
    )


def _rows(traces: Sequence[Trace], found: Iterator[dict[str, Any]], tokenizer: Tokenizer) -> Iterator[dict[str, Any]]:
    """Every trace, then the same behind the question without one of its runs."""
    for trace, row in zip(traces, found, strict=True):
        yield {**make_training_row(trace, trace.response_ids, tokenizer), "left_out": None}
        for run in row["runs"]:
            prompt = tuple(token for i, token in enumerate(trace.prompt_ids) if i not in run)
            shorter = dataclasses.replace(trace, prompt_ids=prompt)
            left_out = tokenizer.decode([trace.prompt_ids[i] for i in run])
            yield {**make_training_row(shorter, trace.response_ids, tokenizer), "left_out": left_out}


def question_places(trace: Trace, tokenizer: Tokenizer) -> list[int]:
    """The places of the question's tokens in the prompt: all of them where its text is not found there."""
    pieces = tokenizer.pieces(trace.prompt_ids)
    offsets = [0, *accumulate(map(len, pieces))]
    start = "".join(pieces).rfind(trace.question)
    special = set(tokenizer.hf.all_special_ids)
    places = [i for i, token in enumerate(trace.prompt_ids) if token not in special]
    if start < 0:
        return places
    end = start + len(trace.question)
    return [i for i in places if offsets[i] < end and offsets[i + 1] > start]


def gradient_norms(model: Any, trace: Trace) -> Tensor:
    """|d loss / d embedding| of every prompt token, float32 [prompt tokens], of the completion's cross-entropy.

    Raises NumericsError naming the trace.
    """
    device = model.get_input_embeddings().weight.device
    ids = torch.tensor([[*trace.prompt_ids, *trace.response_ids]], device=device)
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    hidden = model.base_model(inputs_embeds=embedded, use_cache=False).last_hidden_state[0]
    first = len(trace.prompt_ids)
    head = model.get_output_embeddings().weight.detach()
    loss = linear_cross_entropy(hidden[first - 1 : -1], head, ids[0, first:]).total
    (gradient,) = torch.autograd.grad(loss, [embedded])
    norms: Tensor = gradient[0, :first].float().norm(dim=1).cpu()
    if not bool(torch.isfinite(norms).all()):
        raise NumericsError(f"{trace.where}: the gradient of {model.config.model_type} is not finite")
    return norms


def distracting(student: Tensor, teacher: Tensor, texts: Sequence[str], share: float) -> list[list[int]]:
    """The runs of tokens that move the student and not the teacher, by their index; white space is never one."""
    delta = scaled(scaled(teacher) - scaled(student))
    able = [i for i in range(len(texts)) if texts[i].strip()]
    count = math.ceil(share * len(texts) - 1e-9)
    chosen = sorted(sorted(able, key=lambda i: float(delta[i]))[:count])
    runs: list[list[int]] = []
    for i in chosen:
        if runs and i == runs[-1][-1] + 1:
            runs[-1].append(i)
        else:
            runs.append([i])
    # nothing to ask would be left
    return [run for run in runs if len(run) < len(able)]


def scaled(values: Tensor) -> Tensor:
    """Onto [0, 1]; all 0 where they are all the same."""
    if not len(values):
        return values
    spread = values.max() - values.min()
    return (values - values.min()) / spread if float(spread) > 0.0 else torch.zeros_like(values)
