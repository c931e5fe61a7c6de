"""Suspended branches come back: tokens that several of them share are computed once, into pages that they share.

The branches of a beam form a tree, whose forks lie where chunks end:

    prompt, chunk 1 ---- chunk 2a ---- chunk 3a     "prompt, chunk 1" and "chunk 2a" are shared spans;
                  \\            \\---- chunk 3b     what follows them each branch computes itself
                   \\---- chunk 2b, chunk 3c

The nodes and pages are those that the branches held before their suspension. So a round that fitted beside its branches
fits again when they come back alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from genssd.engine.cache.tree import Path
from genssd.engine.common.model_choices import Role
from genssd.engine.decoding.branch import Branch
from genssd.engine.decoding.shared_prefixes import SharedPrefixes
from genssd.engine.models.runner import ModelRunner
from genssd.engine.models.state_rows import StateRow
from genssd.engine.readers.prompt_ids import PromptIds


@dataclass(frozen=True, slots=True, eq=False)
class SharedSpan:
    """Tokens from position `start` to `end` that two or more suspended branches share."""

    start: int
    end: int
    parent: SharedSpan | None
    """Shared tokens before these; None after those that the prompt shares with other prompts."""
    branches: Sequence[Branch]


def shared_spans(branches: Sequence[Branch], role: Role, prefixes: SharedPrefixes[PromptIds]) -> list[SharedSpan]:
    """Return the spans that suspended branches among these share under one model, parents first.

    They begin where those end that prompts share with each other (`prefixes`).
    """
    groups: dict[int, list[Branch]] = {}
    for branch in branches:
        if branch.state(role).path is None and branch.trace:
            groups.setdefault(id(branch.prompt), []).append(branch)
    spans: list[SharedSpan] = []
    for group in groups.values():
        _divide(group, 0, prefixes.length(group[0].prompt), None, role, spans)
    return spans


def innermost_spans(spans: Sequence[SharedSpan]) -> Mapping[Branch, SharedSpan]:
    """Return the last shared span of every branch that has one."""
    return {branch: span for span in spans for branch in span.branches}


def open_paths(runner: ModelRunner, branches: Sequence[Branch], prefixes: SharedPrefixes[PromptIds]) -> int:
    """Give every branch without a path one, which holds what it shares; return the number of tokens computed for that.

    Shared are the spans of its prompt and, of suspended branches, those with each other. The tokens after them stay
    pending. Call it where the budget has found room for them.
    """
    spans = shared_spans(branches, runner.role, prefixes)
    num_computed = sum(span.end - span.start for span in spans)
    paths: dict[SharedSpan, Path] = {}
    try:
        for span in spans:
            if span.parent is None:
                path, count = prefixes.open(span.branches[0].prompt, span.branches[0].prompt.of(runner.role))
                num_computed += count
            else:
                path = runner.tree.fork(paths[span.parent])
            paths[span] = path
            runner.extend([path], [span.branches[0].state(runner.role).pending[span.start : span.end]], last=[1])
        for branch, span in innermost_spans(spans).items():
            state = branch.state(runner.role)
            state.path, state.pending = runner.tree.fork(paths[span]), state.pending[span.end :]
    finally:
        for path in paths.values():
            runner.tree.drop(path)
    for branch in branches:
        state = branch.state(runner.role)
        if state.path is None:
            state.path, count = prefixes.open(branch.prompt, branch.prompt.of(runner.role))
            state.pending = state.pending[state.path.length :]
            num_computed += count
    return num_computed


def read_pending(runner: ModelRunner, branches: Sequence[Branch]) -> int:
    """Compute the tokens that branches have pending under one model; return how many prompt tokens are among them."""
    states = [state for branch in branches if (state := branch.state(runner.role)).pending]
    paths = [state.path for state in states if state.path is not None]
    num_prefill = sum(len(state.pending) for state in states if len(state.pending) > 1)
    pending = [state.pending for state in states]
    for state, hidden in zip(states, runner.extend(paths, pending, last=[1] * len(paths)), strict=True):
        state.hidden = StateRow(hidden, len(hidden) - 1)
        state.pending = []
    return num_prefill


def _divide(
    group: Sequence[Branch], num_chunks: int, start: int, parent: SharedSpan | None, role: Role, spans: list[SharedSpan]
) -> None:
    """Append the spans of branches whose first chunks are the same. num_chunks: how many lie before `start`."""
    # the last chunk of a branch is never shared: its last token's hidden state predicts the next one
    num_shareable = min(len(branch.trace) for branch in group) - 1
    if len(group) < 2 or num_chunks > num_shareable:
        return
    while num_chunks < num_shareable and len({branch.trace[: num_chunks + 1] for branch in group}) == 1:
        num_chunks += 1
    # a student with another tokenizer may hold all of the last chunk back: the token that predicts the next one is
    # before it, and not shared either
    end = min(_end_of_chunks(group[0], role, num_chunks), *(len(b.state(role).pending) - 1 for b in group))
    span = SharedSpan(start, end, parent, group) if end > start else parent
    if span is not None and span is not parent:
        spans.append(span)
    parts: dict[tuple[int, ...], list[Branch]] = {}
    for branch in group:
        parts.setdefault(branch.trace[: num_chunks + 1], []).append(branch)
    for part in parts.values():
        _divide(part, num_chunks + 1, end, span, role, spans)


def _end_of_chunks(branch: Branch, role: Role, num_chunks: int) -> int:
    """Return the position after the first chunks of a branch's response under one model."""
    num_prompt = len(branch.prompt.of(role))
    if role == "student" and branch.history_readings:
        return num_prompt + sum(len(reading.ids) for reading in branch.history_readings[:num_chunks])
    return num_prompt + sum(branch.history_lengths[:num_chunks])
