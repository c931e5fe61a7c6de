"""Single places of given responses: what a model says there, and where it gets to if another token is put there.

A place, or node, at position t of a response lies in front of its token t. Responses are read in one pass over prompt
and response; of all hidden states those at the nodes are kept, and the head is applied to these alone.

    prompt ---- y_0 ---- y_1 y_2 y_3 ---- y_4 ...    the response is computed once, up to its last node
           \\         \\                \\
            a, b       a, c             b            forced tokens: one computed token each, behind forks of the path

Shapes:  N nodes   D model width   V vocabulary
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from genssd.engine.branch import Branch, Brancher, ModelState, PromptIds
from genssd.engine.chunk import Chunk
from genssd.engine.errors import CapacityError, NumericsError
from genssd.engine.expander import Expander, Expansion, Usage
from genssd.engine.generation import Completion, generate
from genssd.engine.runner import ModelRunner
from genssd.engine.sampling import forced_stream
from genssd.engine.tree import Path
from genssd.kernels.logprob import LOGITS_BYTES, top_k


@dataclass(frozen=True, slots=True, kw_only=True)
class Fork:
    """A token that is put behind the first `position` tokens of a response, in place of what stands there."""

    position: int
    token: int


class NodeReader:
    """What one model says at nodes. vocabulary: ids from it on are padding, and have no probability."""

    def __init__(self, runner: ModelRunner, vocabulary: int, usage: Usage) -> None:
        self._runner = runner
        self._vocabulary = vocabulary
        self._usage = usage

    def states(
        self,
        prompt_ids: Sequence[int],
        responses: Sequence[Sequence[int]],
        positions: Sequence[Sequence[int]],
        label: str,
    ) -> list[Tensor]:
        """The hidden states that predict each response's tokens at some positions, on the CPU, [N, D] each.

        The prompt is computed once, every response once up to its last node. label: what messages call the prompt.
        Raises CapacityError where the model's positions or the free pages do not suffice.
        """
        found: list[Tensor] = []
        with Spine(self._runner, self._usage, label) as prompt:
            before_1D = prompt.extend(prompt_ids)[-1:]
            for response, at in zip(responses, positions, strict=True):
                with prompt.fork() as spine:
                    states_ND = torch.cat((before_1D, spine.extend(response[: max(at, default=0)])))
                found.append(states_ND[list(at)].cpu())
        return found

    @torch.inference_mode()
    def likeliest(self, states_ND: Tensor, k: int, label: str, *, least: float = 0.0) -> list[list[int]]:
        """The k most likely tokens at every node, most likely first, of equal ones the lower id; of them those of at
        least the probability `least`."""
        found: list[list[int]] = []
        for logits_NV in self._logits(states_ND, label):
            top_NK, ids_NK = top_k(logits_NV, min(k, self._vocabulary))
            counts_N = ((top_NK - logits_NV.logsumexp(1, keepdim=True)).exp() >= least).sum(1)
            found += [ids[:count] for ids, count in zip(ids_NK.tolist(), counts_N.tolist(), strict=True)]
        return found

    @torch.inference_mode()
    def logprob(self, states_ND: Tensor, ids: Sequence[Sequence[int]], label: str) -> list[list[float]]:
        """Of some tokens at every node, at temperature 1 over the whole vocabulary, normalised in float64."""
        rows = (row for logits_NV in self._logits(states_ND, label) for row in logits_NV.double())
        return [(row[list(wanted)] - row.logsumexp(0)).tolist() for row, wanted in zip(rows, ids, strict=True)]

    def _logits(self, states_ND: Tensor, label: str) -> Iterator[Tensor]:
        """float32, a few nodes at a time."""
        for part_ND in torch.split(states_ND, max(1, LOGITS_BYTES // (4 * self._vocabulary))):
            logits_NV = self._runner.logits(part_ND.to(self._runner.decoder.device))[:, : self._vocabulary]
            # a banned token has -inf; NaN and +inf are no logits, and something must be possible
            if not bool((logits_NV.amax(1).isfinite() & ~logits_NV.isnan().any(1)).all()):
                raise NumericsError(
                    f"the {self._runner.role} {self._runner.directory} produced NaN or infinite logits for {label}; "
                    "check the weights, or run it in float32"
                )
            yield logits_NV


class Spine:
    """A path that is extended step by step and forked on the way. A context manager: its own path ends with it, its
    forks live on."""

    def __init__(self, runner: ModelRunner, usage: Usage, label: str, path: Path | None = None) -> None:
        self._runner = runner
        self._usage = usage
        self._label = label
        self._path = runner.tree.root() if path is None else path

    @torch.inference_mode()
    def extend(self, ids: Sequence[int]) -> Tensor:
        """Compute further tokens; their hidden states, [len(ids), D]."""
        tree, config = self._runner.tree, self._runner.decoder.config
        if self._path.length + len(ids) > config.max_position_embeddings:
            raise CapacityError(
                f"{self._label}: prompt and response have more tokens than the {config.max_position_embeddings} "
                f"positions of the {self._runner.role} {self._runner.directory}"
            )
        if tree.pages_to_append(self._path, len(ids)) > tree.pool.num_free:
            raise CapacityError(
                f"{self._label}: prompt and response do not fit into the {tree.pool.num_free} free pages of the "
                f"{self._runner.role}'s cache; raise memory_bytes or memory_utilization"
            )
        self._usage.prefill_tokens += len(ids)
        if not ids:
            return self._runner.decoder.norm.new_empty(0, config.hidden_size)
        return self._runner.extend([self._path], [ids])[0]

    def fork(self) -> Spine:
        """Another one with the same tokens."""
        return Spine(self._runner, self._usage, self._label, self.fork_path())

    def fork_path(self) -> Path:
        """A path with the same tokens, which the caller drops."""
        return self._runner.tree.fork(self._path)

    def __enter__(self) -> Spine:
        return self

    def __exit__(self, *exception: object) -> None:
        self._runner.tree.drop(self._path)


@dataclass(frozen=True, slots=True, kw_only=True)
class Forcing:
    """A request: `n` completions behind every fork of some responses to one prompt."""

    prompt: PromptIds
    prompt_ids: tuple[int, ...]
    """As the model that goes on reads it."""
    responses: Sequence[Sequence[int]]
    forks: Sequence[Sequence[Fork]]
    """Of each response."""
    stream: int
    """Of the prompt; every fork has one of its own."""
    n: int
    max_tokens: int
    """Of a response: what is in front of the forced token, the token itself, and what comes behind it."""
    ends: frozenset[int]
    """Tokens behind which nothing comes."""
    label: str


def iter_force(
    request: Forcing, owner: Brancher, expander: Expander, runner: ModelRunner, usage: Usage
) -> Iterator[tuple[int, Fork, list[Completion]]]:
    """The response's index, the fork and its completions, as each ends. A completion's tokens are those behind the
    forced one; its text is that of the whole response. Behind a token that ends a response all n are empty.

    The prompt is computed once, every response once up to its last fork; as many responses at a time as half of the
    free pages hold. Closing the iterator early returns all pages. Raises CapacityError when one does not fit.
    """
    with Spine(runner, usage, request.label) as prompt:
        prompt.extend(request.prompt_ids)
        for group in _groups(request, runner):
            asked: list[tuple[int, Fork]] = []
            for index in group:
                for fork in dict.fromkeys(request.forks[index]):
                    ended = _ended(request, index, fork, owner)
                    if ended is None:
                        asked.append((index, fork))
                    else:
                        yield index, fork, ended
            queue = _open(request, asked, prompt, owner, runner, usage)
            for key, completions in generate(dict(enumerate(queue)), expander):
                yield *asked[key], completions


def _ended(request: Forcing, index: int, fork: Fork, owner: Brancher) -> list[Completion] | None:
    """The completions behind a fork where there is nothing left to write, else None."""
    ids = [*request.responses[index][: fork.position], fork.token]
    if fork.token not in request.ends and len(ids) < request.max_tokens:
        return None
    status: Literal["finished", "length"] = "finished" if fork.token in request.ends else "length"
    return [Completion(token_ids=(), text=owner.decode(ids), status=status, logprob=())] * request.n


def _groups(request: Forcing, runner: ModelRunner) -> Iterator[list[int]]:
    """The responses, as many at a time as half of the free pages hold."""
    pool, group, held = runner.tree.pool, list[int](), 0
    for index, forks in enumerate(request.forks):
        # one page more: a half-filled page of the prompt is copied on the first write
        pages = max((fork.position for fork in forks), default=0) // pool.page_size + 2
        if group and held + pages > pool.num_free // 2:
            yield group
            group, held = [], 0
        group.append(index)
        held += pages
    if group:
        yield group


def _open(
    request: Forcing,
    asked: Sequence[tuple[int, Fork]],
    prompt: Spine,
    owner: Brancher,
    runner: ModelRunner,
    usage: Usage,
) -> list[Expansion]:
    """An expansion for every fork, on pages shared up to the forced token; all or none."""
    opened: dict[tuple[int, Fork], Branch] = {}
    try:
        for index in dict.fromkeys(index for index, _ in asked):
            response = request.responses[index]
            with prompt.fork() as spine:
                done = 0
                for fork in sorted((f for i, f in asked if i == index), key=lambda fork: fork.position):
                    spine.extend(response[done : fork.position])
                    done = fork.position
                    stream = forced_stream(request.stream, index, fork.position, fork.token)
                    branch = opened[index, fork] = Branch(owner, request.prompt, stream)
                    branch.history = [*response[:done], fork.token]
                    state = ModelState(pending=[fork.token], path=spine.fork_path())
                    if runner.role == "teacher":
                        branch.teacher = state
                    else:
                        branch.student = state
    except BaseException:
        for branch in opened.values():
            branch.drop()
        raise
    usage.forced_tokens += len(opened)
    whole = Chunk(tokens=request.max_tokens, until=None)
    return [
        Expansion(branch, request.n, whole, request.max_tokens - branch.length, request.label)
        for branch in (opened[key] for key in asked)
    ]
