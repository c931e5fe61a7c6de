"""Check of the disk: what the journals, the trained model and its checkpoints take at most, and what is free."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path

from genssd.distill.data.state_store import DTYPES
from genssd.distill.data.topk_coding import BYTES_PER_ENTRY
from genssd.distill.doctor.findings import Finding, Piece
from genssd.distill.doctor.inputs import Inputs
from genssd.distill.files.rows import read_rows
from genssd.distill.rounds.config import DistillConfig
from genssd.distill.runs.teacher_options import TeacherOptions
from genssd.distill.train.saving import find_stored_dtype
from genssd.engine.checkpoints.parameters import count_stored_parameters
from genssd.engine.common.amounts import format_bytes, format_count
from genssd.engine.common.errors import GenssdError
from genssd.engine.models.transformers_loading import make_empty_model

BYTES_PER_ROW_TOKEN = 32
"""Bytes of selections.jsonl for one token of a prompt or a response: ids, text, log-probabilities. A search of the
small pair takes 22; larger vocabularies have longer ids."""
BYTES_PER_CANDIDATE_TOKEN = 110
"""Bytes of decisions.jsonl for one sampled token. A search of the small pair takes 89."""
CHECKPOINT_VALUES = 3
"""Values of a checkpoint per weight, in float32: the weight and two moments."""


def check_disk(inputs: Inputs) -> list[Finding]:
    """Find whether there is room for what the command writes at most."""
    output_dir = inputs.settings.output_dir
    if output_dir is None:
        return []
    name, place = "disk", find_existing(Path(output_dir))
    if not os.access(place, os.W_OK):
        fix = "choose another output_dir, or the owner's rights"
        return [Finding(name=name, level="error", line=f"{place} cannot be written", fix=fix)]
    try:
        models = list(_list_model_files(inputs))
        journals = list(_list_journals(inputs))
    except GenssdError:
        return []  # a finding of another check
    free = shutil.disk_usage(place).free
    certain, most = (sum(count for _, count in files) for files in (models, [*models, *journals]))
    detail = (Piece("\n".join(f"{what}: {format_bytes(count)}" for what, count in [*models, *journals])),)
    line = f"{output_dir} takes {format_bytes(most)} at most, and {format_bytes(free)} are free"
    if certain > free:
        fix = "make room, choose an output_dir on another disk, or keep fewer checkpoints (--save-total-limit)"
        return [Finding(name=name, level="error", line=line, detail=detail, fix=fix)]
    if most > free:
        fix = "make room, choose an output_dir on another disk, or lower max_tokens: responses may be that long"
        return [Finding(name=name, level="warning", line=line, detail=detail, fix=fix)]
    return [Finding(name=name, level="ok", line=line, detail=detail)]


def find_existing(path: Path) -> Path:
    """Return a directory, or the nearest one above it that exists."""
    missing = list(takewhile(lambda folder: not folder.exists(), (path, *path.parents)))
    return missing[-1].parent if missing else path


def _list_journals(inputs: Inputs) -> Iterator[tuple[str, int]]:
    """Yield what a search or a generation writes at most, if every response has max_tokens."""
    settings = inputs.settings
    if settings.max_tokens is None:
        return
    if inputs.rows.is_whole:
        count = len(inputs.rows.problems)
    else:
        count = sum(1 for _ in read_rows(settings.data[0]))
        count = count if settings.limit is None else min(count, settings.limit)
    rounds = settings.config.rounds if isinstance(settings.config, DistillConfig) else 1
    if isinstance(settings.config, DistillConfig) and settings.config.prompts_per_round is not None:
        count = settings.config.prompts_per_round
    lengths = inputs.prompts.list_lengths()
    prompt = sum(sum(by_role.values()) for by_role in lengths) // max(1, len(lengths))
    kept = settings.sequences if settings.search is None else settings.search.beam
    rows = count * rounds * (prompt + kept * settings.max_tokens) * BYTES_PER_ROW_TOKEN
    yield f"rows of {format_count(count * rounds, 'prompt')}", rows
    if isinstance(settings.engine, TeacherOptions) and settings.engine.teacher_states and inputs.teacher is not None:
        width = make_empty_model(inputs.teacher.directory).get_output_embeddings().weight.shape[1]
        state = int(width) * DTYPES[settings.engine.teacher_states].itemsize
        yield "the teacher's hidden states", count * rounds * settings.max_tokens * state
    if settings.search is not None:
        sampled = count * rounds * settings.sequences * settings.max_tokens
        yield "decisions (every candidate)", sampled * BYTES_PER_CANDIDATE_TOKEN
        topk = count * rounds * settings.max_tokens * settings.search.teacher_topk * BYTES_PER_ENTRY
        if topk:
            yield "the teacher's most likely tokens", topk


def _list_model_files(inputs: Inputs) -> Iterator[tuple[str, int]]:
    """Yield the sizes of the models and checkpoints that a training writes. Raises CheckpointError."""
    settings, student = inputs.settings, inputs.student
    if settings.training is None or student is None or not student.has_weights:
        return
    parameters = count_stored_parameters(student.directory)
    size = parameters * find_stored_dtype(student.directory).itemsize
    rounds = settings.config.rounds if isinstance(settings.config, DistillConfig) else 1
    copies = rounds * (2 if settings.training.eval_data else 1)
    yield f"{format_count(copies, 'trained model')}", copies * size
    if settings.training.save_steps is not None:
        # the newest checkpoint is written before the oldest one is removed
        kept = (settings.training.save_total_limit or 10) + 1
        weights = 0 if settings.training.use_peft else CHECKPOINT_VALUES
        yield f"{format_count(kept, 'checkpoint')}", rounds * kept * max(size, parameters * weights * 4)
