"""Checks of a call's arguments before anything runs; every message names the prompt at fault."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence

import numpy as np

from genssd.engine.common.amounts import format_count
from genssd.engine.common.errors import CapacityError, CheckpointError, InputError
from genssd.engine.common.model_choices import Role
from genssd.engine.common.options_check import check_count, check_value
from genssd.engine.common.quoting import quote
from genssd.engine.criteria.candidate import Window
from genssd.engine.criteria.criterion import AnyCriterion, needs_answer
from genssd.engine.models.language_model import LanguageModel
from genssd.engine.models.runner import ModelRunner
from genssd.engine.texts.text import Prompt, Tokenizer


def labels_of(prompts: Sequence[Prompt], labels: Sequence[str] | None) -> Sequence[str]:
    """Return the name of each prompt in messages. Raises InputError on unequal counts."""
    check_list("prompts", prompts, "prompts")
    if labels is None:
        return [f"prompt {i}" for i in range(len(prompts))]
    check_list("labels", labels, "names")
    if len(labels) != len(prompts):
        raise InputError(f"{format_count(len(prompts), 'prompt')} but {format_count(len(labels), 'label')}")
    return [check_value(f"labels[{i}]", label, str) for i, label in enumerate(labels)]


def check_list(name: str, value: object, elements: str) -> None:
    """Raise InputError on an argument that is no list: a single text, a mapping, a number. elements: what it lists."""
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Sequence | np.ndarray):
        raise InputError(f"{name} is a list of {elements}, not {quote(value)}; put a single one into a list")


def check_answers(answers: Sequence[str | None] | None, criterion: AnyCriterion, labels: Sequence[str]) -> None:
    """Check that every prompt has its reference answer, where the criterion reads them."""
    if answers is not None:
        check_list("answers", answers, "answers")
        if len(answers) != len(labels):
            raise InputError(f"{format_count(len(labels), 'prompt')} but {format_count(len(answers), 'answer')}")
        for label, answer in zip(labels, answers, strict=True):
            check_value(f"the answer of {label}", answer, str | None)
    if needs_answer(criterion):
        missing = next((label for i, label in enumerate(labels) if answers is None or answers[i] is None), None)
        if missing is not None:
            raise InputError(f"{missing}: no reference answer, which the criterion {criterion!r} reads")


def check_vocabulary(tokenizer: Tokenizer, decoder: LanguageModel) -> None:
    """Check that the embedding has a row for every token. Raises CheckpointError if it does not."""
    fault = find_missing_rows(tokenizer, decoder.config.vocab_size)
    if fault is not None:
        raise CheckpointError(fault)


def find_missing_rows(tokenizer: Tokenizer, rows: int) -> str | None:
    """Return why an embedding of so many rows does not fit a tokenizer; None where it has a row for every token."""
    if tokenizer.largest_id < rows:
        return None
    return (
        f"{tokenizer.directory}: the tokenizer's largest id is {tokenizer.largest_id}, but the embedding has "
        f"{format_count(rows, 'row')}; the tokenizer belongs to another model, or the embedding was not resized"
    )


def check_ids(ids: Sequence[int], runner: ModelRunner, label: str) -> list[int]:
    """Return token ids as a list. Raises InputError on one that is no integer or not in the model's vocabulary."""
    return check_ids_below(ids, runner.decoder.config.vocab_size, runner.role, label)


def check_ids_below(ids: Sequence[int], size: int, role: Role, label: str) -> list[int]:
    """Return token ids as a list. size: number of ids in the model's vocabulary.

    Raises InputError on one that is no integer or not in the vocabulary.
    """
    checked: list[int] = []
    check_list(label, ids, "token ids")
    for i in ids:
        if isinstance(i, bool) or not hasattr(i, "__index__"):
            raise InputError(f"{label}: a token id must be an integer, not {i!r}")
        checked.append(operator.index(i))
        if not 0 <= checked[-1] < size:
            raise InputError(f"{label}: token id {i} is outside the {role}'s vocabulary of {size}")
    return checked


def find_misfit(tokens: int, runner: ModelRunner, label: str) -> str | None:
    """Return why a sequence of so many tokens cannot be run: the model's positions, or an empty cache; None if it can.

    label: name of the sequence, with which the sentence begins.
    """
    positions = runner.decoder.config.max_position_embeddings
    pool = runner.tree.pool
    if tokens >= positions:
        length = format_count(tokens, "token")
        return f"{label} has {length}; the {runner.role} {runner.directory} has {positions} positions"
    if tokens > pool.num_pages * pool.page_size:
        num_needed = -(-tokens // pool.page_size)
        return (
            f"{label} has {format_count(tokens, 'token')}; the {runner.role}'s key-value cache holds "
            f"{pool.num_pages * pool.page_size} "
            f"in {pool.describe()}, and {pool.describe(num_needed)} are needed; raise memory_bytes or "
            "memory_utilization"
        )
    return None


def check_positions(tokens: int, runner: ModelRunner, label: str) -> None:
    """Raise CapacityError where `find_misfit` finds a reason."""
    misfit = find_misfit(tokens, runner, label)
    if misfit is not None:
        raise CapacityError(misfit)


def check_sizes(memory_utilization: float, max_num_seqs: int | None) -> None:
    """Raise InputError on a fraction of the memory outside (0, 1], or a largest batch without a sequence."""
    if max_num_seqs is not None:
        check_count("max_num_seqs", max_num_seqs)
    if not 0.0 < memory_utilization <= 1.0:
        raise InputError(f"memory_utilization must be in (0, 1], not {memory_utilization}")


def check_windows(windows: Sequence[Window], length: int) -> None:
    """Raise InputError on a window (context, start, end) that is not one of a response of so many tokens."""
    check_list("windows", windows, "windows")
    for window in windows:
        check_value("a window", window, tuple[int, int, int])
        if not 0 <= window[0] <= window[1] < window[2] <= length:
            raise InputError(
                f"{tuple(window)} is no window (context, start, end) of a response of {format_count(length, 'token')}"
            )
